"""What the documents say of a throughput result: ratios, empty cells for what was not measured, failures by name."""

from __future__ import annotations

from typing import Any

from render_throughput import over_roofline, throughput


def row(name: str, size: int | None, speed: float, prefill: float, **figures: Any) -> dict[str, Any]:
    decoding = {"batch": 8, "new_tokens": 4, "prompt_tokens": 16, "prefill_seconds": 9.0, **figures}
    decoding |= {"decode_tokens_per_second": speed, "step_milliseconds": 8e3 / speed}
    prompt = {"batch": 1, "new_tokens": 0, "prompt_tokens": 2048, "prefill_seconds": prefill}
    return {"configuration": name, "cache_size": size, "status": "ok", "measurements": [decoding, prompt]}


def cache(size: int, speed: float, prefill: float, hits: float | None, moved: int) -> dict[str, Any]:
    return row(
        "cache", size, speed, prefill,
        decode_hit_rate=hits, decode_bytes_per_token=moved, predicted_step_milliseconds=30.0,
    )  # fmt: skip


RESULT = {
    "rows": [
        cache(4, 200.0, 0.3, 0.25, 3 * 2**20),
        cache(128, 800.0, 0.2, None, 0),
        row("resident:marlin", None, 1000.0, 0.2),
        row("uva:marlin", 4, 80.0, 0.8),
        row("prefetch:marlin", 4, 100.0, 0.4),
        {"configuration": "uva:marlin", "cache_size": 128, "status": "not run", "reason": "all experts fit"},
    ]
}


def test_tables_of_decoding_and_of_prompts() -> None:
    lines = throughput(RESULT).splitlines()
    assert lines[0] == "Decoding, 8 requests, tokens per second:"
    assert "| 4 | 200.0 | 80.0 | 100.0 | 2.00 | 20% | 25% | 3.0 | 40.00 | 30.00 |" in lines
    assert "| 128 | 800.0 |  |  |  | 80% |  | 0.0 | 10.00 | 30.00 |" in lines
    assert "| all, stock vLLM | 1,000.0 | | | | | | | 8.00 | |" in lines
    assert "| cache | 4 | 300 (1.50) |" in lines
    assert "| uva:marlin | 4 | 800 (4.00) |" in lines
    assert "| resident:marlin | all | 200 (1.00) |" in lines
    assert lines[-1] == "`uva:marlin` at 128: all experts fit."


def test_without_stock_there_are_no_ratios() -> None:
    alone = throughput({"rows": RESULT["rows"][:1]}).splitlines()
    assert "| 4 | 200.0 |  |  |  |  | 25% | 3.0 | 40.00 | 30.00 |" in alone
    assert "| cache | 4 | 300 |" in alone


def test_what_one_layer_explains_of_a_step_over_the_roofline() -> None:
    """2 layers of 3 misses each, between 2 misses that take 10 us and 4 that take 30: 2 x 20 us of 10 ms over 30."""
    found = cache(4, 200.0, 0.3, 0.25, 0) | {"expert_cache": {"layers": 2, "record_bytes": 1000}}
    found["measurements"][0]["decode_bytes_per_step"] = 6000
    everything = cache(8, 400.0, 0.3, None, 0) | {"expert_cache": {"layers": 2, "record_bytes": 1000}}
    layer = [{"tokens": 8, "slots": 4, "misses": misses, "overhead_us": us} for misses, us in ((4, 30.0), (2, 10.0))]
    others = [{"tokens": tokens, "slots": slots, "misses": 0, "overhead_us": 1.0} for tokens, slots in ((1, 4), (8, 8))]
    lines = over_roofline({"rows": [found, everything]}, {"rows": layer + others}).splitlines()
    assert [line for line in lines if line.startswith("| 8")] == ["| 8 | 4 | 3.0 | 10.00 | 0.04 | 0% |"]
    assert not any(line.startswith("| 1 ") for line in lines)
