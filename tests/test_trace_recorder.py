"""What a real vLLM worker records, on the CPU: replayed, it gives the worker's own counters, expert by expert."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import NUM_EXPERTS, TOP_K
from engines import LoadedModel, engine_config
from traces import equal

from vllm_hlwq import trace_file, worker
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.expert_cache import MENTIONS_OF_A_PROMPT
from vllm_hlwq.plugin import configure
from vllm_hlwq.simulate import COMPARED, replay
from vllm_hlwq.trace import Trace
from vllm_hlwq.trace_recorder import check_trace_file, path_of_rank

HIDDEN = 128
PROMPT = 300
assert PROMPT * TOP_K >= MENTIONS_OF_A_PROMPT * NUM_EXPERTS

Record = Callable[..., tuple[LoadedModel, Path]]


@pytest.fixture
def recording(qwen3_moe_bf16: Path, tmp_path: Path) -> Record:
    """Starts a model whose worker records from here on; gives it and the file."""

    def start(cache_size: int, **engine_args: int) -> tuple[LoadedModel, Path]:
        path = tmp_path / f"{cache_size}.safetensors"
        loaded = LoadedModel(qwen3_moe_bf16, cache_size, trace=path, **engine_args)
        loaded.worker.trace_recorder.start()
        return loaded, path

    return start


def run(loaded: LoadedModel, tokens: int, seed: int, padding: int = 0) -> list[torch.Tensor]:
    """A step of every layer on random routing; returns each layer's expert ids, unsorted.

    Args:
        loaded: the model.
        tokens: rows of the step.
        seed: of the routing.
        padding: how many of them, the last ones, name no expert. vLLM's router for CPUs has none of these, so such a
            step is handed to the layer's cache as other routers would.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    every = []
    for layer, runner in enumerate(loaded.runners):
        logits = 2 * torch.randn(tokens, NUM_EXPERTS, generator=generator)
        ids = logits.topk(TOP_K).indices
        if padding:
            ids[-padding:] = -1
            weights = torch.ones(tokens, TOP_K)
            runner.routed_experts.expert_cache.step(hidden, weights, ids, torch.empty_like(hidden))
        else:
            loaded.run(layer, hidden, logits)
        every.append(ids)
    loaded.worker.trace_recorder.poll()
    return every


@pytest.mark.parametrize("cache_size", [1, TOP_K, NUM_EXPERTS - 1])
def test_a_replay_counts_what_the_worker_counted(recording: Record, cache_size: int) -> None:
    """Over decoding, prompts that stream and batches with padding rows."""
    loaded, path = recording(cache_size)
    for seed, tokens in enumerate((PROMPT, 1, 1, 5, 1, 40, 1, 3, PROMPT, 1, 2)):
        run(loaded, tokens, seed, padding={3: 1, 5: 3, 40: 30}.get(tokens, 0))
    live = loaded.worker.expert_cache_counters()
    assert all(counts["hits"] for counts in live.values()) or cache_size == 1
    loaded.worker.trace_recorder.close()
    trace = Trace.load(path)
    assert (trace.header.state, trace.num_steps) == ("ended", 11)
    assert trace.header.counters == live
    (replayed,) = replay(trace, [cache_size])
    assert {layer.name: layer.counters for layer in replayed.layers} == {
        name: {key: counts[key] for key in COMPARED} for name, counts in live.items()
    }
    assert replayed.differences == []
    assert [replayed.layers[0].all.bytes, replayed.layers[1].all.bytes] == [c["h2d_bytes"] for c in live.values()]


def test_ids_are_the_routers_and_padding_has_none(recording: Record) -> None:
    loaded, path = recording(TOP_K)
    wanted = [run(loaded, 3, 0), run(loaded, 4, 1, padding=2)]
    loaded.worker.save_expert_trace()
    trace = Trace.load(path)
    for layer in range(2):
        for ids, of_step in zip(trace.steps_of(layer), wanted, strict=True):
            assert torch.equal(ids.sort().values, of_step[layer].sort().values)
    assert list(trace.steps_of(1))[1][2:].tolist() == [[-1] * TOP_K] * 2


