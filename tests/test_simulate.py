"""``hlwq simulate``: figures worked out by hand, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import fails, hlwq, succeeds
from matplotlib.image import imread
from traces import RECORD_BYTES, header, trace

from vllm_hlwq.errors import TraceError
from vllm_hlwq.simulate import parse_slots, replay, report
from vllm_hlwq.trace import Trace

COUNTERS = {
    "layer.0": {"steps": 4, "queries": 8, "hits": 3, "admitted": 5, "evictions": 3, "staged": 0},
    "layer.1": {"steps": 4, "queries": 9, "hits": 1, "admitted": 7, "evictions": 5, "staged": 1},
}
HEAD = header([(8, 2), (6, 2)], cache_size=2, counters=COUNTERS)
# With two slots, layer 0: 1 2 in; both hit; 1 hit, 3 for 2; 4 and 5 for 1 and 3.
# Layer 1: 0 1 in; 2 and 3 for them; 2 hit, 4 for 3; 0 and 3 for 2 and 4, and 5 staged.
STEPS = [
    (0, [[1, 2]]), (1, [[0, 1]]),
    (0, [[2, 1], [-1, -1]]), (1, [[2, 3], [-1, -1]]),
    (0, [[3, 1]]), (1, [[2, 4]]),
    (0, [[4, 5]]), (1, [[0, 3], [5, 0]]),
]  # fmt: skip


@pytest.fixture
def small() -> Trace:
    return trace(HEAD, STEPS)


def test_hits_are_the_planners(small: Trace) -> None:
    (two,) = replay(small, [2])
    assert [layer.counters for layer in two.layers] == list(COUNTERS.values())
    assert two.differences == []
    assert (two.all.queries, two.all.hits, two.all.bytes) == (17, 4, 13 * RECORD_BYTES)
    # Layer 0 cannot do better; layer 1 could have kept 0 or 3 for the last step.
    assert [layer.all.optimal_hits for layer in two.layers] == [3, 2]


def test_a_server_that_counted_otherwise_is_told(small: Trace) -> None:
    wrong = {name: dict(counts) for name, counts in COUNTERS.items()}
    wrong["layer.1"]["hits"] = 7
    small = Trace(HEAD.model_copy(update={"counters": wrong}), small.step, small.layer, small.tokens, small.expert_ids)
    two, three = replay(small, [2, 3])
    assert two.differences == ["layer.1: hits 7 live, 1 simulated"]
    assert three.differences is None  # it had two slots


def test_tokens_bytes_and_speed(small: Trace) -> None:
    found = report(small, replay(small, [2]), link=1e6, step_seconds=0.001)
    assert (found["steps"], found["tokens"], found["decode_tokens"]) == (4, 4, 4)
    row = found["slots"][0]
    assert row["all"]["bytes_per_token"] == 13 * RECORD_BYTES / 4
    # 13,000 bytes at 1 MB/s and four steps of a millisecond.
    assert row["decode"]["tokens_per_second"] == pytest.approx(4 / 0.017)
    assert row["decode"]["optimal_tokens_per_second"] == pytest.approx(4 / 0.016)
    assert row["agrees_with_the_server"] is True


def test_prompts_are_told_from_decoding() -> None:
    prompt = [[0, 1], [2, 3], [0, 2], [1, 3]] * 4  # 32 mentions, four for each of 8 experts
    made = trace(header([(8, 2)]), [(0, prompt), (0, [[0, 7]]), (0, [[0, 1]])])
    found = report(made, replay(made, [1]), link=None)
    assert (found["tokens"], found["decode_tokens"]) == (18, 2)
    row = found["slots"][0]
    # The prompt puts expert 0 into the only slot and keeps it; after it 0 is hit, and goes or stays with the next step.
    assert (row["all"]["queries"], row["decode"]["queries"]) == (8, 4)
    assert (row["all"]["hits"], row["decode"]["hits"]) == (2, 2)
    assert row["decode"]["bytes_per_token"] == RECORD_BYTES
    assert row["decode"]["tokens_per_second"] is None


@pytest.mark.parametrize(("global_experts", "decoded", "queries", "hits"), [(None, 2, 3, 0), (16, 18, 7, 1)])
def test_a_prompt_is_told_by_the_experts_of_all_ranks(
    global_experts: int | None, decoded: int, queries: int, hits: int
) -> None:
    """32 mentions are four for each of a rank's 8 experts: a prompt, which leaves expert 0 its slot; not so of 16."""
    head = header([(8, 2)])
    layer = head.layers[0].model_copy(update={"global_experts": global_experts})
    # The last token's other expert is of another rank.
    steps = [(0, [[0, 1]]), (0, [[4, 5], [6, 7]] * 8), (0, [[4, -1]])]
    made = trace(head.model_copy(update={"layers": (layer,)}), steps)
    found = report(made, replay(made, [1]), link=None)
    (row,) = found["slots"]
    assert (found["tokens"], found["decode_tokens"]) == (18, decoded)
    assert (row["decode"]["queries"], row["decode"]["hits"], row["all"]["hits"]) == (queries, hits, hits)


