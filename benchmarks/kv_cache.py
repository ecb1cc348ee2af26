"""What the KV cache costs and saves beside BF16's and transformers' own quantised ones: bytes, accuracy, time.

    python benchmarks/kv_cache.py [--threads N]   measure, write benchmarks/results/kv_cache.json and the chart
    python benchmarks/kv_cache.py --chart         only draw the chart again

Bytes are those of the storages that caches hold when they are filled with random states. Times are of whole steps of
models with random weights after 4,096 tokens, the caches in turn, one token each. Accuracy is the shipped tiny model's.
transformers' backends quanto and hqq are measured where they are installed. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache as remember
from pathlib import Path
from typing import Any

import torch
from kv_cache_bars import kv_bars
from kv_cache_chart import draw
from make_checkpoint import gemma4_26b_a4b
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    QuantizedCache,
)
from transformers.cache_utils import Cache

from vllm_hlwq.bench import environment
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.kv_cache import HLWQCache
from vllm_hlwq.kv_cache.history import History

PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "examples/tiny_moe"
sys.path.append(str(TINY))
from train import CONTEXT, encode_split  # noqa: E402 - the tiny model's own module, beside its recipe

RESULT, CHART = PROJECT / "benchmarks/results/kv_cache.json", PROJECT / "docs/kv_cache.png"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LONGEST_OTHER = 2048
"""For transformers' backends: hqq searches its scales, which takes minutes for longer texts; bytes grow linearly."""
SPEED_LENGTH, STEPS, SLOW_STEPS = 4096, 24, 4
TEXTS = 64
CODED_HEAD_DIM = 256

Caches = dict[str, Callable[[], Cache]]


def dense() -> PreTrainedConfig:
    """Full attention only, head_dim 256; a small vocabulary, so that layers are all there is to a step."""
    return LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=CODED_HEAD_DIM, max_position_embeddings=2 * LENGTHS[-1],
    )  # fmt: skip


def gemma_slice() -> PreTrainedConfig:
    """Six of Gemma-4-26B's layers; of 128 experts 16, of which a token still takes 8, and a small vocabulary."""
    config = gemma4_26b_a4b(6)
    config.num_experts, config.vocab_size = 16, 1024
    return config


def caches(config: PreTrainedConfig) -> tuple[Caches, dict[str, str]]:
    """Makers of every cache that takes this model, and why others do not."""
    made: Caches = {"BF16": lambda: DynamicCache(config=config)}
    for bits in (2, 3, 4):
        made[f"HLWQ {bits} bit"] = lambda bits=bits: HLWQCache(config, bits=bits)  # type: ignore[misc]
    skipped = {}
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for bits in (2, 4):
            axes = {"axis_key": axis, "axis_value": axis}
            make = lambda b=backend, n=bits, a=axes: QuantizedCache(b, config, nbits=n, **a)  # noqa: E731
            try:
                make()
            except (ImportError, ValueError) as problem:
                skipped[f"{backend} {bits} bit"] = " ".join(str(problem).split())
            else:
                made[f"{backend} {bits} bit"] = make
    return made, skipped


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Every storage below a value: of tensors, of what quantised tensors consist of, in tuples and dictionaries."""
    if hasattr(value, "__tensor_flatten__"):
        yield from storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from storages(item)


def held(cache: Cache) -> int:
    """Bytes of all that a cache holds."""
    if isinstance(cache, HLWQCache):
        return cache.nbytes()
    found = {s.data_ptr(): s.nbytes() for layer in cache.layers for s in storages(list(vars(layer).values()))}
    return sum(found.values())


@remember
def random_states(heads: int, head_dim: int) -> torch.Tensor:
    return torch.randn(1, heads, LENGTHS[-1], head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()


def states(config: PreTrainedConfig, layer: int, length: int) -> torch.Tensor:
    """Random BF16 states of one layer."""
    own = config.per_layer_config[layer]
    heads = own.num_key_value_heads
    if (getattr(config, "layer_types", None) or [""] * (layer + 1))[layer] == "full_attention":
        heads = getattr(own, "num_global_key_value_heads", None) or heads
    return random_states(heads, own.head_dim)[:, :, :length]


def fill(filled: Cache, config: PreTrainedConfig, length: int, device: torch.device | None = None) -> None:
    """As after a prompt of ``length - 1`` tokens and one step, on the CPU or a device."""
    for layer in range(config.num_hidden_layers):
        both = states(config, layer, length).to(device or "cpu")
        filled.update(both[:, :, :-1], both[:, :, :-1], layer)
        filled.update(both[:, :, -1:], both[:, :, -1:], layer)


def measure_bytes(config: PreTrainedConfig) -> dict[str, Any]:
    """Bytes by cache over the length, and of which kinds ours are at 4,096 tokens and at the greatest length."""
    makers, skipped = caches(config)
    sizes: dict[str, list[int]] = {name: [] for name in makers}
    kinds = {}
    for length in LENGTHS:
        for name, make in makers.items():
            if length > LONGEST_OTHER and name.startswith(("quanto", "hqq")):
                continue
            cache = make()
            fill(cache, config, length)
            sizes[name].append(held(cache))
            if name == "HLWQ 3 bit" and length in (SPEED_LENGTH, LENGTHS[-1]):
                kinds[str(length)] = cache.bytes_by_kind()
    return {"lengths": LENGTHS, "bytes": sizes, "kinds": kinds, "skipped": skipped}


def coded_ratio() -> float:
    """How many times fewer bytes than BF16 coded tokens take at 3 bits, room for the next ones included."""
    config = dense()
    cache = HLWQCache(config, bits=3, residual_window=0)
    fill(cache, config, SPEED_LENGTH)
    kinds = cache.bytes_by_kind()
    coded = cache.get_seq_length() // 32 * 32
    exact = coded * 2 * 2 * sum(states(config, layer, 1).numel() for layer in range(config.num_hidden_layers))
    return exact / (kinds["codes"] + kinds["norms"])


def measure_speed(name: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Median milliseconds of a step by cache, and as a multiple of BF16's."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    makers, _ = caches(config)
    makers["HLWQ 3 bit, decoded"] = lambda: HLWQCache(config, bits=3, attend_coded=False)
    filled = {cache: make() for cache, make in makers.items()}
    for cache in filled.values():
        fill(cache, config, SPEED_LENGTH)
    seconds: dict[str, list[float]] = {cache: [] for cache in filled}
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        for step in range(STEPS + 1):
            for cache, own in filled.items():
                fast = cache == "BF16" or (cache.startswith("HLWQ") and "decoded" not in cache)
                if not fast and step > SLOW_STEPS:
                    continue
                start = time.perf_counter()
                model(token, past_key_values=own)
                if step:
                    seconds[cache].append(time.perf_counter() - start)
    median = {cache: statistics.median(times) for cache, times in seconds.items()}
    rows = [
        {"cache": cache, "ms": round(value * 1000, 2), "ratio": round(value / median["BF16"], 3)}
        for cache, value in median.items()
    ]
    return {"model": name, "length": SPEED_LENGTH, "steps": STEPS, "slow_steps": SLOW_STEPS, "rows": rows}


def decoded_keys_and_values(cache: Cache, both: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """What a cache gives back of states ``[batch, heads, tokens, head_dim]`` once they are coded."""
    layer = cache.layers[-1]
    layer.update(*both)
    last = layer.update(*(states[:, :, -1:] for states in both))
    return [tensor.decode() if isinstance(tensor, History) else tensor for tensor in last]


def measure_cosines(model: Any, tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Mean cosine with what caches make of the keys and values of the tiny model's layer of full attention."""
    exact = DynamicCache(config=model.config)
    model(tokens[:, :CONTEXT], past_key_values=exact)
    both = exact.layers[-1].keys, exact.layers[-1].values
    config = LlamaConfig(num_hidden_layers=1, head_dim=both[0].shape[3])
    makers, _ = caches(config)
    for bits in (2, 3, 4):
        makers[f"HLWQ {bits} bit"] = lambda bits=bits: HLWQCache(config, bits=bits, residual_window=0)  # type: ignore[misc]
    rows = []
    for name, make in makers.items():
        cosines = [
            torch.cosine_similarity(got[:, :, :CONTEXT].float(), states.float(), dim=-1).mean().item()
            for got, states in zip(decoded_keys_and_values(make(), both), both, strict=True)
        ]
        rows.append({"cache": name, "keys": cosines[0], "values": cosines[1]})
    return rows


