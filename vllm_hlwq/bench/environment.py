"""What a result file says about the machine and the software that made it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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
        **{name: version(name) for name in ("vllm", "torch", "transformers", "compressed-tensors", "vllm-hlwq")},
    }
