"""Turn the trained BF16 model into the HLWQ checkpoint that ships, and judge it and its INT4 sibling on held-out text.

    python examples/tiny_moe/quantize.py BF16_DIR

Writes ``examples/tiny_moe/model`` (5-bit weights, configuration, tokenizer, chat template, training log) and
``benchmarks/results/tiny_moe.json`` (perplexities, a sample, sizes, environment).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from train import encode_split, perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize

PROJECT = Path(__file__).resolve().parent.parent.parent
MODEL = Path(__file__).resolve().parent / "model"
RESULT = PROJECT / "benchmarks/results/tiny_moe.json"
WINDOWS = 256
KEPT = ("*embed_tokens*",)
"""Left in 16 bit: this model's embedding is its output head too, and coding it would cost as much as all the rest."""
PROMPT = "The for statement is used to iterate over"


def load(checkpoint: Path, scratch: Path) -> PreTrainedModel:
    """The BF16 model that a coded checkpoint stands for."""
    dequantize(open_source(checkpoint), scratch)
    return AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder written by train.py")
    source: Path = parser.parse_args().source

    if MODEL.exists():
        shutil.rmtree(MODEL)
    coded = quantize(source, MODEL, keep=KEPT)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = encode_split(tokenizer, "held-out")
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))][:WINDOWS]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        hlwq = load(MODEL, Path(scratch) / "hlwq")
        plan = export_int4(open_source(MODEL), Path(scratch) / "CT")
        int4 = load(Path(scratch) / "CT", Path(scratch) / "int4")
        int4_bytes = (Path(scratch) / "CT/model.safetensors").stat().st_size
    set_seed(7)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    generated = int4.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.6)
    result = {
        "environment": environment.describe(),
        "held_out_windows": len(windows),
        "held_out_tokens": windows[:, 1:].numel(),
        "perplexity_bf16": round(perplexity(original, windows), 3),
        "perplexity_hlwq": round(perplexity(hlwq, windows), 3),
        "perplexity_int4": round(perplexity(int4, windows), 3),
        "bits": coded.bits,
        "kept": list(KEPT),
        "group_size": plan.group_size,
        "hlwq_bytes": (MODEL / "model.safetensors").stat().st_size,
        "int4_bytes": int4_bytes,
        "prompt": PROMPT,
        "sample": tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True),
        "training": json.loads((MODEL / "training.json").read_text()),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("environment", "training")}, indent=2))


if __name__ == "__main__":
    main()
