"""Quantise a model's experts to INT4 with llm-compressor; ``benchmarks/quality.py`` runs it in its own environment.

    python benchmarks/llm_compressor/quantize.py MODEL OUT --method gptq --group-size 64 --calibration WINDOWS

Only experts are quantised, as by ``hlwq export``. llm-compressor quantises linear layers and not the 3-D expert
parameters of transformers; it un-fuses those itself, into three linear layers an expert, before it begins.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

EXPERTS = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"
METHODS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}
BATCH = 8


def calibration(path: Path) -> DataLoader[dict[str, torch.Tensor]]:
    """Batches of token windows int64 ``[count, tokens]``, stored in a safetensors file under ``windows``."""
    windows = load_file(path)["windows"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(BATCH)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the BF16 model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--method", choices=METHODS, required=True, help="round to nearest, or GPTQ")
    parser.add_argument("--group-size", type=int, required=True, help="inputs that share a scale")
    parser.add_argument("--calibration", type=Path, required=True, help="token windows, used by GPTQ")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=arguments.group_size
    )
    scheme = QuantizationScheme(targets=[EXPERTS], weights=weights)
    recipe = METHODS[arguments.method](config_groups={"group_0": scheme})
    data = calibration(arguments.calibration) if arguments.method == "gptq" else None
    oneshot(model=model, recipe=recipe, dataset=data)
    quantised = [name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")]
    model.save_pretrained(arguments.out, save_compressed=True)
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    (arguments.out / "made_by.json").write_text(json.dumps({"quantised": len(quantised), "versions": versions}))
    print(f"{len(quantised)} matrices in INT4 by {arguments.method}, group size {arguments.group_size}")


if __name__ == "__main__":
    main()
