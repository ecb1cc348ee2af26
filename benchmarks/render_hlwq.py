"""Renders what HLWQ costs where it is computed from or loaded: parts of ``render.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MIB, GIB = 2**20, 2**30
LINEAR_LIMIT, SHARE_LIMIT, LOADING_LIMIT = 3.0, 0.8, 2.0
ONE_TOKEN_LIMIT = 1.0
"""On a GPU, in units of BF16's product."""


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
    return (
        f"{_starts(result)}\n"
        f"({machine}; {_shared(result['load_average_before'])}; made by `benchmarks/hlwq_load.py`.)\n"
    )


def _starts(result: dict[str, Any]) -> str:
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
        f"INT4 {parts['decode_and_quantise_processor']:.2f}.\n"
    )


def hlwq_gpu(result: dict[str, Any], machine: Callable[[dict[str, Any]], str]) -> str:
    """All parts that were measured on a GPU; ``machine`` describes an environment."""
    parts = {"convert": _convert, "linear": _linear_on_gpu, "load": _starts, "cache": _cache_on_gpu}
    return "\n".join(
        f"{render(result[part])}\n({machine(result[part]['environment'])}; made by "
        f"`benchmarks/hlwq_gpu.py --parts {part}`.)\n"
        for part, render in parts.items()
        if part in result
    )


def _convert(convert: dict[str, Any]) -> str:
    def name(row: dict[str, Any]) -> str:
        return f"`hlwq {row['command']}{' --fit ' + row['fit'] if row['fit'] else ''}`"

    commands = "".join(
        f"| {name(row)} | {row['seconds']:.1f} | {row['wall_seconds']:.1f} | {row['weights_per_second'] / 1e6:,.0f} "
        f"| {row['read_gb_per_second']:.2f} | {row['host_peak_bytes'] / GIB:.1f} "
        f"| {(row['gpu_peak_bytes'] or 0) / GIB:.1f} |\n"
        for row in convert.get("commands", ())
    )
    codec = "".join(
        f"| {row['what']} | {row['rows']} x {row['columns']} | {row['weights_on']} | {row['seconds'] * 1000:.2f} "
        f"| {row['weights_per_second'] / 1e6:,.0f} |\n"
        for row in convert["codec"]
    )
    rates = ", ".join(
        f"{key.removesuffix('_gb_per_second').replace('_', ' ')} {rate:.1f}"
        for key, rate in convert.get("machine", {}).items()
    )
    return (
        f"Conversion on `--device {convert['device']}` of a random BF16 model in the shape of `{convert['shape']}`, "
        f"{convert['layers']} of {convert['of_layers']} layers, {convert.get('source_bytes', 0) / GIB:.1f} GiB, its "
        f"files in the page cache, with {convert['environment']['cores']} threads. Reading, hashing, writing, syncing "
        "and reading back are in it; the second column also has Python's start. Peaks are the process's own memory "
        "and what torch held on the GPU.\n\n"
        "| | s | with imports, s | million weights/s | GB/s read | host, GiB | GPU, GiB |\n"
        "|---|---|---|---|---|---|---|\n"
        f"{commands}\nThe codec alone, on BF16 matrices on the GPU, and of an expert in host memory:\n\n"
        f"| | matrix | weights on | ms | million weights/s |\n|---|---|---|---|---|\n{codec}\n"
        f"What conversions do with their bytes besides, on one thread, in GB/s: {rates}.\n"
    )


def _linear_on_gpu(linear: dict[str, Any]) -> str:
    rows = "".join(
        f"| {row['tokens']} | {row['bf16_seconds'] * 1e6:.1f} | {row['coded_seconds'] * 1e6:.1f} "
        f"| {row['ratio']:.2f} |\n"
        for row in linear["rows"]
    )
    at_1 = max(row["ratio"] for row in linear["rows"] if row["tokens"] == 1)
    return (
        f"A layer of {linear['side']} x {linear['side']}, weights as {linear['bits_per_weight']:.3f}-bit codes, "
        "against torch's BF16 product; times of kernels in replayed graphs, over more weights than the second-level "
        f"cache holds.\n\n| tokens | BF16, µs | coded, µs | ratio |\n|---|---|---|---|\n{rows}\n"
        f"Rotating one token takes {linear['rotation_us']:.1f} µs of it. At one token at most {ONE_TOKEN_LIMIT:.1f} "
        f"times: {_verdict(at_1 <= ONE_TOKEN_LIMIT)}.\n"
    )


def _cache_on_gpu(cache: dict[str, Any]) -> str:
    exact = {row["model"]: row["ms"] for row in cache["rows"] if row["cache"] == "BF16"}
    rows = "".join(
        f"| {row['model']} | {row['cache']} | {row['bytes'] / MIB:,.1f} | {row['ms']:.2f} "
        f"| {row['ms'] / exact[row['model']]:.2f} |\n"
        for row in cache["rows"]
    )
    values = cache["values"]
    return (
        f"The KV cache: a step of one token after {cache['length']:,}, median of {cache['steps']}. On a GPU every step "
        "decodes each layer's history.\n\n"
        f"| model | cache | MiB | ms | of BF16's |\n|---|---|---|---|---|\n{rows}\n"
        f"Of the same vectors {values['codes_differing']:.1e} of the codes are not the CPU's; values of the same codes "
        f"differ from the CPU's by {values['largest_difference']:.2f} of what rounding allows.\n"
    )
