"""``hlwq plan``: what a model would take, how many experts fit, and what the link allows, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

MIB, GIB = 2**20, 2**30
GPU_COLUMNS = ("GPU", "link", "GB/s", "slots", "GiB used", "GiB locked", "hits", "ms/token", "tokens/s")
LINK = "25GB/s"
LEAST_WIDTH = 112
"""Columns that the table takes."""
NOTE = (
    "Estimates. Memory is nominal less 2 % for the driver, the link what copies reach of PCIe's rate. Hits are those "
    "of Gemma-4-26B-A4B with so many experts resident; ms/token is what the link alone then takes for one sequence, "
    "tokens/s what it allows at most: no promise of speed."
)


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of the model: config.json, with or without weights. Or its name, if the hub's cache has it.",
            show_default=False,
        ),
    ],
    vram: Annotated[str | None, typer.Option(help="Nominal memory of a GPU, like 24GiB.")] = None,
    ram: Annotated[
        str | None, typer.Option(help="Memory of the host, like 64GiB, judged for the GPU of --vram.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help=f"Rate from host to the GPU of --vram; {LINK} by default.", show_default=False)
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="--max-model-len; by default the model's own.", show_default=False)
    ] = None,
    kv_floor_seqs: Annotated[
        int, typer.Option(min=1, help="Sequences of that length for whose KV cache there must be room.")
    ] = 2,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer; by default as many as fit.", show_default=False)
    ] = None,
    staging_size: Annotated[
        int | None, typer.Option(min=1, help="Experts of a staging bank.", show_default=False)
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="As of vllm serve, which takes 256, or 1024 from 70 GiB on, but no more than tokens, if not told.",
            show_default=False,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="As of vllm serve, which takes 8192 from 70 GiB on if not told.")
    ] = 2048,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.01, max=1, help="As of vllm serve.")] = 0.92,
    hit_rate: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Share of hits to give a bound for; may be repeated.", show_default=False),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Plan for the reference backend, as on a CPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how many experts a GPU holds of a model, what that takes, and what its link allows."""
    from .errors import CheckpointError
    from .gpus import Gpu
    from .planning import ASSUMED_HITS, Plan, Settings
    from .quantities import parse_bytes, parse_rate
    from .served_checkpoint import model_folder

    if link is not None and vram is None:
        raise CheckpointError(f"--link {link}: of the GPU of --vram, which is not given; add --vram 12GiB, say")
    if ram is not None and vram is None:
        raise CheckpointError(f"--ram {ram}: judged for the GPU of --vram, which is not given; add --vram 12GiB, say")
    if max_num_seqs is not None and max_num_seqs > max_num_batched_tokens:
        raise CheckpointError(
            f"--max-num-seqs {max_num_seqs}: more than --max-num-batched-tokens {max_num_batched_tokens}, which vllm "
            "serve refuses; lower the one or raise the other"
        )
    rate = parse_rate(link or LINK, "--link")
    gpu = None if vram is None else Gpu("--vram", parse_bytes(vram, "--vram"), rate, "--link")
    settings = Settings(
        context=context,
        kv_floor_seqs=kv_floor_seqs,
        max_num_seqs=max_num_seqs or min(Settings.max_num_seqs, max_num_batched_tokens),
        max_num_batched_tokens=max_num_batched_tokens,
        utilization_permille=round(1000 * gpu_memory_utilization),
        ram=None if ram is None else parse_bytes(ram, "--ram"),
        slots=slots,
        staging_size=staging_size,
        hits_permille=tuple(round(1000 * share) for share in hit_rate) if hit_rate else ASSUMED_HITS,
        reference=reference,
    )
    folder = model_folder(model, None) or Path(model)
    if not folder.exists():
        raise CheckpointError(
            f"{model}: is no folder, and the hub's cache has no model of that name; give a downloaded model's folder"
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: holds neither config.json nor a safetensors file; give a model's folder")
    report = Plan(folder, settings).report(gpu)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Print a report for people."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, LEAST_WIDTH)
    for line in summary(report):
        console.print(line, soft_wrap=True)
    if report["target"] is not None:
        console.print()
        for line in details(report, report["target"]):
            console.print(line, soft_wrap=True)
    console.print()
    console.print(gpu_table(report))
    console.print(NOTE, soft_wrap=True)


def summary(report: dict[str, Any]) -> list[str]:
    """What does not depend on a GPU, line by line."""
    settings = report["settings"]
    beyond = report["context"] > report["longest"]
    longer = f" (config.json says {report['longest']:,}, and vllm serve may refuse more)" if beyond else ""
    form = report["format"]
    if form == "HLWQ":
        form = f"HLWQ, served as its INT4 export in groups of {report['group_size']}"
    return [
        f"{report['model']}: {form}; {report['layers']} layers of {report['experts']} experts, {report['top_k']} of "
        "them a token",
        f"{report['expert_bytes']:,} bytes an expert; a slot in every layer takes {mib(report['slot_bytes'])} MiB, all "
        f"experts {gib(report['all_experts_bytes'])} GiB, all else {gib(report['dense_bytes'])} GiB",
        f"KV cache of {settings['kv_floor_seqs']} sequences of {report['context']:,} tokens{longer}: at most "
        f"{gib(report['kv_floor_bytes'])} GiB; steps of {settings['max_num_batched_tokens']:,} tokens, "
        f"{settings['max_num_seqs']} sequences",
    ]


def details(report: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """A GPU, line by line."""
    lines = [f"{gib(target['memory'])} GiB nominal, {gib(target['usable'])} usable, {gib(target['granted'])} granted"]
    lines += [f"  {mib(size):>9} MiB {name.replace('_', ' ')}" for name, size in target["beside_experts"].items()]
    if target["slots"]:
        lines += [
            f"  {mib(target['slot_bytes']):>9} MiB slots: {target['slots']} of {report['experts']} in each layer",
            f"  {mib(target['staging_bytes']):>9} MiB staging",
            f"  {mib(target['vram_bytes']):>9} MiB of GPU memory together",
            f"  {mib(target['host_bytes']):>9} MiB of page-locked host memory",
        ]
        for bound in target["bounds"]:
            lines.append(
                f"{bound['hit_rate']:.1%} hits: {mib(bound['bytes_per_token'])} MiB and {bound['ms_per_token']:.1f} ms "
                f"a token at {target['link_bytes_per_s'] / 1e9:.1f} GB/s"
            )
    return lines + [f"does not fit: {problem}" for problem in target["problems"]]


def gpu_table(report: dict[str, Any]) -> Table:
    """All GPUs that are known, a line each."""
    table = Table(title_justify="left")
    for heading in GPU_COLUMNS:
        table.add_column(heading, justify="left" if heading in ("GPU", "link") else "right", no_wrap=True)
    for row in gpu_rows(report):
        table.add_row(*row)
    return table


def gpu_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of that table; whoever renders it in another form takes them from here."""
    rows: list[tuple[str, ...]] = []
    for gpu in report["gpus"]:
        head = (gpu["gpu"], gpu["link"], f"{gpu['link_bytes_per_s'] / 1e9:.1f}")
        if not gpu["slots"]:
            rows.append((*head, "none fits", *[""] * 5))
            continue
        expected = gpu["expected"]
        milliseconds = expected["ms_per_token"]
        count = f"{gpu['slots']} ({gpu['slots'] / report['experts']:.0%})" + ("" if gpu["fits"] else ", too many")
        speed = f"{1000 / milliseconds:.0f}" if milliseconds else "no bound"
        memory = (gib(gpu["vram_bytes"]), gib(gpu["host_bytes"]))
        rows.append((*head, count, *memory, f"{expected['hit_rate']:.0%}", f"{milliseconds:.1f}", speed))
    return rows


def mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def gib(size: int) -> str:
    return f"{size / GIB:,.1f}"
