"""``--moe-expert-profile`` in real vLLM workers: slots as serving would have left them, and the file that says so."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel, engine_config
from random_experts import filled_store
from safetensors.torch import load_file, save_file

from vllm_hlwq import profile_saver, warm_start
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.expert_cache import SlotTable
from vllm_hlwq.expert_profile import ModelFingerprint, Profile, load_profile
from vllm_hlwq.host_expert_cache import HostExpertCache
from vllm_hlwq.host_store import RecordLayout
from vllm_hlwq.metrics import USAGE, Layer, Rank, metric_values
from vllm_hlwq.plugin import configure
from vllm_hlwq.profile_saver import SlotReader
from vllm_hlwq.reference_backend import ReferenceBackend
from vllm_hlwq.warm_start import ids_in_checkpoint, seed
from vllm_hlwq.weight_bank import WeightBank

HIDDEN = 128
CPU = torch.device("cpu")
LAYOUT = RecordLayout({"w13_weight": ((4, 3), torch.float32), "w2_weight": ((2,), torch.bfloat16)})
NAMES = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]

Start = Callable[..., LoadedModel]


@pytest.fixture
def start(qwen3_moe_bf16: Path, tmp_path: Path) -> Start:
    """Starts a model as a server would, but for vLLM's own warm-up."""

    def started(cache_size: int, profile: Path | None = None, model: Path = qwen3_moe_bf16) -> LoadedModel:
        loaded = LoadedModel(model, cache_size, profile=profile or tmp_path / "profile.json")
        loaded.worker.warm_start.start(loaded.worker._layers())
        return loaded

    return started


def caches(loaded: LoadedModel) -> list[Any]:
    return [runner.routed_experts.expert_cache for runner in loaded.runners]


def step(loaded: LoadedModel, layer: int, experts: list[int]) -> None:
    """A step of one token that needs these experts and no others."""
    logits = torch.full((1, NUM_EXPERTS), -9.0)
    logits[0, experts] = torch.arange(len(experts), 0, -1).float()
    loaded.run(layer, torch.ones(1, HIDDEN).bfloat16(), logits)


def write(path: Path, loaded: LoadedModel, layers: dict[str, list[int]]) -> None:
    Profile(vllm="x", model=ModelFingerprint.of(loaded.config.model_config), layers=layers).save(path)


@pytest.mark.parametrize("given", [[], [5], [7, 2, 5], [7, 2, 5, 1, 0], [7, 2, 5, 1, 0, 4, 3]])
def test_slots_are_as_steps_leave_them_and_nothing_is_counted(given: list[int]) -> None:
    experts, slots = 9, 5
    store = filled_store(experts, LAYOUT)
    cache = HostExpertCache(store, slots, WeightBank.allocate(4, LAYOUT, CPU), ReferenceBackend("silu", None), CPU)
    fitting = given[:slots]
    assert seed(cache, given) == len(fitting)
    table = cache.table
    assert table is not None
    # Loaded one after the other into empty slots, the most valuable last.
    held = fitting[::-1]
    assert table.expert_of_slot.tolist() == held + [-1] * (slots - len(held))
    assert table.slot_of_expert.tolist() == [held.index(e) if e in held else -1 for e in range(experts)]
    assert table.stamp_of_slot.tolist() == list(range(1, len(held) + 1)) + [-1] * (slots - len(held))
    assert int(table.clock) == len(held)
    assert not any(cache.counts().values())
    for slot, expert in enumerate(held):
        for name, field in cache.slot_bank.fields.items():
            assert torch.equal(field[slot], store.field(name)[expert])


def test_the_least_valuable_is_evicted_first() -> None:
    cache = HostExpertCache(
        filled_store(9, LAYOUT), 3, WeightBank.allocate(4, LAYOUT, CPU), ReferenceBackend("silu", None), CPU
    )
    seed(cache, [7, 2, 5])
    lost = []
    for expert in (0, 1, 3):
        before = set(cache.table.expert_of_slot.tolist())
        cache.table.plan_step(torch.tensor([expert]))
        lost += before - set(cache.table.expert_of_slot.tolist())
    assert lost == [5, 2, 7]
    assert cache.counts()["evictions"] == 3


def test_a_reading_orders_by_age() -> None:
    table = SlotTable(9, 4, 5)
    reader = SlotReader({"empty": SlotTable(9, 2, 5), "layer": table})
    assert reader.read() == {"empty": [], "layer": []}
    for experts in ([3], [8, 1], [3], [5]):
        table.plan_step(torch.tensor(experts))
    # 8 and 1 share a step, and 8 has the lower slot, which goes first.
    assert table.expert_of_slot.tolist() == [3, 8, 1, 5]
    assert reader.read() == {"empty": [], "layer": [5, 3, 1, 8]}


