"""What ``throughput.py`` makes of its measurements: the roofline's prediction, a table and a chart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vllm_hlwq.figures import png

GIB, MIB = 2**30, 2**20
COLUMNS = (
    "configuration", "slots", "batch", "prompt", "prefill tok/s", "decode tok/s", "ms/step", "predicted", "hits",
    "MiB/token", "GPU GiB", "host GiB",
)  # fmt: skip


def is_baseline(row: dict[str, Any]) -> bool:
    """Whether all experts are resident: stock vLLM, or a cache of as many slots as experts."""
    if row["status"] != "ok":
        return False
    cache = row["expert_cache"]
    return row["configuration"].startswith("resident") or (cache is not None and cache["slots"] == cache["experts"])


def add_predictions(result: dict[str, Any]) -> None:
    """Add ``predicted_step_milliseconds`` to every measurement of a cache, and name the row that it is based on.

    The base is, of the rows with all experts resident, stock vLLM on the kernels that the cache runs on, stock vLLM
    on others, or the cache with all experts resident, in this order.
    """
    bases = [row for row in result["rows"] if is_baseline(row)]
    order = {"resident:marlin": 0, "resident": 1, "cache": 3}
    base = min(bases, key=lambda row: order.get(row["configuration"], 2), default=None)
    result["roofline_base"] = None if base is None else base["configuration"]
    if base is None:
        return
    resident = {m["batch"]: m["step_milliseconds"] for m in base["measurements"] if "step_milliseconds" in m}
    for row in result["rows"]:
        for found in row.get("measurements", ()):
            if "decode_bytes_per_step" in found:
                transfer = 1e3 * found["decode_bytes_per_step"] / result["link_bytes_per_second"]
                found["predicted_step_milliseconds"] = resident[found["batch"]] + transfer


def print_table(result: dict[str, Any]) -> None:
    """Print one line a configuration and batch size, and below them why others are missing."""
    environment = result["environment"]
    table = Table(
        *COLUMNS,
        title=f"{result['model']} on {environment['device']}, routing: {result['routing']}, "
        f"link {result['link_bytes_per_second'] / 1e9:.1f} GB/s, predicted from {result['roofline_base']}",
    )
    for row in result["rows"]:
        slots = "all" if row["cache_size"] is None else str(row["cache_size"])
        if row["status"] != "ok":
            table.add_row(row["configuration"], slots, "", row["status"])
            continue
        for found in row["measurements"]:
            table.add_row(row["configuration"], slots, *cells(row, found))
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    for row in result["rows"]:
        if "reason" in row:
            size = "" if row["cache_size"] is None else f" at {row['cache_size']}"
            console.print(
                f"{row['configuration']}{size} {row['status']}: {row['reason']}", markup=False, soft_wrap=True
            )


def cells(row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    def number(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    gpu, host, moved = row["gpu_memory"], row["host_peak_bytes"], found.get("decode_bytes_per_token")
    return [
        str(found["batch"]),
        str(found["prompt_tokens"]),
        f"{found['prefill_tokens_per_second']:,.0f}",
        number(found.get("decode_tokens_per_second"), "{:,.1f}"),
        number(found.get("step_milliseconds"), "{:.2f}"),
        number(found.get("predicted_step_milliseconds"), "{:.2f}"),
        number(found.get("decode_hit_rate"), "{:.0%}"),
        number(None if moved is None else moved / MIB, "{:,.1f}"),
        number(None if gpu is None else gpu["peak_reserved"] / GIB, "{:.1f}"),
        number(None if host is None else host / GIB, "{:.1f}"),
    ]


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """Draw decoding speed over the cache size, a panel a batch size; configurations without a size are level lines."""
    points: dict[int, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    levels: dict[int, dict[str, float]] = defaultdict(dict)
    for row in result["rows"]:
        for found in row.get("measurements", ()):
            if "decode_tokens_per_second" not in found:
                continue
            speed, batch = found["decode_tokens_per_second"], found["batch"]
            if row["cache_size"] is None:
                levels[batch][row["configuration"]] = speed
            else:
                points[batch][row["configuration"]].append((row["cache_size"], speed))
    batches = sorted({*points, *levels})
    if not batches:
        return
    sizes = sorted({size for lines in points.values() for line in lines.values() for size, _ in line})
    figure = Figure(figsize=(4 * len(batches), 3.6), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)
    names = list(dict.fromkeys(row["configuration"] for row in result["rows"] if row["status"] == "ok"))
    color = {name: f"C{number}" for number, name in enumerate(names)}
    for panel, batch in zip(panels[0], batches, strict=True):
        for name, line in points[batch].items():
            panel.plot(*zip(*sorted(line), strict=True), marker="o", color=color[name], label=name)
        for name, speed in levels[batch].items():
            panel.axhline(speed, linestyle="--", color=color[name], label=name)
        panel.set(title=f"batch {batch}", xlabel="experts resident per layer")
        panel.set_xscale("log", base=2)
        # Ratios are what is compared, and all experts resident are many times as fast as half of them.
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        panel.set_xticks(sizes, labels=sizes)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("decoding, tokens per second")
    panels[0][-1].legend()
    figure.suptitle(f"{result['model']}, {result['environment']['device']}, routing: {result['routing']}")
    path.write_bytes(png(figure, dots_per_inch=120))
