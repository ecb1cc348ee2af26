"""What the benchmarks time of a real engine on a CPU: the steps that decode the whole batch, and no others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_run import Engine, decode_figures, measure, step_milliseconds

pytestmark = pytest.mark.server

CHUNK, PROMPT = 16, 12
BORDER = 4
"""The engine's step in which the last of four prompts is read to its end: they come in chunks of 16 tokens, of which
one goes to each prompt that has been read: 12 + 4, 1 + 8 + 7, 1 + 1 + 5 + 9, and 1 + 1 + 1 + 3."""


@pytest.fixture(scope="module")
def engine(tiny_int4: Path) -> Iterator[Engine]:
    """One that reads few tokens a step, with 4 of 16 experts resident."""
    arguments = {
        "additional_config": {"moe_expert_cache_size": 4}, "enforce_eager": True, "max_model_len": 128,
        "max_num_batched_tokens": CHUNK, "max_num_seqs": 4, "enable_prefix_caching": False, "language_model_only": True,
    }  # fmt: skip
    made = Engine(str(tiny_int4), True, arguments)
    made.timed(made.prompts("warm-up", 4, PROMPT), 3)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


def test_steps_begin_when_the_last_prompt_has_been_read(engine: Engine) -> None:
    prompts = engine.prompts("late", 4, PROMPT)
    begin = time.monotonic()
    found = engine.decoded(prompts, 20)
    whole = time.monotonic() - begin
    # The first prompt has 4 tokens by then, and ends after 16 more.
    assert found.steps == 20 - BORDER
    # All engine steps: until the border, of the whole batch, and those that the last prompts need to their end.
    share = found.steps / (BORDER + found.steps + (BORDER - 1))
    assert 0.5 * share * whole < found.seconds < whole


def test_the_steps_of_one_prompt_are_its_tokens_but_the_first(engine: Engine) -> None:
    assert engine.decoded(engine.prompts("alone", 1, PROMPT), 9).steps == 8
    assert engine.decoded(engine.prompts("alone", 1, PROMPT), 1).steps == 0


def test_the_counters_are_those_of_the_same_steps(engine: Engine) -> None:
    figures = measure(engine, 1, PROMPT, 8, 3)
    assert figures["counted_decode_steps"] in (7, 8)  # the engine may be a step ahead when it is asked
    assert len(figures["step_milliseconds_each"]) == 3
    assert figures["step_milliseconds"] == sorted(figures["step_milliseconds_each"])[1]
    assert figures["decode_tokens_per_second"] == pytest.approx(1e3 / figures["step_milliseconds"])


def test_a_batch_that_is_never_whole_is_refused(engine: Engine) -> None:
    found = engine.decoded(engine.prompts("short", 4, PROMPT), BORDER - 1)
    assert found.steps < 1
    with pytest.raises(RuntimeError, match=r"of 4 prompts of 12 tokens the first was done before.*--new-tokens"):
        step_milliseconds(found, 4, PROMPT)


def test_figures_are_those_of_the_middle_repeat() -> None:
    figures = decode_figures([7.0, 4.0, 5.0], 8)
    assert figures["step_milliseconds"] == 5
    assert figures["decode_tokens_per_second"] == 1600
