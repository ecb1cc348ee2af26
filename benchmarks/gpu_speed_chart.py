"""The chart of tokens per second beside stock vLLM, from a result of ``gpu_acceptance.py``, as PNG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from acceptance_criteria import case

from vllm_hlwq.figures import GRID, INK, PALETTE, new_figure, png

OURS, STOCK, UVA, PREFETCH = PALETTE[0], PALETTE[4], PALETTE[2], PALETTE[3]


@dataclass(frozen=True)
class Bar:
    label: str
    colour: str
    tokens_per_second: float


@dataclass(frozen=True)
class Group:
    """Engines that hold the same share of the experts and decode the same batch."""

    title: str
    bars: tuple[Bar, ...]


LAYOUT = (
    ("all resident\n1 request", 1, {"all": ("cache", OURS), "resident": ("stock", STOCK)}),
    ("a quarter resident\n1 request", 1, {"cache": ("cache", OURS), "uva": ("uva", UVA)}),
    (
        "half resident\n32 requests",
        32,
        {"half": ("cache", OURS), "half_uva": ("uva", UVA), "half_prefetch": ("prefetch", PREFETCH)},
    ),
    ("a quarter resident\n32 requests", 32, {"cache": ("cache", OURS), "uva": ("uva", UVA)}),
)
"""Title, requests, and of each engine of ``gpu_acceptance.py`` the label and colour."""


def groups(result: dict[str, Any]) -> list[Group]:
    """What was measured, in the order of the chart.

    Raises:
        Missing: an engine did not run.
    """

    def rate(engine: str, batch: int) -> float:
        found: float = case(result["engines"], engine, batch)["decode_tokens_per_second"]
        return found

    return [
        Group(title, tuple(Bar(label, colour, rate(name, batch)) for name, (label, colour) in bars.items()))
        for title, batch, bars in LAYOUT
    ]


def draw(result: dict[str, Any]) -> bytes:
    """One panel a group, each with a scale of its own that starts at zero."""
    found = groups(result)
    figure = new_figure(3.1)
    panels = figure.subplots(1, len(found), width_ratios=[len(group.bars) for group in found])
    for axes, group in zip(panels, found, strict=True):
        heights = [bar.tokens_per_second for bar in group.bars]
        drawn = axes.bar(
            [bar.label for bar in group.bars], heights, color=[bar.colour for bar in group.bars], width=0.7
        )
        axes.bar_label(drawn, [f"{height:,.0f}" for height in heights], padding=2, fontsize=8, color=INK)
        axes.set_title(group.title, fontsize=8, color=INK)
        axes.set_ylim(0, 1.15 * max(heights))
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens per second", fontsize=8)
    environment = result["environment"]
    figure.suptitle(
        f"{result['model']} INT4 on {environment['gpu']}, PCIe {environment['pcie_generation']}: equal GPU memory for "
        "experts in each panel",
        fontsize=9,
        color=INK,
    )
    return png(figure)
