"""The chart of a KV cache's bytes over the length of the text, as PNG."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vllm_hlwq.figures import png

MIB = 2**20
# Okabe and Ito's palette: told apart with any colour vision, and on a grey print.
LINES = {
    "BF16": ("#222222", "o"),
    "quanto 4 bit": ("#999999", "^"),
    "hqq 4 bit": ("#56B4E9", "v"),
    "HLWQ 4 bit": ("#009E73", "s"),
    "HLWQ 3 bit": ("#0072B2", "D"),
    "HLWQ 2 bit": ("#E69F00", "P"),
}
TITLES = {
    "dense": "4 layers of full attention, 4 heads of 256",
    "Gemma-4-26B-A4B": "Gemma-4-26B-A4B: 25 sliding layers\nin BF16, 5 global ones coded",
}


def short(value: float, _: int = 0) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def draw(result: dict[str, Any]) -> bytes:
    """One panel a model; both axes are logarithmic."""
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(TITLES))
    for axes, (model, title) in zip(panels, TITLES.items(), strict=True):
        measured = result["models"][model]
        for name, (colour, marker) in LINES.items():
            if name in measured["bytes"]:
                sizes = [size / MIB for size in measured["bytes"][name]]
                axes.plot(
                    measured["lengths"][: len(sizes)], sizes, color=colour, marker=marker, markersize=4.5, label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(short))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens")
        axes.set_ylabel("MiB held")
        axes.grid(color="#DDDDDD")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return png(figure)