def test_more_slots_never_lower_the_optimum_and_it_bounds_the_planner() -> None:
    made = Trace.load(Path(__file__).parent.parent / "examples/tiny_moe/trace.safetensors")
    replays = replay(made, range(1, 16))
    for layer in range(3):
        best = [one.layers[layer].all.optimal_hits for one in replays]
        assert best == sorted(best)
        assert all(one.layers[layer].all.hits <= most for one, most in zip(replays, best, strict=True))


def test_slots_are_parsed() -> None:
    assert parse_slots("8, 4,4,16") == [4, 8, 16]
    for text in ("", "4,", "x", "-4", "1.5", "9" * 5000):
        with pytest.raises(TraceError, match=f"^--slots {text}: not a list"):
            parse_slots(text)


@pytest.mark.parametrize("slots", [0, 6, 8])
def test_slots_that_a_layer_cannot_have_are_refused(small: Trace, slots: int) -> None:
    with pytest.raises(TraceError, match=f"^--slots {slots}: layer.1 has 6 experts; give 1 to 5"):
        replay(small, [2, slots])


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(TraceError, match="the trace has no steps"):
        replay(trace(HEAD, []), [2])


def test_the_command_prints_a_table_and_writes_charts(small: Trace, tmp_path: Path) -> None:
    file, plots = tmp_path / "t", tmp_path / "plots"
    small.save(file)
    text = succeeds("simulate", file, "--slots", "2,3", "--link", "25GB/s", "--plots", plots)
    assert "23.5%" in text  # 4 of 17
    assert "2 slots: the server that recorded it counted the same" in text
    names = ["hit_rates.png", "layers.png", "tokens_per_second.png"]
    assert sorted(path.name for path in plots.iterdir()) == names
    for name in names:
        image = imread(plots / name)
        assert image.shape[1] == 1152
        assert image.std() > 0.05


def test_no_figure_is_cut_where_there_are_more_sizes_than_columns(tmp_path: Path) -> None:
    file = Path(__file__).parent.parent / "examples/tiny_moe/trace.safetensors"
    lines = succeeds("simulate", file, "--slots", ",".join(map(str, range(1, 16)))).splitlines()
    assert "…" not in "".join(lines)
    for layer in Trace.load(file).header.layers:
        (line,) = [line for line in lines if layer.name in line]
        assert line.count("%") == 15


def test_a_model_s_name_is_no_formula(small: Trace, tmp_path: Path) -> None:
    Trace(small.header.model_copy(update={"model": "a$\\frac$"}), *columns(small)).save(tmp_path / "t")
    succeeds("simulate", tmp_path / "t", "--slots", "2", "--link", "25GB/s", "--plots", tmp_path)


def test_a_trace_whose_server_counted_nothing_is_told(small: Trace) -> None:
    strange = Trace(small.header.model_copy(update={"counters": {}}), *columns(small))
    (replayed,) = replay(strange, [small.header.cache_size])
    assert replayed.differences
    assert "None live" in replayed.differences[0]


def columns(made: Trace) -> tuple[Any, ...]:
    return made.step, made.layer, made.tokens, made.expert_ids


def test_json_is_the_report(small: Trace, tmp_path: Path) -> None:
    small.save(tmp_path / "t")
    done = hlwq("simulate", tmp_path / "t", "--slots", "3,2", "--json", "--plots", tmp_path)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == report(small, replay(small, [2, 3]), None)
    assert not (tmp_path / "tokens_per_second.png").exists()


def test_an_unfinished_trace_says_so(tmp_path: Path) -> None:
    trace(HEAD.model_copy(update={"state": "running", "counters": None}), STEPS).save(tmp_path / "t")
    assert "saved while its server ran" in succeeds("simulate", tmp_path / "t", "--slots", "2")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    assert fails("simulate", tmp_path / "t", "--slots", "2") == (
        f"{tmp_path / 't'}: no such file; give one that --moe-expert-trace recorded"
    )
    (tmp_path / "t").write_text("x")
    words = ("simulate", tmp_path / "t", "--slots", "2")
    assert fails(*words, "--step-ms", "3") == (
        "--step-ms 3: for a prediction, which needs a rate too; add --link 25GB/s, say"
    )
    assert (
        fails(*words, "--link", "25GB/s", "--step-ms", "inf") == "--step-ms inf: no time; give milliseconds, like 12.5"
    )
    assert fails("simulate", tmp_path, "--slots", "2") == (
        f"{tmp_path}: cannot be read (no ordinary file); give one that --moe-expert-trace recorded"
    )
    assert fails(*words, "--plots", tmp_path / "t") == (
        f"--plots {tmp_path / 't'}: is no folder; give another, which may be one to make"
    )
    assert "not a trace of expert routing" in fails("simulate", tmp_path / "t", "--slots", "2")
