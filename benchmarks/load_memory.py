"""How much host memory a server with the expert cache takes while it loads and afterwards, in units of its experts.

    python benchmarks/load_memory.py [--out FILE.json]

Generates a Qwen3-MoE-shaped INT4 checkpoint with random experts of at least 2 GiB and one with tiny experts, serves
both, and compares. Memory is the proportional set size (PSS). The peak is that of the process that loads the experts,
until they are in place (vLLM takes the KV cache later), outside mapped files, which the kernel may drop at any time.
Afterwards counts the server with all its processes. On a machine without a GPU the slot and staging banks, which a GPU
would hold, count as host memory too.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from vllm_hlwq.bench import environment
from vllm_hlwq.bench.memory import PeakSampler
from vllm_hlwq.bench.server import Server

GROUP_SIZE = 32
CACHE_SIZE = 2
PEAK_FACTOR, PEAK_EXTRA = 1.1, 2**30
SETTLED_FACTOR, SETTLED_EXTRA = 1.02, 64 * 2**20
LOADED = "Expert cache:"  # begins the line that the server logs when the experts are in place


def model_config(num_experts: int, width: int, layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, num_experts=num_experts, num_experts_per_tok=4,
        moe_intermediate_size=width, max_position_embeddings=1024, tie_word_embeddings=True,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def random_layer(config: Qwen3MoeConfig, layer: int) -> dict[str, torch.Tensor]:
    """Weights of one decoder layer: BF16 attention and router, random INT4 experts."""
    generator = torch.Generator().manual_seed(layer)
    prefix, hidden, width = f"model.layers.{layer}", config.hidden_size, config.moe_intermediate_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def dense(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    state = {
        f"{prefix}.self_attn.q_proj.weight": dense(q_rows, hidden),
        f"{prefix}.self_attn.k_proj.weight": dense(kv_rows, hidden),
        f"{prefix}.self_attn.v_proj.weight": dense(kv_rows, hidden),
        f"{prefix}.self_attn.o_proj.weight": dense(hidden, q_rows),
        f"{prefix}.self_attn.q_norm.weight": torch.ones(config.head_dim, dtype=torch.bfloat16),
        f"{prefix}.self_attn.k_norm.weight": torch.ones(config.head_dim, dtype=torch.bfloat16),
        f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{prefix}.mlp.gate.weight": dense(config.num_experts, hidden),
    }
    for expert in range(config.num_experts):
        for name, (rows, columns) in {
            "gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)
        }.items():  # fmt: skip
            key = f"{prefix}.mlp.experts.{expert}.{name}"
            bits = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), generator=generator, dtype=torch.int32)
            state[f"{key}.weight_packed"] = bits
            state[f"{key}.weight_scale"] = torch.full((rows, columns // GROUP_SIZE), 0.004, dtype=torch.bfloat16)
            state[f"{key}.weight_shape"] = torch.tensor([rows, columns])
    return state


def write_checkpoint(out: Path, config: Qwen3MoeConfig) -> int:
    """Write one safetensors shard a layer; return the bytes of all experts (packed codes and scales)."""
    out.mkdir(parents=True)
    expert_bytes = 0
    weight_map: dict[str, str] = {}
    ignored: list[str] = ["lm_head"]

    def save(state: dict[str, torch.Tensor], shard: str) -> None:
        save_file(state, out / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(state, shard))
        ignored.extend(n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim == 2)

    for layer in range(config.num_hidden_layers):
        state = random_layer(config, layer)
        expert_bytes += sum(
            t.nbytes for n, t in state.items() if ".experts." in n and n.endswith(("_packed", "_scale"))
        )
        save(state, f"model-{layer:05d}.safetensors")
    embedding = (torch.randn(config.vocab_size, config.hidden_size) * 0.02).bfloat16()
    norm = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    save({"model.embed_tokens.weight": embedding, "model.norm.weight": norm}, "model-embedding.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    settings = config.to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ignored, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(settings))
    write_tokenizer(out, config.vocab_size)
    return expert_bytes


def write_tokenizer(out: Path, vocab_size: int) -> None:
    """Write a tokenizer of as many words."""
    vocabulary = {f"t{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(out)


def memory_of(process: psutil.Process) -> list[tuple[int, int]]:
    """PSS of a process and each of its descendants in bytes: all of it, and the part outside mapped files."""
    found = []
    for member in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between listing and reading
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        total = sizes.get("Pss", 0)
        found.append((total, total - sizes.get("Pss_File", 0)))
    return found


def start_server(model: Path, *arguments: str) -> Server:
    return Server(
        model, "--moe-expert-cache-size", str(CACHE_SIZE), "--max-model-len", "512", "--enforce-eager",
        "--served-model-name", "m", *arguments,
    )  # fmt: skip


def start_watched(model: Path, *arguments: str) -> tuple[Server, PeakSampler]:
    """Start serving a checkpoint, and sample the process that holds most memory until the experts are loaded."""
    server = start_server(model, *arguments)
    process = psutil.Process(server.process.pid)
    peak = PeakSampler(
        lambda: max((outside_files for _, outside_files in memory_of(process)), default=0),
        lambda: LOADED in server.log or server.process.poll() is not None,
    )
    peak.start()
    return server, peak


def measure(model: Path) -> dict[str, int]:
    """Serve a checkpoint and answer one request; bytes at the peak of loading and afterwards."""
    server, peak = start_watched(model)
    process = psutil.Process(server.process.pid)
    with server:
        peak.join()
        server.post("/v1/completions", {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
        settled = sum(total for total, _ in memory_of(process))
        line = next(line for line in server.log.splitlines() if LOADED in line)
    print(line[line.index(LOADED) :])
    banks = sum(int(amount) for amount in re.findall(r"(\d+) bytes of (?:slots|staging)", line))
    return {"loading_peak": peak.peak, "settled": settled, "banks": banks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--layers", type=int, default=40, help="decoder layers; 40 make 2.1 GiB of experts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load-memory-") as scratch:
        large, tiny = Path(scratch) / "large", Path(scratch) / "tiny"
        expert_bytes = write_checkpoint(large, model_config(64, 512, arguments.layers))
        tiny_bytes = write_checkpoint(tiny, model_config(4, 32, arguments.layers))
        baseline, loaded = measure(tiny), measure(large)
    peak_limit = PEAK_FACTOR * expert_bytes + PEAK_EXTRA
    settled_above = loaded["settled"] - baseline["settled"]
    settled_limit = SETTLED_FACTOR * expert_bytes + SETTLED_EXTRA
    result: dict[str, Any] = {
        "environment": environment.describe(),
        "expert_bytes": expert_bytes,
        "tiny_expert_bytes": tiny_bytes,
        "cache_size": CACHE_SIZE,
        "with_tiny_experts": baseline,
        "with_large_experts": loaded,
        "peak_over_limit": round(loaded["loading_peak"] / peak_limit, 4),
        "settled_above_tiny": settled_above,
        "settled_over_limit": round(settled_above / settled_limit, 4),
    }
    mib = 2**20
    print(f"experts                                {expert_bytes / mib:8.0f} MiB")
    print(f"peak of the loading process            {loaded['loading_peak'] / mib:8.0f} MiB", end="")
    print(f"   {result['peak_over_limit']:.2f} of 1.1 x experts + 1 GiB")
    print(f"afterwards, above tiny experts         {settled_above / mib:8.0f} MiB", end="")
    print(f"   {result['settled_over_limit']:.2f} of 1.02 x experts + 64 MiB")
    print(f"  of which slot and staging banks      {(loaded['banks'] - baseline['banks']) / mib:8.0f} MiB")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["peak_over_limit"] > 1 or result["settled_over_limit"] > 1)


if __name__ == "__main__":
    raise SystemExit(main())
