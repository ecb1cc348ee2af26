"""Warm start and kept experts on CUDA: slots filled by kernels and read beside steps; records that are page-locked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.device_backend import DeviceBackend
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.profile_saver import SlotReader
from vllm_hlwq.warm_start import seed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

ENGINE: dict[str, Any] = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}
SLOTS = 6


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    export_int4(checkpoints.write(checkpoints.qwen3_moe_config(), folder / "bf16"), folder / "int4", group_size=64)
    return folder / "int4"


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.qwen3_moe_config(), tmp_path_factory.mktemp("bf16") / "model")


def caches(loaded: LoadedModel) -> list[Any]:
    return [runner.routed_experts.expert_cache for runner in loaded.runners]


def step(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 128, generator=generator).bfloat16()
    return hidden.cuda(), 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator).cuda()


@pytest.mark.parametrize("given", [[3], [3, 9, 1], [3, 9, 1, 0, 7, 5, 4, 2]])
def test_slots_are_as_steps_leave_them(int4: Path, given: list[int]) -> None:
    loaded = LoadedModel(int4, SLOTS, **ENGINE)
    cache = caches(loaded)[0]
    mirror = SlotTable(NUM_EXPERTS, SLOTS, NUM_EXPERTS - SLOTS)
    cache.reset()
    assert seed(cache, given) == min(SLOTS, len(given))
    for expert in reversed(given[:SLOTS]):
        mirror.plan_step(torch.tensor([expert]))
    for name in ("expert_of_slot", "slot_of_expert", "stamp_of_slot", "clock"):
        assert torch.equal(getattr(cache.table, name).cpu(), getattr(mirror, name)), name
    assert torch.equal(cache.table.slot_by_age.cpu().long(), torch.argsort(mirror.stamp_of_slot, stable=True))
    assert not any(cache.counts().values())
    for slot, expert in enumerate(mirror.expert_of_slot.tolist()):
        for name, field in cache.slot_bank.fields.items():
            assert expert < 0 or torch.equal(field[slot].cpu(), cache.store.field(name)[expert])
    assert SlotReader({"layer": cache.table}).read() == {"layer": given[:SLOTS]}


def test_a_reading_beside_steps_names_experts_once(int4: Path) -> None:
    loaded = LoadedModel(int4, SLOTS, **ENGINE)
    reader = SlotReader({str(number): cache.table for number, cache in enumerate(caches(loaded))})
    for number in range(200):
        for layer in range(2):
            loaded.run(layer, *step(1, number))
        for experts in reader.read().values():
            assert len(set(experts)) == len(experts) <= SLOTS
            assert all(0 <= expert < NUM_EXPERTS for expert in experts)
    torch.cuda.synchronize()
    for number, cache in enumerate(caches(loaded)):
        assert set(reader.read()[str(number)]) == set(cache.table.expert_of_slot.tolist()) - {-1}


def test_a_profile_crosses_from_server_to_server(int4: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    first, cold = (LoadedModel(int4, SLOTS, profile=path, **ENGINE) for path in (profile, tmp_path / "none"))
    first.worker.warm_start.start(first.worker._layers())
    for layer in range(2):
        first.run(layer, *step(1, 5))
    first.worker.save_expert_profile()
    first.worker.warm_start.close()
    warm = LoadedModel(int4, SLOTS, profile=profile, **ENGINE)
    warm.worker.warm_start.start(warm.worker._layers())
    for layer in range(2):
        assert torch.equal(warm.run(layer, *step(1, 5)), cold.run(layer, *step(1, 5)))
        counts = caches(warm)[layer].counts()
        assert (counts["queries"], counts["hits"], counts["h2d_bytes"]) == (TOP_K, TOP_K, 0)
    warm.worker.warm_start.close()


@pytest.mark.parametrize("model", ["int4", "bf16"])
@pytest.mark.parametrize("cache_size", [TOP_K, NUM_EXPERTS])
def test_the_second_start_converts_nothing_and_has_the_same_bits(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    cache_size: int,
) -> None:
    checkpoint = request.getfixturevalue(model)
    plain = LoadedModel(checkpoint, cache_size, **ENGINE)
    first = LoadedModel(checkpoint, cache_size, store_cache=tmp_path, **ENGINE)

    def refuse(*_: object) -> None:
        raise AssertionError("an expert is converted again")

    with monkeypatch.context() as patched:
        patched.setattr(DeviceBackend, "convert", refuse)
        second = LoadedModel(checkpoint, cache_size, store_cache=tmp_path, **ENGINE)
    for layer, cache in enumerate(caches(second)):
        assert second.runners[layer].routed_experts.restored
        if cache.store is not None:
            assert torch.equal(cache.store.records, caches(plain)[layer].store.records)
            assert cache.store.device_address is not None
        for number in range(5):
            wanted = plain.run(layer, *step(1, number))
            assert torch.equal(first.run(layer, *step(1, number)), wanted)
            assert torch.equal(second.run(layer, *step(1, number)), wanted)


def test_conversion_and_page_locking_show(int4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = LoadedModel(int4, TOP_K, **ENGINE)
    nbytes = sum(cache.store.nbytes for cache in caches(loaded))
    said = capsys.readouterr().err
    for work in ("Converting", "Page-locking"):
        lines = [line for line in said.splitlines() if line.startswith(f"{work} experts: 100% | ")]
        assert lines, (work, nbytes)
