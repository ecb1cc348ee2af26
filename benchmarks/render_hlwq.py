"""Renders what HLWQ costs where it is computed from or loaded: parts of ``render.py``."""

from __future__ import annotations

from typing import Any

MIB = 2**20
LINEAR_LIMIT, SHARE_LIMIT, LOADING_LIMIT = 3.0, 0.8, 2.0


def _verdict(holds: bool) -> str:
    return "holds" if holds else "**missed**"


def _shared(load_average: float) -> str:
    beside = "other work of lower priority on the same cores, " if load_average > 1 else ""
    return f"{beside}load average {load_average:.1f} before"


def hlwq_linear(result: dict[str, Any], machine: str) -> str:
    linear, load = result["linear"], result["load"]
    rows = "".join(
        f"| {row['tokens']} | {row['clock']} | {row['bf16_seconds'] * 1000:.2f} | {row['coded_seconds'] * 1000:.2f} "
        f"| {row['ratio']:.2f} |\n"
        for row in linear["rows"]
    )
    at_64 = [row["ratio"] for row in linear["rows"] if row["tokens"] == 64]
    return (
        f"A layer of {linear['side']} x {linear['side']}, weights as {linear['bits_per_weight']:.3f}-bit codes, "
        "against torch's BF16 product, in turn; medians.\n\n"
        f"| tokens | clock | BF16, ms | coded, ms | ratio |\n|---|---|---|---|---|\n{rows}\n"
        f"At 64 tokens at most {LINEAR_LIMIT:.1f} times, by either clock: {_verdict(max(at_64) <= LINEAR_LIMIT)}.\n\n"
        f"`from_pretrained` of {load['weights'] / 1e6:.0f} million coded weights, decoded to BF16, files read and "
        f"every SHA-256 sum checked: {load['load_seconds']:.2f} s, the codec's own decoding of them "
        f"{load['codec_seconds']:.2f} s. That is {load['share_of_codec']:.0%} of the codec's rate by the clock; at "
        f"least {SHARE_LIMIT:.0%}: {_verdict(load['share_of_codec'] >= SHARE_LIMIT)}. By processor time it is "
        f"{load['share_of_codec_processor']:.0%}.\n\n({machine}; {_shared(linear['load_average_before'])}; "
        "made by `benchmarks/hlwq_linear.py`.)\n"
    )


def hlwq_load(result: dict[str, Any], machine: str) -> str:
    rows = "".join(
        f"| {name} | {result[key]['loading']:.2f} | {result[key]['ready']:.1f} | {result[key]['peak'] / MIB:,.0f} |\n"
        for key, name in (
            ("hlwq", "HLWQ, served directly"),
            ("hlwq_kept", "HLWQ, experts kept by an earlier start"),
            ("int4", "its exported INT4 sibling"),
        )
    )
    parts = result["parts"]
    return (
        f"{result['expert_bytes_bf16'] / MIB:,.0f} MiB of experts in BF16, "
        f"{result['expert_bytes_int4'] / MIB:,.0f} MiB in INT4; medians of "
        f"{len(result['runs']['hlwq'])} starts of each, in turn.\n\n"
        "| checkpoint | loading weights, s | until it answers, s | peak of the loading process, MiB |\n"
        "|---|---|---|---|\n"
        f"{rows}\nLoading takes {result['loading_ratio']:.2f} times as long; at most {LOADING_LIMIT:.0f}: "
        f"{_verdict(result['loading_ratio'] <= LOADING_LIMIT)}. The start as a whole takes "
        f"{result['ready_ratio']:.2f} times as long, with kept experts {result['kept_ready_ratio']:.2f} times "
        "(reading them is not in vLLM's seconds of loading).\n\n"
        f"The peak is {result['peak_over_limit']:.2f} of the INT4 experts + "
        f"2 GiB, its limit: {_verdict(result['peak_over_limit'] <= 1)}.\n\n"
        f"By themselves, in processor seconds: decoding {parts['decode_processor']:.2f}, decoding and quantising to "
        f"INT4 {parts['decode_and_quantise_processor']:.2f}.\n\n"
        f"({machine}; {_shared(result['load_average_before'])}; made by `benchmarks/hlwq_load.py`.)\n"
    )
