"""The charts of ``hlwq simulate``, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .checkpoint.writer import write_bytes
from .figures import GRID, INK, PALETTE, new_figure, png

LRU, OPTIMUM, LAYER = PALETTE[0], PALETTE[2], PALETTE[4]


def write_charts(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``hit_rates.png``, ``layers.png`` and, if a link was given, ``tokens_per_second.png``.

    Args:
        report: of ``simulate.report``.
        folder: made if it is not there; files of these names are overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    charts = {"hit_rates.png": hit_rates(report), "layers.png": layers(report)}
    if report["slots"][0]["decode"]["tokens_per_second"] is not None:
        charts["tokens_per_second.png"] = tokens_per_second(report)
    for name, content in charts.items():
        write_bytes(folder / name, content)
    return [folder / name for name in charts]


def hit_rates(report: dict[str, Any]) -> bytes:
    """Hit rate over slots: of all layers, of each, and the optimum."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    rows = report["slots"]
    slots = [row["slots"] for row in rows]
    for number in range(len(report["layers"])):
        rates = [row["layers"][number]["all"]["hit_rate"] for row in rows]
        axes.plot(slots, rates, color=LAYER, linewidth=0.8, label="each layer" if number == 0 else None)
    best = [row["all"]["optimal_hit_rate"] for row in rows]
    axes.plot(slots, best, color=OPTIMUM, marker="s", markersize=5, linestyle="--", label="optimum (Belady)")
    rates = [row["all"]["hit_rate"] for row in rows]
    axes.plot(slots, rates, color=LRU, marker="o", markersize=5, linewidth=1.8, label="the cache (LRU), all layers")
    axes.set_title(f"Hit rate by cache size, {report['model']}", loc="left", color=INK, parse_math=False)
    _rates_over_slots(axes, slots)
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def layers(report: dict[str, Any]) -> bytes:
    """Hit rate of each layer, a line for each of at most five numbers of slots."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    rows = report["slots"]
    shown = rows if len(rows) <= len(PALETTE) else [rows[i * (len(rows) - 1) // 4] for i in range(5)]
    for row, colour, marker in zip(shown, PALETTE, "osD^v", strict=False):
        rates = [layer["all"]["hit_rate"] for layer in row["layers"]]
        axes.plot(range(len(rates)), rates, color=colour, marker=marker, markersize=5, label=f"{row['slots']} slots")
    axes.set_title(f"Hit rate by layer, {report['model']}", loc="left", color=INK, parse_math=False)
    axes.set_xlabel("mixture-of-experts layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    _rates(axes)
    figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    return png(figure)


def tokens_per_second(report: dict[str, Any]) -> bytes:
    """Predicted tokens per second of decoding over slots."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    rows = report["slots"]
    slots = [row["slots"] for row in rows]
    named = (
        ("optimal_tokens_per_second", "optimum (Belady)", {"color": OPTIMUM, "marker": "s", "linestyle": "--"}),
        ("tokens_per_second", "the cache (LRU)", {"color": LRU, "marker": "o", "linewidth": 1.8}),
    )
    for key, label, style in named:
        known = [(row["slots"], row["decode"][key]) for row in rows if row["decode"][key] is not None]
        axes.plot(*zip(*known, strict=True), label=label, markersize=5, **style)
    step = report["resident_step_seconds"]
    beside = f"and {step * 1000:g} ms a step" if step else "alone"
    link = f"{report['link_bytes_per_second'] / 1e9:g} GB/s {beside}"
    axes.set_title(f"Decoding at a link of {link}, {report['model']}", loc="left", color=INK, parse_math=False)
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    _plain(axes)
    _over_slots(axes, slots)
    axes.legend(frameon=False, fontsize=9)
    return png(figure)


def _rates_over_slots(axes: Axes, slots: Sequence[int]) -> None:
    _rates(axes)
    _over_slots(axes, slots)


def _over_slots(axes: Axes, slots: Sequence[int]) -> None:
    axes.set_xlabel("slots per layer")
    if len(slots) <= 16:
        axes.set_xticks(slots)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _rates(axes: Axes) -> None:
    axes.set_ylabel("experts found in a slot")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
