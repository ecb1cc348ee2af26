"""HLWQ on a GPU: conversion, products with coded weights, direct serving, the KV cache.

    python benchmarks/hlwq_gpu.py --out FILE.json [--parts convert linear load cache]

convert     ``hlwq quantize``, ``export`` and ``dequantize`` with ``--device cuda`` of a random model in the shape of
            Gemma-4-26B-A4B, thinned to fewer layers; beside them the codec alone, and hashing and writing alone
linear      a layer of 4096 x 4096 from codes against BF16's product, by kernels' times in replayed graphs
load        starts of vLLM on an HLWQ checkpoint and on its INT4 sibling
cache       bytes and time a step of the 3-bit KV cache beside BF16's, and its values beside the CPU's

The result is written after every step, and a part that is not measured is kept. Without CUDA only ``convert`` runs, on
the CPU. Exit code 1: a limit was missed, or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hlwq_linear
import torch
from hlwq_convert import measure_convert
from make_checkpoint import SHAPES

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.quantize import FITS

PARTS = ("convert", "linear", "load", "cache")
NO_CUDA = "needs a CUDA device, this machine has none"
SERVER = (
    "--attention-backend", "TRITON_ATTN", "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(2**28),
)  # fmt: skip
"""Of vLLM, as the GPU tests have it; FlashInfer need not be installed."""
CACHE_STEPS = 24


class Result:
    """A JSON file that is written anew after every step.

    Args:
        path: the file; parts that it holds already stay until they are measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(self, part: str, found: dict[str, Any]) -> None:
        self.content[part] = {"environment": environment.describe(), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")


def measure_linear() -> dict[str, Any]:
    """``hlwq_linear.py``'s products, and the rotation of one token alone."""
    found = hlwq_linear.measure_linear()
    return found | {"rotation_us": round(hlwq_linear.rotation_seconds() * 1e6, 2)}


def measure_load(layers: int, repeats: int) -> dict[str, Any]:
    """``hlwq_load.py`` in a process of its own: it must not find this one on the GPU."""
    with tempfile.TemporaryDirectory(prefix="hlwq-gpu-") as folder:
        out = Path(folder) / "load.json"
        command = [sys.executable, str(Path(__file__).with_name("hlwq_load.py")), "--out", str(out)]
        done = subprocess.run(
            [*command, "--layers", str(layers), "--repeats", str(repeats), "--", *SERVER],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"},
        )  # fmt: skip
        if not out.exists():
            print(done.stdout[-8000:], file=sys.stderr)
            raise RuntimeError(f"hlwq_load.py ended with code {done.returncode}; the end of its output is above")
        found: dict[str, Any] = json.loads(out.read_text())
        return found | {"missed": [line for line in done.stdout.splitlines() if line.startswith("missed: ")]}


def measure_cache(device: torch.device, steps: int = CACHE_STEPS) -> dict[str, Any]:
    """A step of two models after 4,096 tokens by cache, in turn, bytes, and codes and values beside the CPU's."""
    from kv_cache import SPEED_LENGTH, dense, fill, gemma_slice, held
    from transformers import AutoModelForCausalLM, DynamicCache

    from vllm_hlwq.kv_cache import HLWQCache

    rows = []
    for name, config in (("dense", dense()), ("six layers of Gemma-4-26B", gemma_slice())):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(device)
        caches = {"BF16": DynamicCache(config=config), "HLWQ 3 bit": HLWQCache(config, bits=3)}
        seconds: dict[str, list[float]] = {cache: [] for cache in caches}
        # What attention may prepare for a length, a cache does not pay for because it comes first.
        before = DynamicCache(config=config)
        for own in (before, *caches.values()):
            fill(own, config, SPEED_LENGTH, device)
        sizes = {cache: held(own) for cache, own in caches.items()}
        token = torch.ones(1, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            for _ in range(steps):
                model(token, past_key_values=before)
            for _ in range(steps):
                for cache, own in caches.items():
                    finish(device)
                    start = time.perf_counter()
                    model(token, past_key_values=own)
                    finish(device)
                    seconds[cache].append(time.perf_counter() - start)
        for cache, times in seconds.items():
            rows.append({"model": name, "cache": cache, "bytes": sizes[cache], "ms": 1000 * statistics.median(times)})
        del model, caches, before
    return {"length": SPEED_LENGTH, "steps": steps, "rows": rows, "values": compare_with_cpu(device)}


def finish(device: torch.device) -> None:
    """Wait for what a device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_with_cpu(other: torch.device, tokens: int = 4096, heads: int = 4, head_dim: int = 256) -> dict[str, float]:
    """Codes of the same vectors on the CPU and another device, and the values that one device's codes have on both.

    Returns:
        ``codes_differing``, a share, and ``largest_difference`` of values in units of what rounding allows: twice
        ``n sqrt(n) 2^-24`` of the largest norm, as in ``tests/test_codec_gpu.py``.
    """
    from vllm_hlwq.codec import unpack
    from vllm_hlwq.kv_cache.coded_vectors import CodedVectors, VectorCoder

    vectors = torch.randn(1, heads, tokens, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    stores = []
    for device in (torch.device("cpu"), other):
        store = CodedVectors(VectorCoder(head_dim, 3, device), 1, heads)
        store.append(vectors.to(device))
        stores.append(store)
    here, there = stores
    count = tokens * heads * head_dim
    codes = [unpack(store.codes[:tokens].cpu().reshape(-1), count, 3) for store in stores]
    values = [torch.empty(1, heads, tokens, head_dim, device=store.codes.device) for store in stores]
    there.decode(tokens, values[1])
    here.codes[:tokens].copy_(there.codes[:tokens])
    here.norms[:tokens].copy_(there.norms[:tokens])
    here.decode(tokens, values[0])
    allowed = 2 * head_dim**1.5 * 2.0**-24 * float(here.norms[:tokens].max())
    return {
        "codes_differing": float((codes[0] != codes[1]).float().mean()),
        "largest_difference": float((values[0] - values[1].cpu()).abs().max()) / allowed,
    }


def described(error: BaseException, frames: int = 4) -> str:
    """Kind and message of an error, and the last places on the way to it, the innermost last."""
    places = traceback.extract_tb(error.__traceback__)[-frames:]
    return f"{type(error).__name__}: {error}" + "".join(f"\n  {place.filename}:{place.lineno}" for place in places)


def misses(content: dict[str, Any]) -> list[str]:
    """The limits that a result does not keep."""
    found = hlwq_linear.misses({"linear": content["linear"]}) if "linear" in content else []
    found += [line.removeprefix("missed: ") for line in content.get("load", {}).get("missed", ())]
    values = content.get("cache", {}).get("values")
    if values and (values["codes_differing"] >= 1e-4 or values["largest_difference"] > 1):
        found.append(f"the KV cache differs from the CPU's beyond rounding: {values}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result, JSON; a part that is not measured is kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gemma-4-26b-a4b", help="of convert's model")
    parser.add_argument("--layers", type=int, help="of convert's model (default: as many as make 15 GiB)")
    parser.add_argument("--fits", nargs="+", choices=list(FITS), default=list(FITS), help="of quantising, in order")
    parser.add_argument("--scratch", type=Path, help="where convert makes its folder; /dev/shm leaves the disk out")
    parser.add_argument("--load-layers", type=int, default=12, help="of load's model; 12 make 2.25 GiB of experts")
    parser.add_argument("--repeats", type=int, default=2, help="starts of each of load's servers")
    arguments = parser.parse_args()
    result = Result(arguments.out)
    cuda = torch.cuda.is_available()

    def convert() -> None:
        device = torch.device("cuda" if cuda else "cpu")
        with tempfile.TemporaryDirectory(prefix="hlwq-gpu-", dir=arguments.scratch) as folder:
            measure_convert(
                device, arguments.shape, arguments.layers, arguments.fits, Path(folder),
                lambda found: result.save("convert", found),
            )  # fmt: skip

    work: dict[str, Callable[[], None]] = {
        "convert": convert,
        "linear": lambda: result.save("linear", measure_linear()),
        "load": lambda: result.save("load", measure_load(arguments.load_layers, arguments.repeats)),
        "cache": lambda: result.save("cache", measure_cache(torch.device("cuda"))),
    }
    failed = False
    for part in arguments.parts:
        if part != "convert" and not cuda:
            print(f"{part}: not measured, {NO_CUDA}")
            continue
        start = time.monotonic()
        try:
            work[part]()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            failed = True
            print(f"{part}: failed, {described(error)}", file=sys.stderr)
        else:
            print(f"{part}: {time.monotonic() - start:.0f} s")
    measured = {part: found for part, found in result.content.items() if part in arguments.parts}
    print(json.dumps(measured, indent=2))
    missed = misses(measured)
    for miss in missed:
        print(f"missed: {miss}")
    return int(failed or bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
