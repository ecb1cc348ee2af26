"""The layer on CUDA against stock vLLM's Marlin: the same bits in one wave, Marlin's own rounding over several."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.slot_audit import audit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

FORMATS = {
    "gemma4-g64": ("gemma4", {"group_size": 64}),
    "gemma4-g32-asymmetric": ("gemma4", {"group_size": 32, "symmetric": False}),
    "qwen3_moe-g128": ("qwen3_moe", {"group_size": 128}),
    "qwen3_moe-channel": ("qwen3_moe", {"group_size": None}),
}
ENGINE = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, export = FORMATS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = checkpoints.gemma4_config() if model == "gemma4" else checkpoints.qwen3_moe_config()
    export_int4(checkpoints.write(config, folder / "bf16"), folder / "int4", **export)
    return folder / "int4"


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> LoadedModel:
    return LoadedModel(checkpoint, 0, moe_backend="marlin", **ENGINE)


def step(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and router logits of a step, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 128, generator=generator).bfloat16()
    return hidden.cuda(), 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator).cuda()


@pytest.mark.parametrize("cache_size", [TOP_K, TOP_K + 1, NUM_EXPERTS // 2, NUM_EXPERTS - 1, NUM_EXPERTS])
def test_one_wave_has_the_bits_of_a_resident_model(checkpoint: Path, stock: LoadedModel, cache_size: int) -> None:
    cached = LoadedModel(checkpoint, cache_size, **ENGINE)
    tokens = cache_size // TOP_K if cache_size < NUM_EXPERTS else 40
    for seed in range(30):
        for layer in range(2):
            wanted = stock.run(layer, *step(tokens, seed))
            assert wanted.isfinite().all()
            assert wanted.any()
            assert torch.equal(cached.run(layer, *step(tokens, seed)), wanted), f"layer {layer}, step {seed}"


@pytest.mark.parametrize(("cache_size", "staging"), [(1, 0), (1, 3), (TOP_K - 1, 0), (NUM_EXPERTS // 2, 2), (15, 0)])
def test_waves_round_as_marlin_does_between_batch_shapes(
    checkpoint: Path, stock: LoadedModel, cache_size: int, staging: int
) -> None:
    cached = LoadedModel(checkpoint, cache_size, **ENGINE, **({"staging_size": staging} if staging else {}))
    for seed, tokens in enumerate((300, 1, 5, 1, 40, 300)):
        hidden, logits = step(tokens, seed)
        wanted = stock.run(0, hidden, logits).float()
        alone = torch.cat([stock.run(0, hidden[i : i + 7], logits[i : i + 7]) for i in range(0, tokens, 7)]).float()
        output = cached.run(0, hidden, logits).float()
        # A unit in the last place of the largest output, or what Marlin itself differs between batches.
        allowed = max(2 * (alone - wanted).abs().max().item(), wanted.abs().max().item() * 2**-8)
        assert (output - wanted).abs().max().item() <= allowed


@torch.inference_mode()
def test_router_weights_on_the_input_are_applied_once(checkpoint: Path) -> None:
    """vLLM's kernel frame has multiplied the input by them, as in Llama-4; whatever they are, they do no more."""
    cache = LoadedModel(checkpoint, NUM_EXPERTS, **ENGINE).runners[0].routed_experts.expert_cache
    hidden, logits = step(6, 0)
    ids = logits.topk(TOP_K).indices
    outputs = []
    for weight, on_input in ((1.0, False), (0.25, True)):
        output = torch.empty_like(hidden)
        workspaces = [
            torch.empty(shape, dtype=hidden.dtype, device="cuda")
            for shape in cache.backend.workspace_shapes(len(hidden), hidden.shape[1], TOP_K)
        ]
        weights = torch.full(ids.shape, weight, device="cuda")
        buffers = cache.backend.buffers(*workspaces, ids.numel())
        cache.step(hidden, weights, ids, output, buffers, on_input, None, None)
        outputs.append(output)
    assert outputs[0].any()
    assert torch.equal(*outputs)


