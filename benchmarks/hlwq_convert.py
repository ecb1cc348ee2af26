"""The conversions of a large random model, timed as a user runs them, and beside them what they are made of.

A part of ``hlwq_gpu.py``. The model has the names and shapes of a real one, thinned to fewer layers, and BF16 weights
in quantiles of a normal distribution. It is written just before, so what is read is in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import ONE, SHAPES, ShapeSource

from vllm_hlwq.bench.memory import run_and_watch
from vllm_hlwq.checkpoint.conversion import plain_group
from vllm_hlwq.checkpoint.quantize import FITS
from vllm_hlwq.checkpoint.shard import Group, shard_index, shard_layout, shard_name, shards_of
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.checkpoint.writer import INDEX, write_json
from vllm_hlwq.codec import BlockCoder, codebook, dequantize_matrix, quantize_matrix

PROJECT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 512 * 2**20
DEVIATION = 0.02
CHUNK = 2**20
DEFAULT_LAYERS = {"gemma-4-26b-a4b": 9}
"""15.1 GiB of weights; with all that is made of them at most 40 GiB lie on the disk at once."""
PROGRAM = """
import json, sys, time
sys.path.insert(0, sys.argv.pop(1))
out = sys.argv.pop(1)
import torch, vllm_hlwq.checkpoint.export, vllm_hlwq.checkpoint.quantize
from vllm_hlwq.cli import app
start = time.perf_counter()
try:
    app()
finally:
    found = {"seconds": time.perf_counter() - start}
    if torch.cuda.is_initialized():
        found["gpu_peak_bytes"] = torch.cuda.max_memory_reserved()
    json.dump(found, open(out, "w"))
"""
"""The ``hlwq`` command, which also says how long it took without the imports, and what torch held of the GPU."""


def quantiles() -> np.ndarray:
    """BF16 bits ``[65536]`` of a normal distribution's quantiles, one for each random 16-bit number."""
    share = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return (torch.special.ndtri(share) * DEVIATION).bfloat16().view(torch.int16).numpy().view(np.uint16)


