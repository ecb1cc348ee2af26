"""What a result file says about the machine and the software that made it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("vllm", "torch", "triton", "transformers", "compressed-tensors", "vllm-hlwq")
NVIDIA_SMI_FIELDS = {
    "gpu": "name",
    "driver": "driver_version",
    "gpu_memory_mib": "memory.total",
    # The link of an idle GPU sleeps at a lower generation, so what it can do is asked for, not what it does.
    "pcie_generation": "pcie.link.gen.max",
    "pcie_width": "pcie.link.width.max",
}


def describe() -> dict[str, Any]:
    """Processor, memory, Python and the versions that matter, as JSON values; with CUDA also the GPU and its link."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line.count(":") == 1)
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": fields.get("model name\t", platform.machine()).strip(),
        "cores": torch.get_num_threads(),
        "available_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **(describe_gpu() if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str:
    """Version of a package; kernels are also measured on machines without vLLM."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_gpu() -> dict[str, Any]:
    """The current CUDA device as ``nvidia-smi`` sees it, with its compute capability and torch's CUDA version."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "-i", f"GPU-{properties.uuid}", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS.values())}"]
    try:
        done = subprocess.run([*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30)
        found = parse_nvidia_smi(done.stdout) if done.returncode == 0 else {"nvidia_smi": done.stdout.strip()[:200]}
    except (OSError, subprocess.TimeoutExpired) as error:
        found = {"nvidia_smi": str(error)}
    return found | {"compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}


def parse_nvidia_smi(line: str) -> dict[str, Any]:
    """Values of ``NVIDIA_SMI_FIELDS`` out of a line of comma-separated values; whole numbers become numbers."""
    values = [value.strip() for value in line.strip().splitlines()[0].split(",")]
    return {
        name: int(value) if value.isdecimal() else value for name, value in zip(NVIDIA_SMI_FIELDS, values, strict=True)
    }