def test_padding_rows_load_and_count_nothing(checkpoint: Path, stock: LoadedModel) -> None:
    cached = LoadedModel(checkpoint, NUM_EXPERTS // 2, **ENGINE)
    cache = cached.runners[0].routed_experts.expert_cache
    hidden, logits = step(2, 0)
    padded_hidden, padded_logits = step(8, 1)
    padded_hidden[:2], padded_logits[:2] = hidden, logits
    mask = torch.arange(8, device="cuda") >= 2
    output = cached.run(0, padded_hidden, padded_logits, is_padding=mask)
    chosen = torch.unique(logits.topk(TOP_K).indices).numel()
    counts = cache.counts()
    assert (counts["queries"], counts["admitted"], counts["staged"]) == (chosen, chosen, 0)
    assert torch.allclose(output[:2].float(), stock.run(0, hidden, logits).float(), rtol=2**-7, atol=2**-7)
    cached.run(0, padded_hidden, padded_logits, is_padding=torch.ones_like(mask))
    assert cache.counts() == counts
    cache.reset()
    assert not any(cache.counts().values())


def test_loads_hit_what_was_loaded(checkpoint: Path) -> None:
    cached = LoadedModel(checkpoint, TOP_K, **ENGINE)
    cache = cached.runners[0].routed_experts.expert_cache
    cached.run(0, *step(1, 0))
    cached.run(0, *step(1, 0))
    counts = cache.counts()
    assert (counts["steps"], counts["queries"], counts["hits"], counts["evictions"]) == (2, 2 * TOP_K, TOP_K, 0)
    assert counts["h2d_bytes"] == TOP_K * cache.record_bytes
    bank, store = cache.slot_bank, cache.store
    experts = cache.table.expert_of_slot.tolist()
    for name, field in bank.fields.items():
        for slot, expert in enumerate(experts):
            assert torch.equal(field[slot].cpu(), store.field(name)[expert])
    assert audit(cache) == []
    next(iter(bank.fields.values()))[0].zero_()
    assert len(audit(cache)) == 1


@pytest.mark.parametrize(("cache_size", "staging"), [(4, 0), (1, 0), (4, 3), (8, 1)])
def test_layers_of_a_prompt_prefetch_for_each_other(
    checkpoint: Path, stock: LoadedModel, cache_size: int, staging: int
) -> None:
    cached = LoadedModel(checkpoint, cache_size, **ENGINE, **({"staging_size": staging} if staging else {}))
    caches = [runner.routed_experts.expert_cache for runner in cached.runners]
    for seed, tokens in enumerate((300, 1, 400, 400, 2, 333)):
        steps = [step(tokens, 2 * seed + layer) for layer in range(2)]
        with cached.forward_pass(tokens):
            outputs = [
                runner.forward(hidden.clone(), logits)
                for runner, (hidden, logits) in zip(cached.runners, steps, strict=True)
            ]
        for layer, output in enumerate(outputs):
            wanted = stock.run(layer, *steps[layer]).float()
            assert (output.float() - wanted).abs().max() <= wanted.abs().max() * 2**-7
        prefetched = int(caches[1].table.staged_skip)
        first_prompt_or_decoding = seed == 0 or tokens < 10
        assert prefetched == (0 if first_prompt_or_decoding else min(caches[1].staging_bank.rows, 16 - cache_size))
        assert not int(caches[0].table.staged_skip), "nothing comes before the first layer"


def test_steps_are_captured_after_prompts_that_prefetch(checkpoint: Path, stock: LoadedModel) -> None:
    cached = LoadedModel(checkpoint, TOP_K, **ENGINE)
    for tokens in (NUM_EXPERTS, TOP_K, 1):
        for _ in range(2):
            with cached.forward_pass(400):
                for runner in cached.runners:
                    runner.forward(*step(400, tokens))
        hidden, logits = step(tokens, 0)
        cached.run(1, hidden, logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = cached.run(1, hidden, logits)
        for seed in range(1, 6):
            for static, new in zip((hidden, logits), step(tokens, seed), strict=True):
                static.copy_(new)
            graph.replay()
            wanted = stock.run(1, hidden, logits).float()
            assert (output.float() - wanted).abs().max() <= wanted.abs().max() * 2**-7
