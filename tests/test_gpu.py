"""The reference backend on a CUDA device: page-locked records, copies into slots, and the whole engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.weight_bank import WeightBank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

MODEL = Path(__file__).parent.parent / "examples/tiny_moe/model"
PROMPTS = [
    "The import statement",
    "class Queue:\n    def __init__(self",
    "Raised when an operation",
    '"""Utilities for',
]


def test_records_are_copied_from_page_locked_memory() -> None:
    layout = RecordLayout({"w13_weight_packed": ((96, 32), torch.int32), "w2_weight_scale": ((64, 3), torch.bfloat16)})
    store = HostStore(16, layout)
    generator = torch.Generator().manual_seed(0)
    for name in layout:
        field = store.field(name)
        field.copy_(torch.randint(-1000, 1000, field.shape, generator=generator))
    store.page_lock()
    assert store.field("w13_weight_packed").is_pinned()
    bank = WeightBank.allocate(4, layout, torch.device("cuda"))
    bank.load(store, torch.tensor([11, 3, 7]), torch.tensor([2, 0, 3]))
    for name in layout:
        for expert, row in ((11, 2), (3, 0), (7, 3)):
            assert torch.equal(bank.fields[name][row].cpu(), store.field(name)[expert])


@pytest.mark.parametrize("v2_runner", ["0", "1"])
def test_greedy_tokens_are_the_same_at_every_cache_size(monkeypatch: pytest.MonkeyPatch, v2_runner: str) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2_runner)
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")  # FlashInfer need not be installed
    outputs, counters = {}, {}
    for cache_size in (1, 4, 16):
        llm = LLM(
            str(MODEL), additional_config={"moe_expert_cache_size": cache_size}, enforce_eager=True, max_model_len=512,
            gpu_memory_utilization=0.1, attention_backend="TRITON_ATTN",
        )  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        outputs[cache_size] = [llm.generate([p], greedy, use_tqdm=False)[0].outputs[0].token_ids for p in PROMPTS]
        layers = llm.collective_rpc("expert_cache_counters")[0].values()
        counters[cache_size] = {name: sum(layer[name] for layer in layers) for name in ("steps", "hits", "staged")}
        del llm
    assert outputs[1] == outputs[4] == outputs[16]
    assert len({token for tokens in outputs[4] for token in tokens}) > 30
    assert counters[4]["steps"] == 3 * len(PROMPTS) * 40
    assert counters[4]["hits"] > 0
    assert counters[1]["staged"] > counters[4]["staged"]
    assert set(counters[16].values()) == {0}