def test_a_torn_reading_names_no_expert_twice() -> None:
    table = SlotTable(9, 4, 5)
    table.expert_of_slot.copy_(torch.tensor([3, 8, 3, -1]))
    table.stamp_of_slot.copy_(torch.tensor([1, 2, 3, -1]))
    assert SlotReader({"layer": table}).read() == {"layer": [3, 8]}


def test_a_second_start_hits_what_the_first_had(start: Start, tmp_path: Path) -> None:
    first = start(TOP_K)
    assert not (tmp_path / "profile.json").exists()
    step(first, 0, [3, 9, 12, 1])
    step(first, 1, [0, 2, 4, 6])
    assert first.worker.save_expert_profile() == str(tmp_path / "profile.json")
    first.worker.shutdown()
    second = start(TOP_K)
    assert [cache.counts()["queries"] for cache in caches(second)] == [0, 0]
    step(second, 0, [3, 9, 12, 1])
    step(second, 1, [0, 2, 4, 7])
    assert [cache.counts()["hits"] for cache in caches(second)] == [TOP_K, TOP_K - 1]
    assert second.worker.warm_start.seeded == dict.fromkeys(NAMES, TOP_K)


def test_tokens_are_those_of_a_cold_start(start: Start, tmp_path: Path) -> None:
    cold = start(TOP_K)
    write(tmp_path / "profile.json", cold, {name: [5, 6, 7, 8] for name in NAMES})
    warm = start(TOP_K)
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 3, 200):
        hidden, logits = torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), torch.randn(tokens, NUM_EXPERTS)
        for layer in range(2):
            assert torch.equal(warm.run(layer, hidden, logits), cold.run(layer, hidden, logits))


@pytest.mark.parametrize("slots", [1, 3, 6, NUM_EXPERTS - 1])
def test_another_number_of_slots_takes_the_most_valuable(start: Start, tmp_path: Path, slots: int) -> None:
    first = start(TOP_K)
    for experts in ([10, 11, 12, 13], [1, 2, 3, 4]):
        step(first, 0, experts)
        first.worker.save_expert_profile()  # so that those which then lose their slots are in it
    saved = json.loads((tmp_path / "profile.json").read_text())["layers"][NAMES[0]]
    assert sorted(saved[:4]) == [1, 2, 3, 4]
    assert sorted(saved[4:]) == [10, 11, 12, 13]
    second = start(slots)
    table = caches(second)[0].table
    assert [e for e in table.expert_of_slot.tolist() if e >= 0] == saved[:slots][::-1]
    assert second.worker.warm_start.seeded[NAMES[0]] == min(slots, 8)


def test_warm_up_leaves_no_trace_and_slots_are_filled_after_it(start: Start, tmp_path: Path) -> None:
    loaded = start(TOP_K)
    write(tmp_path / "profile.json", loaded, {NAMES[0]: [5, 6], NAMES[1]: [7]})
    warm = LoadedModel(Path(loaded.config.model_config.model), TOP_K, profile=tmp_path / "profile.json")
    step(warm, 0, [0, 1, 2, 3])
    warm.worker.compile_or_warm_up_model()
    assert [cache.table.expert_of_slot.tolist() for cache in caches(warm)] == [[6, 5, -1, -1], [7, -1, -1, -1]]
    assert not any(value for counts in warm.worker.expert_cache_counters().values() for value in counts.values())
    warm.worker.shutdown()
    assert json.loads((tmp_path / "profile.json").read_text())["vllm"] == "x", "nothing has changed, nothing is saved"


def test_all_resident_has_no_use_for_it(start: Start, tmp_path: Path, log: list[str]) -> None:
    loaded = start(NUM_EXPERTS)
    step(loaded, 0, [0, 1, 2, 3])
    assert loaded.worker.save_expert_profile() is None
    loaded.worker.shutdown()
    assert not (tmp_path / "profile.json").exists()
    assert any("all experts are resident" in line for line in log)


def test_it_is_saved_while_the_server_runs(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_saver, "SAVE_SECONDS", 0.01)
    loaded = start(TOP_K)
    path = tmp_path / "profile.json"
    for experts in ([3, 9, 12, 1], [0, 2, 4, 6]):
        step(loaded, 0, experts)
        deadline = time.monotonic() + 20
        while not path.exists() or set(json.loads(path.read_text())["layers"][NAMES[0]][:4]) != set(experts):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    loaded.worker.shutdown()


