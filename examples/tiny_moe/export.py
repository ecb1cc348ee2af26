"""Turn the trained BF16 model into the INT4 checkpoint that ships, and judge both on the held-out text.

    python examples/tiny_moe/export.py BF16_DIR

Writes ``examples/tiny_moe/model`` (weights, configuration, tokenizer, chat template, training log) and
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
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.int4_checkpoint import dequantize_int4

PROJECT = Path(__file__).resolve().parent.parent.parent
MODEL = Path(__file__).resolve().parent / "model"
RESULT = PROJECT / "benchmarks/results/tiny_moe.json"
GROUP_SIZE = 32
WINDOWS = 256
PROMPT = "The for statement is used to iterate over"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder written by train.py")
    source: Path = parser.parse_args().source

    if MODEL.exists():
        shutil.rmtree(MODEL)
    export_int4(source, MODEL, GROUP_SIZE)
    shutil.copyfile(source / "training.json", MODEL / "training.json")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows = encode_split(tokenizer, "held-out")
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))][:WINDOWS]
    with tempfile.TemporaryDirectory() as scratch:
        dequantize_int4(MODEL, Path(scratch))
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16)
    set_seed(7)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.6)
    result = {
        "environment": environment.describe(),
        "held_out_windows": len(windows),
        "held_out_tokens": windows[:, 1:].numel(),
        "perplexity_bf16": round(perplexity(original, windows), 2),
        "perplexity_int4": round(perplexity(model, windows), 2),
        "group_size": GROUP_SIZE,
        "weights_bytes": (MODEL / "model.safetensors").stat().st_size,
        "prompt": PROMPT,
        "sample": tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True),
        "training": json.loads((MODEL / "training.json").read_text()),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("perplexity_bf16", "perplexity_int4", "sample")}, indent=2))


if __name__ == "__main__":
    main()
