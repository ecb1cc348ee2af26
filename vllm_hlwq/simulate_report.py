"""What ``hlwq simulate`` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .checkpoint.conversion import readable
from .simulate import Replay
from .trace import STATES

MOST_COLUMNS = 10_000


def print_report(report: dict[str, Any], replays: Sequence[Replay]) -> None:
    """Print the tables of a replay.

    Args:
        report: of ``simulate.report``.
        replays: that it is of.
    """
    console = Console(markup=False, highlight=False)
    layers = report["layers"]
    console.print(
        f"{report['model']}: {len(layers)} layers of {layers[0]['experts']} experts, {layers[0]['top_k']} a token; "
        f"{report['steps']} steps, {report['tokens']} tokens, {report['decode_tokens']} of them decoded"
    )
    if report["state"] != "ended":
        console.print(f"The trace {STATES[report['state']]}.")
    tables = [_totals(report, "all"), _totals(report, "decode"), _by_layer(report)]
    # Where there is no room, figures would be cut and names of layers left out; a wide line is only broken.
    unlimited = console.options.update(max_width=MOST_COLUMNS)
    console.width = max(console.width, *(Measurement.get(console, unlimited, table).maximum for table in tables))
    for table in tables:
        console.print(table)
    for replay in replays:
        if replay.differences is not None:
            console.print(
                f"{replay.slots} slots: "
                + ("the server that recorded it counted the same" if not replay.differences
                   else "the server that recorded it counted otherwise: " + "; ".join(replay.differences))
            )  # fmt: skip


def _totals(report: dict[str, Any], part: Literal["all", "decode"]) -> Table:
    timed = part == "decode" and report["link_bytes_per_second"] is not None
    table = Table(title="All steps" if part == "all" else "Steps that are no long prompt", title_justify="left")
    for heading in ("slots", "hit rate", "optimum", "bytes a token", *["tokens/s", "at the optimum"] * timed):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["slots"]:
        found = row[part]
        speeds = [found[key] for key in ("tokens_per_second", "optimal_tokens_per_second")] if timed else []
        table.add_row(
            str(row["slots"]), f"{found['hit_rate']:.1%}", f"{found['optimal_hit_rate']:.1%}",
            readable(found["bytes_per_token"]), *("" if speed is None else f"{speed:,.1f}" for speed in speeds),
        )  # fmt: skip
    return table


def _by_layer(report: dict[str, Any]) -> Table:
    table = Table(title="Hit rate by layer, all steps", title_justify="left")
    table.add_column("layer", overflow="fold")
    for row in report["slots"]:
        table.add_column(f"{row['slots']} slots", justify="right", no_wrap=True)
    for number, layer in enumerate(report["layers"]):
        rates = (row["layers"][number]["all"]["hit_rate"] for row in report["slots"])
        table.add_row(layer["name"], *(f"{rate:.1%}" for rate in rates))
    return table