def test_a_file_that_cannot_be_saved_is_told_once(start: Start, tmp_path: Path, log: list[str]) -> None:
    loaded = start(TOP_K)
    (tmp_path / "profile.json").mkdir()
    for experts in ([3, 9, 12, 1], [0, 2, 4, 6]):
        step(loaded, 0, experts)
        with pytest.raises(ExpertCacheError, match=r"profile.json could not be saved: Is a directory; make room"):
            loaded.worker.save_expert_profile()
    (line,) = [line for line in log if "could not be saved" in line]
    assert "profile.json" in line
    (tmp_path / "profile.json").rmdir()
    loaded.worker.shutdown()
    assert json.loads((tmp_path / "profile.json").read_text())["layers"][NAMES[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_other_weights_are_another_model(start: Start, tmp_path: Path, qwen3_moe_bf16: Path) -> None:
    loaded = start(TOP_K)
    write(tmp_path / "profile.json", loaded, {})
    other = tmp_path / "other"
    shutil.copytree(qwen3_moe_bf16, other)
    state = load_file(other / "model.safetensors")
    for tensor in state.values():
        tensor.mul_(1.5)
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExpertCacheError) as caught:
        start(TOP_K, model=other)
    assert str(caught.value).startswith(
        f"--moe-expert-profile {tmp_path / 'profile.json'}: is of another model, {qwen3_moe_bf16.name} with checkpoint "
    )
    assert str(caught.value).endswith("move it away, or give another name")
    copy = tmp_path / "copy"
    shutil.copytree(qwen3_moe_bf16, copy, copy_function=shutil.copy)
    start(TOP_K, model=copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"not a profile of experts \(Invalid JSON"),
        ("{}", r"not a profile of experts \(vllm: Field required\)"),
        ('{"version": 2}', r"not a profile of experts \(version: Input should be 1\)"),
        ("\x00\xff", r"not a profile of experts"),
    ],
)
def test_what_is_no_profile_is_refused(start: Start, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ExpertCacheError, match=rf"^--moe-expert-profile .*{said}") as caught:
        start(TOP_K)
    assert "\n" not in str(caught.value)
    assert path.read_text(encoding="latin-1") == content


@pytest.mark.parametrize("experts", [[NUM_EXPERTS], [-1], [3, 3]])
def test_experts_that_are_not_there_are_refused(start: Start, tmp_path: Path, experts: list[int]) -> None:
    write(tmp_path / "profile.json", start(TOP_K), {NAMES[0]: [1], NAMES[1]: experts})
    with pytest.raises(ExpertCacheError, match=rf"names (an )?expert .* in {NAMES[1]}; move it away"):
        start(TOP_K)


@pytest.mark.parametrize("field", ["architecture", "layers", "experts", "top_k", "checkpoint"])
def test_every_part_of_the_fingerprint_counts(tmp_path: Path, field: str) -> None:
    model = ModelFingerprint(name="m", architecture="A", layers=2, experts=16, top_k=4, checkpoint="1")
    other = model.model_copy(update={field: {"architecture": "B", "checkpoint": "2"}.get(field, 9), "name": "n"})
    Profile(vllm="x", model=other, layers={}).save(tmp_path / "file")
    with pytest.raises(ExpertCacheError, match=f"is of another model, n with {field} "):
        load_profile(tmp_path / "file", model)
    Profile(vllm="x", model=model.model_copy(update={"name": "n"}), layers={}).save(tmp_path / "file")
    assert load_profile(tmp_path / "file", model) is not None
    assert load_profile(tmp_path / "absent", model) is None


