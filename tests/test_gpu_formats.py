"""Every format of experts on CUDA against stock vLLM with the same kernels and all experts resident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import format_files
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

ENGINE = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28, "attention_backend": "TRITON_ATTN"}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and stock vLLM's backend with the kernels that our layer uses."""

    write: Callable[[Path], Path]
    stock: str
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def waves_are_exact(self) -> bool:
        """Triton computes each block by itself; Marlin's sums depend on the other blocks of a call."""
        return self.stock == "triton"


def qwen3(make: Callable[..., Path], **arguments: Any) -> Callable[[Path], Path]:
    """Writes a Qwen3-MoE with experts in a format of ``format_files``."""
    return lambda out: make(checkpoints.write(checkpoints.qwen3_moe_config(), out / "base"), out / "made", **arguments)


def wide_qwen3(make: Callable[..., Path], **arguments: Any) -> Callable[[Path], Path]:
    """The same with matrices of several blocks."""
    config = checkpoints.qwen3_moe_wide_config
    return lambda out: make(checkpoints.write(config(), out / "base"), out / "made", **arguments)


def gpt_oss(out: Path) -> Path:
    """Writes a gpt-oss in BF16 with biases that are not zero."""
    return checkpoints.write(checkpoints.gpt_oss_served_config(), out, varied=True)


CASES = {
    "bf16-silu": Case(lambda out: checkpoints.write(checkpoints.qwen3_moe_config(), out), "triton"),
    "bf16-gelu": Case(lambda out: checkpoints.write(checkpoints.gemma4_config(), out), "triton"),
    "fp16": Case(
        lambda out: checkpoints.write(checkpoints.qwen3_moe_config(), out), "triton", {"dtype": "float16"}
    ),
    "gpt-oss-bf16": Case(lambda out: gpt_oss(out), "triton"),
    "gpt-oss-mxfp4": Case(lambda out: format_files.gpt_oss_mxfp4(gpt_oss(out / "base"), out / "made"), "marlin"),
    "awq": Case(qwen3(format_files.awq), "marlin"),
    "awq-g128": Case(wide_qwen3(format_files.awq, group_size=128), "marlin"),
    "gptq": Case(qwen3(format_files.gptq), "marlin"),
    "gptq-channel": Case(qwen3(format_files.gptq, group_size=-1), "marlin"),
    "gptq-bias": Case(qwen3(format_files.gptq, biases=True), "marlin"),
    "fp8-tensor": Case(qwen3(format_files.fp8), "marlin"),
    "fp8-tensor-static": Case(qwen3(format_files.fp8, static=True), "marlin"),
    "fp8-block": Case(wide_qwen3(format_files.fp8, block=128), "marlin"),
    "compressed-fp8-channel": Case(qwen3(format_files.compressed_fp8, strategy="channel"), "marlin"),
    "compressed-fp8-block": Case(wide_qwen3(format_files.compressed_fp8, strategy="block"), "marlin"),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A checkpoint and stock vLLM with it loaded."""

    case: Case
    checkpoint: Path
    stock: LoadedModel

    def cached(self, cache_size: int, **engine: Any) -> LoadedModel:
        return LoadedModel(self.checkpoint, cache_size, **ENGINE, **self.case.engine, **engine)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    checkpoint = case.write(tmp_path_factory.mktemp(request.param))
    return Pair(case, checkpoint, LoadedModel(checkpoint, 0, moe_backend=case.stock, **ENGINE, **case.engine))


def step(pair: Pair, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and router logits of a step, on the GPU."""
    model = pair.stock.config.model_config
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, model.get_hidden_size(), generator=generator).to(model.dtype)
    return hidden.cuda(), 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator).cuda()


def assert_same(output: torch.Tensor, wanted: torch.Tensor, allowed: float, what: str) -> None:
    assert wanted.isfinite().all(), f"{what}: stock vLLM's answer is not finite"
    assert wanted.any(), f"{what}: stock vLLM's answer is zero"
    difference = (output.float() - wanted.float()).abs()
    difference[~output.isfinite()] = torch.inf
    wrong = int((difference > allowed).any(1).sum())
    assert wrong == 0, (
        f"{what}: {wrong} of {len(wanted)} rows differ by more than {allowed:.3g}, the most by "
        f"{difference.max().item():.3g}; largest value {wanted.abs().max().item():.3g}"
    )


@pytest.mark.parametrize("cache_size", [TOP_K, NUM_EXPERTS // 2, NUM_EXPERTS])
def test_one_wave_has_the_bits_of_a_resident_model(pair: Pair, cache_size: int) -> None:
    cached = pair.cached(cache_size)
    assert cached.runners[0].routed_experts.expert_cache.backend.name == pair.case.stock
    tokens = cache_size // TOP_K if cache_size < NUM_EXPERTS else 40
    for seed in range(10):
        for layer in range(2):
            wanted = pair.stock.run(layer, *step(pair, tokens, seed))
            output = cached.run(layer, *step(pair, tokens, seed))
            assert_same(output, wanted, 0.0, f"layer {layer}, step {seed} of {tokens} tokens")


@pytest.mark.parametrize(("cache_size", "staging"), [(1, 3), (TOP_K - 1, None), (NUM_EXPERTS - 1, None)])
def test_several_waves_leave_no_row_out(pair: Pair, cache_size: int, staging: int | None) -> None:
    cached = pair.cached(cache_size, staging_size=staging)
    for seed, tokens in enumerate((300, 1, 5, 1, 40, 300)):
        hidden, logits = step(pair, tokens, seed)
        wanted = pair.stock.run(0, hidden, logits)
        allowed = 0.0
        if not pair.case.waves_are_exact:
            parts = [pair.stock.run(0, hidden[i : i + 7], logits[i : i + 7]) for i in range(0, tokens, 7)]
            alone = (torch.cat(parts).float() - wanted.float()).abs().max().item()
            # What the kernels themselves differ between batches, or a unit in the last place of the largest output.
            allowed = max(2 * alone, wanted.abs().max().item() * 2**-8)
        assert_same(cached.run(0, hidden, logits), wanted, allowed, f"step {seed} of {tokens} tokens")


def test_slots_hold_what_the_store_has(pair: Pair) -> None:
    cached = pair.cached(TOP_K)
    cache = cached.runners[1].routed_experts.expert_cache
    cached.run(1, *step(pair, 1, 0))
    cached.run(1, *step(pair, 1, 0))
    counts = cache.counts()
    assert (counts["steps"], counts["queries"], counts["hits"]) == (2, 2 * TOP_K, TOP_K)
    for name, bank in cache.slot_bank.fields.items():
        for slot, expert in enumerate(cache.table.expert_of_slot.tolist()):
            record = cache.store.field(name)[expert].contiguous()
            assert torch.equal(bank[slot].cpu().contiguous().view(torch.uint8), record.view(torch.uint8)), name
