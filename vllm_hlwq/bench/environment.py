"""What a result file says about the machine and the software that made it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vllm", "torch", "triton", "transformers", "compressed-tensors", "vllm-hlwq")


def describe() -> dict[str, Any]:
    """Processor, memory, Python and the versions that matter, as JSON values."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line.count(":") == 1)
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": fields.get("model name\t", platform.machine()).strip(),
        "cores": torch.get_num_threads(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str:
    """Version of a package; kernels are also measured on machines without vLLM."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
