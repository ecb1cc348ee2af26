"""Loaded experts to the kernels' layout, chunk by chunk, in place where they fit."""

from __future__ import annotations

import pytest
import torch
from test_pinned_memory import MemoryLock

from vllm_hlwq import device_loading
from vllm_hlwq.device_loading import convert_store, kernel_layout
from vllm_hlwq.host_store import HostStore, RecordLayout

CPU = torch.device("cpu")
EXPERTS = 7
RAW = RecordLayout(
    {
        "w13_weight_packed": ((3, 8), torch.int32),
        "w2_weight_packed": ((5, 4), torch.int32),
        "w13_weight_scale": ((3, 8), torch.bfloat16),
    }
)


class Transposing:
    """Stands for a kernel's layout: matrices transposed, scales first; ``extra`` columns of padding."""

    converts = True

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def convert(self, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert all(field.is_contiguous() for field in raw.values())
        padded = torch.nn.functional.pad(raw["w13_weight_packed"].transpose(1, 2), (0, self.extra))
        return {"scale": raw["w13_weight_scale"] * 2, "w2": raw["w2_weight_packed"].transpose(1, 2), "w13": padded}


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("experts_a_chunk", [1, 3, 100])
def test_every_expert_is_converted(monkeypatch: pytest.MonkeyPatch, extra: int, experts_a_chunk: int) -> None:
    monkeypatch.setattr(device_loading, "CHUNK_BYTES", experts_a_chunk * RAW.record_bytes)
    raw = HostStore(EXPERTS, RAW)
    wanted: dict[str, list[torch.Tensor]] = {"scale": [], "w2": [], "w13": []}
    for expert in range(EXPERTS):
        packed = {
            name: torch.randint(-(2**31), 2**31, RAW[name].shape) for name in ("w13_weight_packed", "w2_weight_packed")
        }
        scale = torch.randn(RAW["w13_weight_scale"].shape).bfloat16()
        for name, value in (packed | {"w13_weight_scale": scale}).items():
            raw.field(name)[expert] = value
        wanted["scale"].append(scale * 2)
        wanted["w2"].append(packed["w2_weight_packed"].T.int())
        wanted["w13"].append(torch.cat([packed["w13_weight_packed"].T.int(), torch.zeros(8, extra).int()], 1))
    backend = Transposing(extra)
    runtime = MemoryLock()
    store = convert_store(raw, kernel_layout(raw, backend, CPU), backend, CPU, runtime)
    assert (store is raw) == (extra == 0)
    assert list(store.layout) == ["scale", "w2", "w13"]
    for name, values in wanted.items():
        assert torch.equal(store.field(name), torch.stack(values))
    assert store.device_address is not None
    assert runtime.sizes == {store.address: store.nbytes}


def test_experts_that_need_no_conversion_stay_untouched() -> None:
    class AsLoaded:
        converts = False

    raw, runtime = HostStore(EXPERTS, RAW), MemoryLock()
    store = convert_store(raw, kernel_layout(raw, AsLoaded(), CPU), AsLoaded(), CPU, runtime)
    assert store is raw
    assert store.layout.key() == RAW.key()
    assert runtime.sizes == {store.address: store.nbytes}


def test_a_store_that_was_converted_in_place_serves_another_cache_as_it_is() -> None:
    raw, runtime, backend = HostStore(EXPERTS, RAW), MemoryLock(), Transposing(0)
    raw.records.copy_(torch.randint(0, 64, raw.records.shape, dtype=torch.uint8))  # no NaN among the scales
    first = convert_store(raw, kernel_layout(raw, backend, CPU), backend, CPU, runtime)
    records, address = first.records.clone(), first.device_address
    again = convert_store(raw, kernel_layout(raw, backend, CPU), backend, CPU, runtime)
    assert again is first is raw
    assert torch.equal(again.records, records)
    assert again.device_address == address  # and MemoryLock, like CUDA, refuses to lock memory twice


@pytest.mark.parametrize("words", [1000, 52, 60])
def test_a_store_is_not_relabelled_with_records_of_another_size(words: int) -> None:
    """Of 224 bytes: smaller ones would be looked for in other places than they have."""
    assert RAW.record_bytes == 224
    with pytest.raises(ValueError, match="cannot hold"):
        HostStore(EXPERTS, RAW).relabel(RecordLayout({"w": ((words,), torch.int32)}))