def normal_shard(path: Path, groups: list[Group], seed: list[int]) -> None:
    """Write one safetensors file of BF16 tensors out of one buffer: vectors are ones, all else is normal."""
    plans = [plan for group in groups for plan in group.tensors]
    head, offsets, size = shard_layout(plans)
    data = np.empty(size - len(head), np.uint8)
    random, table = np.random.Generator(np.random.SFC64(seed)), quantiles()
    for plan in plans:
        begin = offsets[plan.name] - len(head)
        bits = data[begin : begin + plan.bytes].view(np.uint16)
        if len(plan.shape) < 2:
            bits[:] = ONE
            continue
        for start in range(0, len(bits), CHUNK):
            part = bits[start : start + CHUNK]
            words = random.integers(0, 2**64, -(-len(part) // 4), dtype=np.uint64)
            part[:] = table[words.view(np.uint16)[: len(part)]]
    with path.open("wb") as file:
        file.write(head)
        file.write(data)


def make_source(shape: str, layers: int | None, out: Path) -> int:
    """Write a BF16 model; return its bytes of weights."""
    source = ShapeSource(SHAPES[shape](layers), out)
    groups = [plain_group(source, name) for name in source.parameters]
    shards = shards_of(groups, SHARD_BYTES)
    out.mkdir(parents=True)
    with ThreadPoolExecutor(min(len(shards), len(os.sched_getaffinity(0)))) as pool:
        names = [shard_name(number, len(shards)) for number in range(len(shards))]
        written = [
            pool.submit(normal_shard, out / name, shard, [0, number])
            for number, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        for each in written:
            each.result()
    write_json(out / "config.json", source.config())
    if len(shards) > 1:
        (out / INDEX).write_text(json.dumps(shard_index(shards)))
    return sum(group.bytes for group in groups)


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def timed_command(scratch: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run ``hlwq`` in a process of its own: seconds with and without imports, peaks of memory in bytes.

    Raises:
        RuntimeError: it failed; what it said is on standard error.
    """
    told = scratch / "told.json"
    command = [sys.executable, "-c", PROGRAM, str(PROJECT), str(told), *map(str, arguments)]
    try:
        peak, wall = run_and_watch(command)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"hlwq {' '.join(map(str, arguments))} ended with code {error.returncode}") from None
    found = json.loads(told.read_text())
    return {"seconds": round(found["seconds"], 3), "wall_seconds": round(wall, 3), "host_peak_bytes": peak,
            "gpu_peak_bytes": found.get("gpu_peak_bytes")}  # fmt: skip


def with_rates(row: dict[str, Any], weights: int, read: int, written: int) -> dict[str, Any]:
    """A command's row with what it converted: weights a second, and GB a second of the files that it read."""
    seconds = row["seconds"]
    return {**row, "weights": weights, "read_bytes": read, "written_bytes": written,
            "weights_per_second": weights / seconds, "read_gb_per_second": read / seconds / 1e9}  # fmt: skip


def int4_weights(folder: Path) -> int:
    """Weights of an INT4 checkpoint's packed matrices: eight in an int32."""
    return sum(8 * math.prod(info.shape) for name, info in TensorFolder(folder).items() if name.endswith("_packed"))


def measure_commands(
    source: Path, scratch: Path, device: str, fits: list[str], done: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Quantise by each fit, then export and decode what the last one made; ``done`` is told all rows after each."""
    rows: list[dict[str, Any]] = []
    coded, out = scratch / "hlwq", scratch / "out"
    for fit in fits:
        shutil.rmtree(coded, ignore_errors=True)
        row = timed_command(scratch, "quantize", source, coded, "--fit", fit, "--device", device)
        told = json.loads((coded / "hlwq_config.json").read_text())
        weights = sum(math.prod(each["shape"]) for each in told["coded"].values())
        row |= {"command": "quantize", "fit": fit, "relative_mse": told["relative_mse"]}
        rows.append(with_rates(row, weights, weights_bytes(source), weights_bytes(coded)))
        done(rows)
    for command in ("export", "dequantize"):
        row = timed_command(scratch, command, coded, out, "--device", device)
        converted = int4_weights(out) if command == "export" else weights
        row |= {"command": command, "fit": None, "relative_mse": None}
        rows.append(with_rates(row, converted, weights_bytes(coded), weights_bytes(out)))
        shutil.rmtree(out)
        done(rows)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call after two; on CUDA by events, launches and waits of the host included."""
    if device.type == "cuda":
        from vllm_hlwq.bench.cuda_timing import seconds_per_call

        return seconds_per_call(lambda _: call(), 1, repeats, graph=False)  # type: ignore[arg-type, return-value]
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def measure_codec(device: torch.device, side: int, expert: tuple[int, int], repeats: int = 9) -> list[dict[str, Any]]:
    """The codec alone: a BF16 matrix of ``side`` squared on the device, and an expert's that comes from host memory.

    Decoding gives BF16, where the codes are.
    """
    coder = BlockCoder(codebook("C", 5), 128, device)
    rows = []
    for shape, where in (((side, side), device), (expert, torch.device("cpu"))):
        weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * DEVIATION).bfloat16().to(where)
        coded = quantize_matrix(weight, coder, FITS["gain"])
        tasks: dict[str, Callable[[], object]] = {
            f"quantise, {name}": lambda fit=fit, weight=weight: quantize_matrix(weight, coder, fit, measure=True)  # type: ignore[misc]
            for name, fit in FITS.items()
        }
        tasks["dequantise"] = lambda coded=coded: dequantize_matrix(coded, coder)  # type: ignore[misc]
        for what, task in tasks.items():
            seconds = seconds_of(task, device, repeats)
            rows.append({"what": what, "rows": shape[0], "columns": shape[1], "weights_on": where.type,
                         "seconds": seconds, "weights_per_second": weight.numel() / seconds})  # fmt: skip
    return rows


def measure_machine(device: torch.device, scratch: Path, size: int) -> dict[str, float]:
    """What else a conversion does with its bytes, on one thread, in GB/s: hash, write to the disk, copy to the GPU."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    view = data.numpy().data
    file = scratch / "written"

    def write() -> None:
        with file.open("wb") as stream:
            stream.write(view)
            stream.flush()
            os.fsync(stream.fileno())
        file.unlink()

    cpu = torch.device("cpu")
    found = {
        "sha256": seconds_of(lambda: hashlib.sha256(view).digest(), cpu, 3),
        "write_and_sync": seconds_of(write, cpu, 3),
    }
    if device.type == "cuda":
        found["host_to_device"] = seconds_of(lambda: data.to(device), device, 5)
    return {f"{name}_gb_per_second": size / seconds / 1e9 for name, seconds in found.items()}


def measure_convert(
    device: torch.device,
    shape: str,
    layers: int | None,
    fits: list[str],
    scratch: Path,
    save: Callable[[dict[str, Any]], None],
    side: int = 4096,
    machine_bytes: int = 2**28,
) -> None:
    """All of it; ``save`` is given the result so far after each step.

    Args:
        device: where to convert.
        shape: a key of ``SHAPES``.
        layers: of the model; None for the default.
        fits: what is tried in quantising, in order.
        scratch: empty folder for the model and what is made of it.
        save: takes the result.
        side: of the codec's matrix.
        machine_bytes: hashed, written and copied.
    """
    config = SHAPES[shape](layers or DEFAULT_LAYERS.get(shape))
    result: dict[str, Any] = {
        "shape": shape, "layers": config.num_hidden_layers, "of_layers": SHAPES[shape](None).num_hidden_layers,
        "device": device.type, "page_cache": "written just before, so warm",
        "codec": measure_codec(device, side, (2 * config.moe_intermediate_size, config.hidden_size)),
    }  # fmt: skip
    save(result)
    result["machine"] = measure_machine(device, scratch, machine_bytes)
    start = time.perf_counter()
    result["source_bytes"] = make_source(shape, config.num_hidden_layers, scratch / "source")
    result["source_seconds"] = round(time.perf_counter() - start, 2)
    save(result)

    def done(rows: list[dict[str, Any]]) -> None:
        save(result | {"commands": list(rows)})

    measure_commands(scratch / "source", scratch, device.type, fits, done)