def test_a_trace_of_one_size_foretells_another(recording: Record) -> None:
    loaded, path = recording(TOP_K)
    other, _ = recording(TOP_K + 3)
    for seed, tokens in enumerate((1, 1, PROMPT, 2, 1, 1)):
        run(loaded, tokens, seed)
        run(other, tokens, seed)
    loaded.worker.save_expert_trace()
    (replayed,) = replay(Trace.load(path), [TOP_K + 3])
    live = other.worker.expert_cache_counters()
    assert [layer.counters["hits"] for layer in replayed.layers] == [counts["hits"] for counts in live.values()]
    assert replayed.differences is None


def test_a_model_with_all_experts_resident_is_recorded_too(recording: Record) -> None:
    loaded, path = recording(NUM_EXPERTS)
    cached, other_path = recording(TOP_K)
    for seed, tokens in enumerate((1, PROMPT, 2)):
        run(loaded, tokens, seed)
        run(cached, tokens, seed)
    loaded.worker.trace_recorder.close()
    cached.worker.trace_recorder.close()
    resident, other = Trace.load(path), Trace.load(other_path)
    assert equal(Trace(other.header, resident.step, resident.layer, resident.tokens, resident.expert_ids), other)


def test_warm_up_is_not_in_it(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    loaded = LoadedModel(qwen3_moe_bf16, TOP_K, trace=path)
    run(loaded, 5, 0)
    loaded.worker.compile_or_warm_up_model()
    run(loaded, 2, 1)
    loaded.worker.shutdown()
    assert Trace.load(path).tokens.tolist() == [2, 2]


def test_a_running_server_saves_what_has_come(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    loaded = LoadedModel(qwen3_moe_bf16, TOP_K, trace=path)
    recorder = loaded.worker.trace_recorder
    recorder._new_file.keywords["save_seconds"] = 0.01
    recorder.start()
    for number in range(3):
        run(loaded, 1, number)
        saved = wait_for_steps(path, number + 1)
        assert (saved.header.state, saved.header.counters) == ("running", None)
    loaded.worker.save_expert_trace()  # between steps, so that counters go with it
    time.sleep(0.1)
    assert Trace.load(path).header.counters == loaded.worker.expert_cache_counters()
    assert Trace.load(path).header.state == "running"
    recorder.close()
    assert (Trace.load(path).header.state, Trace.load(path).num_steps) == ("ended", 3)


def wait_for_steps(path: Path, steps: int) -> Trace:
    """The file as soon as it has all layers of so many steps; at any moment before, it is absent or whole."""
    deadline = time.monotonic() + 20
    while True:
        trace = Trace.load(path) if path.exists() else None
        if trace is not None and len(trace.layer) == 2 * steps:
            return trace
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_largest_size_ends_it_aloud(recording: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(trace_file.logger, "warning", lambda text, *values: warned.append(text % values))
    loaded, path = recording(TOP_K)
    # Three steps of two layers, but not a fourth.
    loaded.worker.trace_recorder._max_bytes = 2 * 3 * (10 + TOP_K) + 13
    loaded.worker.trace_recorder.start()
    for seed in range(5):
        run(loaded, 1, seed)
    loaded.worker.trace_recorder.close()
    trace = Trace.load(path)
    assert (trace.header.state, trace.num_steps, trace.nbytes) == ("full", 3, 6 * (10 + TOP_K))
    assert trace.header.counters is None
    (warning,) = warned
    assert "RECORDING HAS ENDED (full)" in warning
    assert str(path) in warning


def test_a_file_that_cannot_be_written_is_told_and_stops_no_step(
    recording: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[str] = []
    monkeypatch.setattr(trace_file.logger, "error", lambda text, *values: errors.append(text % values))
    loaded, path = recording(TOP_K)
    run(loaded, 1, 0)
    path.mkdir()
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-trace .* could not be written: File exists"):
        loaded.worker.save_expert_trace()
    loaded.worker.trace_recorder.close()
    (error,) = errors
    assert f"{path} could not be written" in error


def test_what_could_not_be_saved_is_saved_when_there_is_room(
    recording: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the thread, without another step, and after the recording has ended."""
    errors: list[str] = []
    monkeypatch.setattr(trace_file.logger, "error", lambda text, *values: errors.append(text % values))
    loaded, path = recording(TOP_K)
    recorder = loaded.worker.trace_recorder
    recorder._new_file.keywords["save_seconds"] = 0.01
    recorder.start()
    save = Trace.save

    def full(trace: Trace, where: Path, new: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trace, "save", full)
    run(loaded, 1, 0)
    deadline = time.monotonic() + 20
    while not errors and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    (error,) = errors  # again and again, but told once
    assert "could not be written: No space left on device" in error
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(Trace, "save", save)
    assert wait_for_steps(path, 1).num_steps == 1

    recorder._max_bytes = 0
    path.unlink()
    recorder.start()
    monkeypatch.setattr(Trace, "save", full)
    run(loaded, 1, 1)
    while len(errors) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not path.exists()
    monkeypatch.setattr(Trace, "save", save)
    assert wait_for_steps(path, 0).header.state == "full"
    recorder.close()


def test_what_came_under_its_name_meanwhile_is_left_alone(recording: Record) -> None:
    """Another server's recording, which began later and was saved earlier."""
    loaded, path = recording(TOP_K)
    for moved_away in (False, True):  # once before the first save, once after it
        run(loaded, 1, 0)
        if moved_away:
            path.unlink()
            loaded.worker.save_expert_trace()
            path.rename(path.with_name("mine"))
        path.write_text("precious")
        with pytest.raises(ExpertCacheError, match=r"could not be written: File exists"):
            loaded.worker.save_expert_trace()
    loaded.worker.trace_recorder.close()
    assert path.read_text() == "precious"
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_name("mine")])


def test_where_there_are_other_ranks_a_save_does_not_fail(recording: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the first failure for the answer, and what other ranks say for that of its next call."""
    errors: list[str] = []
    monkeypatch.setattr(worker.logger, "error", lambda text, *values: errors.append(text % values))
    loaded, path = recording(TOP_K)
    run(loaded, 1, 0)
    path.write_text("precious")
    monkeypatch.setattr(loaded.config.parallel_config, "world_size", 2)
    assert loaded.worker.save_expert_trace() is None
    (error,) = errors
    assert f"{path} could not be written: File exists" in error


def test_a_trace_among_a_models_weights_is_refused(
    qwen3_moe_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads every such file of the folder when it loads the model again."""
    monkeypatch.chdir(qwen3_moe_bf16)
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-trace t.safetensors: .* holds a model.*another folder$"):
        LoadedModel(qwen3_moe_bf16, TOP_K, trace="t.safetensors")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, enable_expert_parallel=False),
        model_config=SimpleNamespace(model=str(qwen3_moe_bf16), revision=None),
        speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(model=str(tmp_path), revision=None)),
    )
    with pytest.raises(ExpertCacheError, match="holds a model"):
        check_trace_file(str(tmp_path / "t.safetensors"), 0, config)
    check_trace_file(str(tmp_path / "t.trace"), 0, config)


def test_a_file_in_the_way_is_refused_before_loading(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("precious")
    """When the configuration is complete: nothing has been started yet whose tracebacks could hide it."""
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-trace .*trace exists; move it away"):
        engine_config(qwen3_moe_bf16, TOP_K, trace=tmp_path / "trace")
    with pytest.raises(ExpertCacheError, match=r"^--moe-expert-trace .*absent does not exist; make it first"):
        engine_config(qwen3_moe_bf16, TOP_K, trace=tmp_path / "absent/trace")
    assert (tmp_path / "trace").read_text() == "precious"


def test_a_trace_without_a_cache_is_refused() -> None:
    with pytest.raises(ExpertCacheError, match=r"--moe-expert-trace .* has no meaning without --moe-expert-cache-size"):
        configure(SimpleNamespace(additional_config={"moe_expert_trace": "x"}))
    with pytest.raises(ExpertCacheError, match=r"^moe_expert_trace=3: must be the path of a file"):
        configure(SimpleNamespace(additional_config={"moe_expert_cache_size": 4, "moe_expert_trace": 3}))


@pytest.mark.parametrize(
    ("rank", "tensor", "experts", "name"),
    [
        (0, 2, False, "t.safetensors"),
        (1, 2, False, None),  # sees what rank 0 sees
        (2, 2, False, "t-rank2.safetensors"),  # the next pipeline stage
        (1, 2, True, "t-rank1.safetensors"),
        (1, 1, False, "t-rank1.safetensors"),
    ],
)
def test_each_rank_with_ids_of_its_own_has_a_file(rank: int, tensor: int, experts: bool, name: str | None) -> None:
    parallel = SimpleNamespace(tensor_parallel_size=tensor, enable_expert_parallel=experts)
    path = path_of_rank(Path("folder/t.safetensors"), rank, parallel)
    assert path == (None if name is None else Path("folder") / name)