def test_a_folder_that_is_not_there_is_refused(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    """When the configuration is complete: nothing has been started yet whose tracebacks could hide it."""
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-profile .*absent does not exist; make it first"):
        engine_config(qwen3_moe_bf16, TOP_K, profile=tmp_path / "absent/profile")
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-profile .*cannot be read \(Is a directory\)"):
        engine_config(qwen3_moe_bf16, TOP_K, profile=tmp_path)


def test_a_link_stays_and_what_it_points_to_is_saved(start: Start, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "profile.json").symlink_to("elsewhere/real.json")
    loaded = start(TOP_K)
    step(loaded, 0, [3, 9, 12, 1])
    loaded.worker.save_expert_profile()
    assert (tmp_path / "profile.json").is_symlink()
    layers = json.loads((tmp_path / "elsewhere/real.json").read_text())["layers"]
    assert set(layers[NAMES[0]]) == {3, 9, 12, 1}
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["real.json"]


def test_without_a_cache_or_beside_a_trace_it_is_refused(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpertCacheError, match=r"--moe-expert-profile x has no meaning without --moe-expert-cache"):
        configure(SimpleNamespace(additional_config={"moe_expert_profile": "x"}))
    with pytest.raises(ExpertCacheError, match=r"^moe_expert_profile=3: must be the path of a file"):
        configure(SimpleNamespace(additional_config={"moe_expert_cache_size": 4, "moe_expert_profile": 3}))
    with pytest.raises(ExpertCacheError, match=r"--moe-expert-trace .* begins with empty slots"):
        LoadedModel(qwen3_moe_bf16, TOP_K, profile=tmp_path / "p", trace=tmp_path / "t")


def test_expert_parallel_ranks_save_the_checkpoints_ids() -> None:
    expert_map = torch.full((8,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(4, dtype=torch.int32)
    layer = SimpleNamespace(expert_map=expert_map, expert_cache=SimpleNamespace(num_experts=4))
    assert ids_in_checkpoint(layer) == [1, 3, 5, 7]
    assert ids_in_checkpoint(SimpleNamespace(expert_map=None, expert_cache=layer.expert_cache)) == [0, 1, 2, 3]


def test_an_expert_parallel_rank_takes_its_own(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this rank's experts were the checkpoint's in the opposite order, and expert 0 were another rank's."""
    loaded = start(TOP_K)
    write(tmp_path / "profile.json", loaded, {NAMES[0]: [0, 15, 14], NAMES[1]: []})
    monkeypatch.setattr(warm_start, "ids_in_checkpoint", lambda layer: list(range(NUM_EXPERTS, 0, -1)))
    warm = start(TOP_K)
    assert caches(warm)[0].table.expert_of_slot.tolist() == [2, 1, -1, -1]
    step(warm, 0, [3, 4, 5, 6])
    warm.worker.save_expert_profile()
    saved = json.loads((tmp_path / "profile.json").read_text())["layers"][NAMES[0]]
    assert (sorted(saved[:4]), saved[4:]) == ([10, 11, 12, 13], [15, 14])


def test_a_model_that_has_to_be_downloaded_is_known_when_it_is_there(
    start: Start, tmp_path: Path, qwen3_moe_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = start(TOP_K)
    path = tmp_path / "profile.json"
    write(path, loaded, {NAMES[0]: [1, 2]})
    config = SimpleNamespace(
        parallel_config=loaded.config.parallel_config,
        model_config=SimpleNamespace(
            model=f"someone/{qwen3_moe_bf16.name}",
            revision=None,
            architectures=loaded.config.model_config.architectures,
            get_total_num_hidden_layers=lambda: 2,
            get_num_experts=lambda: NUM_EXPERTS,
            get_num_experts_per_tok=lambda: TOP_K,
        ),
    )
    monkeypatch.setattr("vllm_hlwq.expert_profile.model_folder", lambda *_: None)
    waiting = warm_start.WarmStart(str(path), config, 0)
    monkeypatch.setattr("vllm_hlwq.expert_profile.model_folder", lambda *_: qwen3_moe_bf16)
    waiting.read()
    waiting.start(loaded.worker._layers())
    waiting.close()
    assert waiting.seeded == {NAMES[0]: 2, NAMES[1]: 0}


@pytest.mark.parametrize(
    ("rank", "tensor", "experts", "read", "saved"),
    [
        (0, 2, False, "p.json", "p.json"),
        (1, 2, False, "p.json", None),  # holds parts of rank 0's experts
        (3, 2, False, "p-rank2.json", None),  # the next pipeline stage
        (1, 2, True, "p-rank1.json", "p-rank1.json"),
    ],
)
def test_ranks_and_their_files(
    start: Start, tmp_path: Path, rank: int, tensor: int, experts: bool, read: str, saved: str | None
) -> None:
    model_config = start(TOP_K).config.model_config
    parallel = SimpleNamespace(tensor_parallel_size=tensor, enable_expert_parallel=experts)
    config = SimpleNamespace(parallel_config=parallel, model_config=model_config)
    of_rank = warm_start.WarmStart(str(tmp_path / "p.json"), config, rank)
    assert of_rank.path == tmp_path / read
    assert of_rank._own_path == (None if saved is None else tmp_path / saved)


def test_slots_that_were_filled_are_in_use() -> None:
    counters = [[0, 0, 0, 3, 1, 0, 0, 0]]
    layer = Layer("l", slots=8, record_bytes=1, all_resident=False, seeded=4)
    values = metric_values([layer], counters, Rank(True, 1, 8), per_layer=False)
    assert values[USAGE, ""] == (4 + 3 - 1) / 8
