"""The charts of a model card, as PNG: sizes by format, errors by layer, and what the bytes are spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..figures import GRID, INK, PALETTE, new_figure, png
from .card_facts import KINDS, LayerError, Part
from .conversion import readable

COLOURS = dict(zip(KINDS, PALETTE, strict=True))
MARKERS = dict(zip(KINDS, "osD^v", strict=True))
HATCH = "///"


def compression(totals: Mapping[str, int]) -> bytes:
    """Bars of the weights' bytes by format; the first is what the others are compared with."""
    figure = new_figure(0.9 + 0.55 * len(totals))
    axes = figure.subplots()
    names, sizes = list(totals), list(totals.values())
    colours = [COLOURS[KINDS[4]], COLOURS[KINDS[0]], COLOURS[KINDS[2]]]
    axes.barh(names, sizes, height=0.6, color=[colours[min(index, 2)] for index in range(len(names))])
    for row, size in enumerate(sizes):
        ratio = "" if row == 0 else f"  ({sizes[0] / size:.2f} times smaller)"
        axes.text(size, row, f"  {readable(size)}{ratio}", va="center", color=INK)
    # Room for the longest label, which stands beside the longest bar or beside a short one with its ratio.
    axes.set_xlim(0, max(sizes[0] * 1.2, max(sizes[1:], default=0) * 1.1 + sizes[0] * 0.5))
    axes.set_title("Weights by format", loc="left", color=INK)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    return png(figure)


def layer_errors(errors: Sequence[LayerError], total: float) -> bytes:
    """Relative mean squared error by layer, a line for each kind; hollow marks at the left are in no layer."""
    figure = new_figure(3.6)
    axes = figure.subplots()
    layers = sorted({error.layer for error in errors if error.layer is not None})
    first, last = (layers[0], layers[-1]) if layers else (0, 0)
    left = first - max(1, 0.05 * (last - first))
    for kind in KINDS:
        style: dict[str, Any] = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 5}
        own = [(e.layer, e.relative_mse) for e in errors if e.kind == kind and e.layer is not None]
        alone = [e.relative_mse for e in errors if e.kind == kind and e.layer is None]
        if own:
            axes.plot(*zip(*own, strict=True), label=kind, linewidth=1.4, **style)
        if alone:
            axes.plot(
                [left], alone, label=f"{kind}, in no layer", linestyle="none", markerfacecolor="white",
                markeredgewidth=1.6, **style,
            )  # fmt: skip
    axes.axhline(total, color=INK, linewidth=1, linestyle="--", label="all of them", zorder=0)
    axes.set_title("Error of the weights that coding changed", loc="left", color=INK)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative mean squared error")
    axes.set_xlim((left if any(e.layer is None for e in errors) else first) - 0.5, last + 0.5)
    axes.set_xticks(layers[:: max(1, -(-len(layers) // 12))])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    # An error near another's is to look near: the axis spans at least a tenth of what it shows.
    values = [total, *(error.relative_mse for error in errors)]
    middle, reach = (max(values) + min(values)) / 2, (max(values) - min(values)) / 2
    reach = max(1.15 * reach, 0.05 * middle)
    axes.set_ylim(middle - reach, middle + reach)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return png(figure)


def breakdown(sizes: Mapping[str, Sequence[Part]]) -> bytes:
    """Stacked bars of bytes by kind, one for each format; what is stored in 16 bit is hatched."""
    figure = new_figure(1.6 + 0.6 * len(sizes))
    axes = figure.subplots()
    largest = max(sum(part.bytes for part in parts) for parts in sizes.values())
    for row, parts in enumerate(sizes.values()):
        left = 0
        for part in parts:
            coded = part.stored.startswith(("Q", "INT4"))
            axes.barh(
                row, part.bytes, left=left, height=0.6, color=COLOURS[part.kind], edgecolor="white", linewidth=0.8,
                hatch=None if coded else HATCH,
            )  # fmt: skip
            if part.bytes > 0.12 * largest:
                axes.text(
                    left + part.bytes / 2, row, readable(part.bytes), ha="center", va="center", fontsize=8, color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
                )  # fmt: skip
            left += part.bytes
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.invert_yaxis()
    axes.set_title("What the bytes are spent on", loc="left", color=INK)
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    shown = {part.kind for parts in sizes.values() for part in parts}
    handles = [Patch(facecolor=COLOURS[kind], label=kind) for kind in KINDS if kind in shown]
    handles.append(Patch(facecolor="white", edgecolor=INK, hatch=HATCH, label="stored in 16 bit"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return png(figure)
