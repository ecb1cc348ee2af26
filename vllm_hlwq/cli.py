"""The ``hlwq`` command: checkpoints to HLWQ, to INT4, back to 16 bit, and what is in them; routing traces.

An error is one line on standard error and exit code 1; results go to standard output, progress to standard error.
Commands import what they use: torch and compressed-tensors take five seconds, which ``--help`` should not.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import CheckpointError, TraceError
from .marlin_shapes import SUPPORTED_GROUP_SIZES
from .plan_cli import plan_command

if TYPE_CHECKING:
    import torch

    from .codec import CodebookName

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Codebook(StrEnum):
    A = "A"
    B = "B"
    C = "C"


class Fit(StrEnum):
    norm = "norm"
    gain = "gain"
    search = "search"


class Format(StrEnum):
    compressed_tensors = "compressed-tensors"


class Scales(StrEnum):
    search = "search"
    max = "max"


Source = Annotated[Path, typer.Argument(help="Folder of the model to read.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or be empty.", show_default=False)]
BaseModel = Annotated[
    Path | None, typer.Option(help="Folder of the 16-bit model, for files that hold only what is coded.")
]
CodebookOption = Annotated[
    Codebook | None, typer.Option(help="Table of a file that stores none; detected if there are enough codes.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")]


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (CheckpointError, TraceError) as error:
            typer.echo(f"hlwq: {error}", err=True)
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            what, why = error.filename or "standard output", error.strerror or error
            typer.echo(f"hlwq: {what}: {why}; choose a place that can be read and written, with room", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            resume = "; the same command goes on where this one stopped" if "out" in kwargs else ""
            typer.echo(f"hlwq: interrupted{resume}", err=True)
            raise typer.Exit(130) from None

    return wrapped


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"--device {name}: no such device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise CheckpointError(f"--device {name}: not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def _name(codebook: Any) -> CodebookName | None:
    return None if codebook is None else codebook.value


@app.command("quantize")
@_one_line_errors
def quantize_command(
    source: Source,
    out: Out,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a code.")] = 5,
    codebook: Annotated[Codebook, typer.Option(help="Table to code with; it is stored.")] = Codebook.C,
    fit: Annotated[
        Fit,
        typer.Option(help="What a block stores: norm; gain, its least-squares factor; search, the best of several."),
    ] = Fit.search,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of parameters that stay in 16 bit, like '*embed_tokens*'; may be repeated."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Code a 16-bit model: BF16 safetensors to an HLWQ checkpoint."""
    from .checkpoint.conversion import listed, readable
    from .checkpoint.quantize import quantize

    done = quantize(source, out, bits, codebook.value, fit.value, _device(device), keep=keep or ())
    typer.echo(
        f"{out}: {len(done.coded)} parameters coded at {bits} bits, {len(done.kept)} kept; "
        f"{readable(done.original_bytes)} to {readable(done.bytes)}, "
        f"relative mean squared error {done.relative_mse:.6f}; read back and verified"
    )
    vanished = [name for name, stats in done.coded.items() if stats.relative_mse >= 1]
    if vanished:
        typer.echo(
            f"{listed(vanished)} stored as zeros, the blocks' norms being below what float16 holds; "
            f"--keep '{vanished[0]}' leaves it in 16 bit"
        )


@app.command("export")
@_one_line_errors
def export_command(
    source: Source,
    out: Out,
    format: Annotated[Format, typer.Option(help="Format to write.")] = Format.compressed_tensors,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; by default the largest the shapes admit.")
    ] = None,
    scales: Annotated[
        Scales, typer.Option(help="search: best of several scales by squared error; max: by the largest weight.")
    ] = Scales.search,
    linears: Annotated[
        bool, typer.Option("--linears", help="Also make linear layers outside the experts INT4, where Marlin can.")
    ] = False,
    base_model: BaseModel = None,
    codebook: CodebookOption = None,
    device: Device = "cpu",
) -> None:
    """Make the INT4 sibling that vLLM serves, from an HLWQ or a 16-bit model."""
    from .checkpoint.dequantize import open_source
    from .checkpoint.export import export_int4
    from .checkpoint.export_plan import GroupSize

    if group_size is not None and group_size not in SUPPORTED_GROUP_SIZES:
        sizes = ", ".join(str(size) for size in SUPPORTED_GROUP_SIZES if size)
        raise CheckpointError(f"--group-size {group_size}: Marlin takes {sizes}; choose one of them")
    where = _device(device)
    wanted: GroupSize = "auto" if group_size is None else group_size
    opened = open_source(source, base_model, _name(codebook), where)
    plan = export_int4(opened, out, wanted, search=scales is Scales.search, linears=linears, device=where)
    count = sum(len(matrices) for matrices in plan.matrices.values())
    typer.echo(f"{out}: {count} matrices in INT4, group size {plan.group_size}; read back and verified")
    typer.echo(f"Serve it: vllm serve {out} --moe-expert-cache-size 4")


