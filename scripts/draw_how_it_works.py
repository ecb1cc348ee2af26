"""Draw the picture of docs/how_it_works.md.

python scripts/draw_how_it_works.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from vllm_hlwq.figures import INK, PALETTE, png

PICTURE = Path(__file__).resolve().parent.parent / "docs/how_it_works.png"
COMPUTE, STAGED, LINK, RESIDENT, _ = PALETTE
COLD = "#DDDDDD"
RESIDENT_EXPERTS = (1, 4, 9, 18, 21, 30)
MISSING_EXPERTS = (6, 23)


def panel(axes: Axes, x: float, y: float, width: float, height: float, title: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc="white", ec=INK, lw=1.2)
    )
    axes.text(x + width / 2, y + height + 0.16, title, ha="center", va="bottom", fontsize=11, weight="bold", color=INK)


def cells(axes: Axes, x: float, y: float, colours: list[str], columns: int, size: float = 0.36) -> None:
    for i, colour in enumerate(colours):
        column, row = i % columns, i // columns
        axes.add_patch(Rectangle((x + column * size, y - row * size), 0.86 * size, 0.86 * size, fc=colour, ec="none"))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=colour, lw=2.2))


def bar(axes: Axes, x: float, y: float, width: float, label: str, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), width - 0.05, 0.46, fc=colour, ec="none"))
    axes.text(x + (width - 0.05) / 2, y + 0.22, label, ha="center", va="center", fontsize=8.5, color="white")


def memory(axes: Axes) -> None:
    panel(axes, 0.2, 4.3, 3.6, 2.5, "host memory, page-locked")
    kinds = [RESIDENT if e in RESIDENT_EXPERTS else LINK if e in MISSING_EXPERTS else COLD for e in range(32)]
    cells(axes, 0.55, 6.25, kinds, 8)
    axes.text(2.0, 4.62, "all experts of a layer, one record each", ha="center", fontsize=9, color=INK)
    panel(axes, 6.6, 4.3, 5.2, 2.5, "GPU")
    axes.text(6.85, 6.5, "N slots of this layer", fontsize=9, color=INK)
    cells(axes, 6.85, 6.05, [RESIDENT] * 6 + [LINK] * 2, 8)
    axes.text(6.85, 5.5, "two staging banks, shared by all layers", fontsize=9, color=INK)
    cells(axes, 6.85, 5.05, [STAGED] * 6, 6)
    cells(axes, 9.3, 5.05, [STAGED] * 6, 6)
    axes.text(9.2, 4.45, "dense weights, KV cache: as ever", ha="center", fontsize=9, color=INK)
    arrow(axes, (3.95, 6.15), (6.5, 6.15), LINK)
    axes.text(5.2, 6.32, "misses, by a kernel", ha="center", fontsize=9, color=LINK)
    arrow(axes, (3.95, 5.1), (6.5, 5.1), STAGED)
    axes.text(5.2, 5.27, "a prompt's next layer,\nby copy engine", ha="center", fontsize=9, color=STAGED)


def decoding(axes: Axes) -> None:
    axes.text(0.2, 3.42, "decoding: one CUDA graph, no word from the host", fontsize=10, weight="bold", color=INK)
    x = 0.2
    for _ in range(2):
        for label, width, colour in (
            ("attention", 1.2, COMPUTE), ("router", 0.8, COMPUTE), ("plan", 0.65, INK), ("gather", 1.15, LINK),
            ("Marlin", 1.1, RESIDENT), ("sum", 0.6, COMPUTE),
        ):  # fmt: skip
            bar(axes, x, 2.72, width, label, colour)
            x += width
        x += 0.3
    axes.text(2.95, 2.42, "layer 1", ha="center", fontsize=9, color=INK)
    axes.text(8.75, 2.42, "layer 2", ha="center", fontsize=9, color=INK)


def prompt(axes: Axes) -> None:
    axes.text(0.2, 1.78, "a prompt: the link never waits for a router", fontsize=10, weight="bold", color=INK)
    for layer in range(3):
        bar(axes, 0.2 + 3.8 * layer, 1.1, 3.7, f"compute layer {layer + 1}", COMPUTE)
        if layer < 2:
            bar(axes, 0.6 + 3.8 * layer, 0.52, 3.0, f"copy layer {layer + 2}", STAGED)


def main() -> None:
    figure = Figure(figsize=(12, 7.2))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(0, 12)
    axes.set_ylim(0.3, 7.4)
    axes.axis("off")
    memory(axes)
    decoding(axes)
    prompt(axes)
    PICTURE.write_bytes(png(figure))


if __name__ == "__main__":
    main()
