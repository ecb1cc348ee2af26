"""What coding costs: error and perplexity of the tiny model by width, table, fit and format, beside llm-compressor.

    python benchmarks/quality.py BF16_DIR [--llm-compressor-python PYTHON]

BF16_DIR is what examples/tiny_moe/train.py wrote. Every variant is decoded to BF16 and judged by the same function on
the same held-out text. llm-compressor needs an environment of its own, see llm_compressor/requirements.txt; without one
its rows are left out. Writes ``benchmarks/results/quality.json``, which render.py puts into docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from synthetic_weights import KINDS
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.codec import GAIN, NORM, SEARCH, BlockCoder, CodebookName, Refinement, codebook, quantize_matrix

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "examples/tiny_moe"))
from train import encode_split, window_losses  # noqa: E402 - the tiny model's own module, beside its recipe

RESULT = HERE / "results/quality.json"
WINDOWS = 256
CALIBRATION_WINDOWS = 128
BITS = (3, 4, 5, 6)
GROUP_SIZES = (32, 64)
EMBEDDING = "*embed_tokens*"
PERPLEXITY_BAR = 0.005
"""What coding at 5 bits may cost."""
IDEAS: dict[str, Refinement] = {
    "norm": NORM,
    "gain (least-squares factor)": GAIN,
    "gain, codes chosen again once": Refinement(rounds=1),
    "gain, chosen again four times": Refinement(rounds=4),
    "twelve starts": Refinement(rounds=1, starts=SEARCH.starts),
    "twelve starts, wider ones for clipped blocks": Refinement(rounds=1, starts=SEARCH.starts, wide=SEARCH.wide),
    "ours: and padding free": SEARCH,
}


class Judge:
    """Error and perplexity of checkpoints made from one model.

    Args:
        source: the BF16 model.
        scratch: folder for decoded models.
    """

    def __init__(self, source: Path, scratch: Path) -> None:
        self.source = source
        self.scratch = scratch
        self.original = load_file(source / "model.safetensors")
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        windows = encode_split(self.tokenizer, "held-out")
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
        self.windows = windows[order][:WINDOWS]
        self.losses: dict[str, torch.Tensor] = {}

    def row(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """Name, bytes, relative mean squared errors and perplexity of a checkpoint; and how much more than BF16's."""
        decoded = checkpoint
        if checkpoint != self.source:
            decoded = self.scratch / "decoded" / checkpoint.name
            dequantize(open_source(checkpoint), decoded)
        weights = load_file(decoded / "model.safetensors")
        changed = [key for key, value in self.original.items() if not torch.equal(value, weights[key])]
        model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.bfloat16)
        self.losses[name] = window_losses(model, self.windows)
        return {
            "name": name,
            "bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
            "relative_mse": self._error(weights, changed),
            "experts_relative_mse": self._error(weights, [key for key in changed if ".experts." in key]),
            "perplexity": self.losses[name].mean().exp().item(),
            "over_bf16": self.compare(name, "BF16"),
        }

    def compare(self, name: str, other: str) -> dict[str, float]:
        """How much higher one row's perplexity is than another's, relative, with its standard error over windows."""
        difference = self.losses[name] - self.losses[other]
        return {
            "relative": difference.mean().expm1().item(),
            "standard_error": (difference.std() / len(difference) ** 0.5).item(),
        }

    def _error(self, weights: dict[str, torch.Tensor], names: list[str]) -> float:
        error = sum((weights[n].double() - self.original[n].double()).square().sum().item() for n in names)
        energy = sum(self.original[n].double().square().sum().item() for n in names)
        return error / energy if energy else 0.0