def losses(model: Any, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Mean negative log-likelihood, per text, of the second half's tokens, each predicted in a step of its own."""
    half = CONTEXT // 2
    logits = [model(tokens[:, :half], past_key_values=cache).logits[:, -1:]]
    logits += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(half, CONTEXT)]
    found = torch.cat(logits[:-1] + logits[-1:], dim=1).float()[:, 1:]
    return (
        torch.nn.functional.cross_entropy(found.transpose(1, 2), tokens[:, half + 1 : CONTEXT + 1], reduction="none")
        .double()
        .mean(1)
    )


def measure_accuracy() -> dict[str, Any]:
    """Cosines, and the tiny model's perplexity by cache with its paired standard error over texts."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        decoded = Path(folder) / "model"
        dequantize(open_source(TINY / "model"), decoded)
        model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.bfloat16).eval()
        windows = encode_split(AutoTokenizer.from_pretrained(decoded), "held-out")
        tokens = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))[:TEXTS]]
        exact = losses(model, tokens, DynamicCache(config=model.config))
        rows = [
            {"cache": "BF16", "window": None, "perplexity": exact.mean().exp().item(), "relative": 0.0, "error": 0.0}
        ]
        for bits in (2, 3, 4):
            for window in (128, 0):
                cost = losses(model, tokens, HLWQCache(model.config, bits=bits, residual_window=window))
                more = cost - exact
                rows.append({
                    "cache": f"HLWQ {bits} bit", "window": window, "perplexity": cost.mean().exp().item(),
                    "relative": more.mean().expm1().item(), "error": (more.std() / len(more) ** 0.5).item(),
                })  # fmt: skip
        return {"texts": TEXTS, "context": CONTEXT, "perplexity": rows, "cosines": measure_cosines(model, tokens)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "speed": lambda: {
        "speed": [measure_speed("dense", dense()), measure_speed("six layers of Gemma-4-26B", gemma_slice())]
    },
    "accuracy": measure_accuracy,
    "bytes": lambda: {
        "coded_ratio": coded_ratio(),
        "models": {"dense": measure_bytes(dense()), "Gemma-4-26B-A4B": measure_bytes(gemma4_26b_a4b(None))},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this anew and keep the rest")
    parser.add_argument("--chart", action="store_true", help="draw the chart of the last result and measure nothing")
    arguments = parser.parse_args()
    if not arguments.chart:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        torch.manual_seed(0)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        for part in arguments.part or PARTS:
            result |= PARTS[part]() | {"environment": environment.describe()}
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
    result = json.loads(RESULT.read_text())
    CHART.write_bytes(draw(result))
    found = kv_bars(result)
    for bar in found:
        print(f"{'holds' if bar['holds'] else 'MISSED'} ({bar['value']}): {bar['bar']}")
    if not all(bar["holds"] for bar in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