@app.command("dequantize")
@_one_line_errors
def dequantize_command(
    source: Source, out: Out, base_model: BaseModel = None, codebook: CodebookOption = None, device: Device = "cpu"
) -> None:
    """Write the 16-bit model that an HLWQ or INT4 checkpoint stands for."""
    from .checkpoint.conversion import listed
    from .checkpoint.dequantize import dequantize, open_source
    from .checkpoint.reader import HlwqSource

    opened = open_source(source, base_model, _name(codebook), _device(device))
    missing = dequantize(opened, out)
    decoded = (
        f"{len(opened.matrices)} parameters decoded (codebook {opened.table_origin})"
        if isinstance(opened, HlwqSource)
        else f"{len(opened.parameters)} parameters, decoded from INT4"
    )
    typer.echo(f"{out}: {decoded}; read back and verified")
    if missing:
        typer.echo(
            f"hlwq: {out} is partial: {listed(missing)} not in {source}; give --base-model for a whole model", err=True
        )


@app.command("inspect")
@_one_line_errors
def inspect_command(
    path: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    base_model: BaseModel = None,
    codebook: CodebookOption = None,
) -> None:
    """Say what is in a checkpoint, layer by layer."""
    from .checkpoint.conversion import readable
    from .checkpoint.inspect import by_layer, inspect

    found = inspect(path, base_model, _name(codebook))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(title=f"{path} ({found['format']})", title_justify="left")
    for heading, side in (("parameter", "left"), ("shape", "left"), ("stored", "left"), ("size", "right")):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in by_layer(found["parameters"]):
        count = f"{row['count']} x " if row["count"] > 1 else ""
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        table.add_row(row["name"], count + shape, row["stored"], readable(row["bytes"]))
    console = Console(markup=False)
    console.print(table)
    for key in ("bits", "block_size", "codebook", "group_size"):
        if key in found:
            console.print(f"{key.replace('_', ' ')}: {found[key]}", highlight=False)
    ratio = found["bytes_in_16_bit"] / max(found["bytes"], 1)
    sizes = f"{readable(found['bytes'])}, {readable(found['bytes_in_16_bit'])} in 16 bit, ratio {ratio:.2f}"
    console.print(f"size: {sizes}", highlight=False)
    if found.get("missing"):
        console.print(f"not in it: {', '.join(found['missing'][:3])} ... ({len(found['missing'])}); needs a base model")


@app.command("verify")
@_one_line_errors
def verify_command(
    path: Source,
    reference: Annotated[Path | None, typer.Option(help="The 16-bit model it was made from.")] = None,
    base_model: BaseModel = None,
    codebook: CodebookOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a checkpoint's files, sums, shapes and completeness, and its error against the original."""
    from .checkpoint.conversion import readable
    from .checkpoint.verify import verify

    report = verify(path, reference, base_model, _name(codebook))
    if as_json:
        typer.echo(json.dumps(report.json(), indent=2))
        return
    sums = "SHA-256 sums agree" if report.hashes_checked else "no list of SHA-256 sums to hold it to"
    typer.echo(f"{path}: whole ({report.format}, {report.tensors} tensors, {readable(report.bytes)}); {sums}")
    if report.reference is not None:
        typer.echo(
            f"against {report.reference}: relative mean squared error {report.relative_mse:.6f} over "
            f"{len(report.errors)} parameters, {report.identical} are identical"
        )
        worst = sorted(report.errors.items(), key=lambda item: -item[1])[:5]
        for name, error in worst:
            typer.echo(f"  {error:.6f}  {name}")


@app.command("card")
@_one_line_errors
def card_command(
    path: Source,
    original: Annotated[
        list[str] | None,
        typer.Option(help="The 16-bit model: its folder, its name on the Hugging Face hub, or both in turn."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a README.md that was not written by this.")] = False,
) -> None:
    """Write a Hugging Face model card and its charts into a coded checkpoint's folder."""
    from .checkpoint.card import write_card

    for file in write_card(path, original or [], force):
        typer.echo(str(file))


@app.command("simulate")
@_one_line_errors
def simulate_command(
    trace: Annotated[Path, typer.Argument(help="File that --moe-expert-trace recorded.", show_default=False)],
    slots: Annotated[
        str, typer.Option(help="Experts resident in each layer, as many as are to be tried, fewer than it has: 2,4,8.")
    ],
    link: Annotated[
        str | None, typer.Option(help="Rate from host memory to the GPU, like 25GB/s, to predict tokens per second.")
    ] = None,
    step_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --link: milliseconds of a decode step with every expert resident; 0 by default.",
            show_default=False,
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to write charts to, as PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what caches of other sizes would have done with recorded routing: hits, bytes, tokens per second."""
    from .quantities import parse_rate
    from .simulate import parse_slots, replay, report
    from .trace import Trace

    if step_ms is not None and link is None:
        raise TraceError(f"--step-ms {step_ms:g}: for a prediction, which needs a rate too; add --link 25GB/s, say")
    if step_ms is not None and not math.isfinite(step_ms):
        raise TraceError(f"--step-ms {step_ms}: no time; give milliseconds, like 12.5")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise TraceError(f"--plots {plots}: is no folder; give another, which may be one to make")
    rate = None if link is None else parse_rate(link, "--link")
    recorded = Trace.load(trace)
    replays = replay(recorded, parse_slots(slots))
    found = report(recorded, replays, rate, (step_ms or 0) / 1000)
    if plots is not None:
        from .simulate_charts import write_charts

        for file in write_charts(found, plots):
            typer.echo(str(file), err=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from .simulate_report import print_report

    print_report(found, replays)


app.command("plan")(_one_line_errors(plan_command))


def main() -> None:
    if sys.stderr is None:  # closed: progress and errors have nowhere to go, but tqdm would fail
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    app()