def variants(source: Path, folder: Path, llm_compressor: Path | None, windows: Path) -> dict[str, Callable[[], Path]]:
    """How to make each checkpoint, by the name of its row."""

    def hlwq(bits: int, table: CodebookName, fit: str, *keep: str) -> Callable[[], Path]:
        def make() -> Path:
            out = folder / f"q{bits}-{table}-{fit}-{len(keep)}"
            if not out.exists():
                quantize(source, out, bits, table, fit, keep=keep)
            return out

        return make

    def int4(of: Callable[[], Path], size: int, search: bool) -> Callable[[], Path]:
        def make() -> Path:
            made = of()
            out = folder / f"int4-{made.name}-{size}-{search}"
            export_int4(open_source(made), out, size, search=search)
            return out

        return make

    def other(method: str, size: int) -> Callable[[], Path]:
        def make() -> Path:
            out = folder / f"{method}-{size}"
            command = [llm_compressor, HERE / "llm_compressor/quantize.py", source, out, "--method", method]
            options = ["--group-size", str(size), "--calibration", windows]
            subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True)
            return out

        return make

    found = {"BF16": lambda: source}
    for bits in BITS:
        for table in get_args(CodebookName):
            found[f"HLWQ Q{bits}, table {table}, gain"] = hlwq(bits, table, "gain")
        found[f"HLWQ Q{bits}, ours"] = hlwq(bits, "C", "search")
    found["HLWQ Q5, ours, tied embedding in 16 bit"] = hlwq(5, "C", "search", EMBEDDING)
    for size in GROUP_SIZES:
        for origin, of in (("BF16", lambda: source), ("HLWQ Q5", hlwq(5, "C", "search"))):
            for search in (False, True):
                scales = "searched" if search else "by the largest weight"
                found[f"INT4 g{size} from {origin}, scales {scales}"] = int4(of, size, search)
        if llm_compressor is not None:
            found[f"llm-compressor INT4 g{size}, round to nearest"] = other("rtn", size)
            found[f"llm-compressor INT4 g{size}, GPTQ"] = other("gptq", size)
    return found


def synthetic() -> list[dict[str, Any]]:
    """Relative mean squared error at 5 bits of every idea on weights that are not Gaussian too."""
    coder = BlockCoder(codebook("C", 5), 128, torch.device("cpu"))
    rows = []
    for kind, make in KINDS.items():
        weight = make(torch.Generator().manual_seed(0))
        energy = weight.double().square().sum().item()
        errors = {
            idea: quantize_matrix(weight, coder, refinement, measure=True).squared_error / energy
            for idea, refinement in IDEAS.items()
        }
        rows.append({"kind": kind, "shape": list(weight.shape), "relative_mse": errors})
    return rows


def bars(judge: Judge, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do the figures hold that were set beforehand? Perplexities are compared up to two standard errors."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for name in ("HLWQ Q5, ours", "HLWQ Q5, ours, tied embedding in 16 bit"):
        cost = by_name[name]["over_bf16"]
        text = f"{name}: perplexity at most {PERPLEXITY_BAR:.1%} above BF16's"
        found.append({"bar": text, "holds": cost["relative"] <= PERPLEXITY_BAR, **cost})
    for size in GROUP_SIZES:
        ours, theirs = f"INT4 g{size} from BF16, scales searched", f"llm-compressor INT4 g{size}, round to nearest"
        if theirs not in by_name:
            continue
        error = by_name[ours]["relative_mse"] / by_name[theirs]["relative_mse"] - 1
        text = f"INT4 g{size}: error no higher than llm-compressor's round to nearest"
        found.append({"bar": text, "holds": error <= 0, "relative": error})
        cost = judge.compare(ours, theirs)
        text = f"INT4 g{size}: perplexity no higher than llm-compressor's round to nearest"
        found.append({"bar": text, "holds": cost["relative"] <= 2 * cost["standard_error"], **cost})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder written by train.py")
    parser.add_argument("--llm-compressor-python", type=Path, help="Python of an environment with llm-compressor")
    parser.add_argument("--only", default="", help="rows whose name matches this expression, printed and not written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        judge = Judge(arguments.source, folder)
        calibration = folder / "windows.safetensors"
        chosen = encode_split(judge.tokenizer, "train")[:: max(1, 13000 // CALIBRATION_WINDOWS)][:CALIBRATION_WINDOWS]
        save_file({"windows": chosen[:, :-1].contiguous()}, calibration)
        made = variants(arguments.source, folder, arguments.llm_compressor_python, calibration)
        rows = []
        for name, make in made.items():
            if re.search(arguments.only, name):
                rows.append(judge.row(name, make()))
                tqdm.write(json.dumps(rows[-1]))
        if arguments.only:
            return
        compressor = folder / "rtn-32/made_by.json"
        result = {
            "environment": environment.describe(),
            "held_out_tokens": judge.windows[:, 1:].numel(),
            "weights_sha256": json.loads((arguments.source / "training.json").read_text())["weights_sha256"],
            "llm_compressor": json.loads(compressor.read_text()) if compressor.is_file() else None,
            "rows": rows,
            "synthetic": synthetic(),
            "bars": bars(judge, rows),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for bar in result["bars"]:
        print(f"{'holds' if bar['holds'] else 'MISSED'} ({bar['relative']:+.2%}): {bar['bar']}")


if __name__ == "__main__":
    main()
