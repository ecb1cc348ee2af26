"""What two starts of a server read from disk and how long loading takes, with ``--moe-expert-store-cache``.

    python benchmarks/start_up.py [--shape qwen3-30b-a3b --layers 4] [--folder FOLDER] [--out FILE.json]

Makes a random INT4 checkpoint in a real model's shape. Before each start its files and the kept ones are dropped from
the page cache; afterwards ``mincore`` tells which of their bytes have been read. The first start keeps the experts, the
second reads them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from make_checkpoint import SHAPES, make_checkpoint

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.server import Server
from vllm_hlwq.checkpoint_sizes import is_of_experts

RESULT = Path(__file__).resolve().parent / "results/start_up.json"
PAGE = mmap.PAGESIZE


def drop(folder: Path) -> None:
    """Let the kernel forget what it holds of a folder's files."""
    for file in files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def pages_read(file: Path) -> bytes:
    """For each page of a file 1 if it is in the page cache."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_SHARED) as mapped:
        flags = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        handle = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(handle))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(len(mapped)), flags)
        del handle
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return bytes(flag & 1 for flag in flags)


def checkpoint_bytes(model: Path) -> tuple[Counter[str], Counter[str]]:
    """Bytes of a checkpoint's tensors, and those of them that were read, of experts and of all else."""
    have: Counter[str] = Counter()
    read: Counter[str] = Counter()
    for file in model.glob("*.safetensors"):
        pages = pages_read(file)
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = (8 + length + offset for offset in tensor["data_offsets"])
            kind = "experts" if is_of_experts(name) else "others"
            have[kind] += end - start
            whole = pages[-(-start // PAGE) : end // PAGE]
            read[kind] += sum(whole) * PAGE + (end - start - len(whole) * PAGE) * pages[start // PAGE]
    return have, read


def start(model: Path, kept: Path) -> dict[str, Any]:
    """Start a server and end it: seconds and bytes."""
    for folder in (model, kept):
        drop(folder)
    before = checkpoint_bytes(model)[1]
    arguments = ("--moe-expert-cache-size", "16", "--moe-expert-store-cache", str(kept), "--enforce-eager")
    with Server(model, *arguments, "--max-model-len", "512", "--max-num-seqs", "2") as server:
        log = server.log
    have, read = checkpoint_bytes(model)
    line = re.search(r"Expert store cache: (\d+) of (\d+) layers read .* \((\d+) bytes, ([\d.]+) s\), (\d+) saved", log)
    loading = re.search(r"Model loading took .*? ([\d.]+) seconds|Loading weights took ([\d.]+) seconds", log)
    assert line is not None
    return {
        "layers_restored": int(line[1]),
        "layers": int(line[2]),
        "kept_bytes_read": int(line[3]),
        "kept_seconds": float(line[4]),
        "layers_saved": int(line[5]),
        "checkpoint_experts_bytes": have["experts"],
        "checkpoint_experts_read": read["experts"],
        "checkpoint_others_bytes": have["others"],
        "checkpoint_others_read": read["others"],
        "in_cache_before": sum(before.values()),
        "loading_seconds": None if loading is None else float(loading[1] or loading[2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the files go for the time being (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model, kept = Path(scratch) / "model", Path(scratch) / "kept"
        make_checkpoint(options.shape, model, options.layers)
        kept.mkdir()
        rows = [start(model, kept) for _ in range(2)]
        sizes = sum(file.stat().st_size for file in files(kept))
    result = {
        "shape": options.shape,
        "layers": options.layers,
        "kept_bytes": sizes,
        "first": rows[0],
        "second": rows[1],
        "environment": environment.describe(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
