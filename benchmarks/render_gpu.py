"""Renders what was measured on GPUs: parts of ``render.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from acceptance_engines import ENGINE_NAMES
from gpu_acceptance import all_criteria, link_rate
from gpu_speed_chart import groups


def card(environment: dict[str, Any]) -> str:
    return (
        f"{environment['gpu']}, PCIe {environment['pcie_generation']} x{environment['pcie_width']}, "
        f"vLLM {environment['vllm']}, torch {environment['torch']}, {environment['date']}"
    )


def moe_layer(result: dict[str, Any]) -> str:
    """The parts of ``moe_layer.py`` that a result has."""
    swept = "gather" in result and "cuda_sweep" in result["gather"]
    command = "--sweep" if swept else f"--parts {' '.join(part for part in LAYER_PARTS if part in result)}"
    return (
        "".join(render(result) for part, render in LAYER_PARTS.items() if part in result)
        + f"({card(result['environment'])}; made by `benchmarks/moe_layer.py {command}`.)\n"
    )


def loading(result: dict[str, Any]) -> str:
    gather = result["gather"]
    rows = "".join(
        f"| {rate['experts']} | {rate['copy_gb_per_s']:.1f} | {rate['gather_gb_per_s']:.1f} | {rate['share']:.0%} |\n"
        for rate in gather["rates"]
    )
    return (
        f"Records of {gather['record_bytes']:,} bytes (`{result['shape']}`); a launch with nothing to load takes "
        f"{gather['empty_us']:.1f} µs.\n\n"
        f"| experts a launch | copy engine, GB/s | gather, GB/s | share |\n|---|---|---|---|\n{rows}\n"
        + (kernel_variants(gather) if "cuda_sweep" in gather else "")
    )


def kernel_variants(gather: dict[str, Any]) -> str:
    """The best of each kernel over all its sizes, against the kernel as it ships."""
    tried = [*gather["sweep"], *gather["cuda_sweep"]]
    counts = list(tried[0]["gb_per_s"])
    rows = ""
    for kernel, name in KERNELS.items():
        rates = [row["gb_per_s"] for row in tried if row["kernel"] == kernel]
        rows += f"| {name} | {' | '.join(f'{max(rate[count] for rate in rates):.1f}' for count in counts)} |\n"
    return (
        "Kernels that read host memory stay below the copy engine whatever they are made of. The best of each over "
        "numbers of blocks, chunk sizes and, for bulk copies, stages, in GB/s:\n\n"
        f"| | {' | '.join(f'{count} a launch' for count in counts)} |\n|---{'|---' * len(counts)}|\n{rows}\n"
    )


KERNELS = {
    "triton": "Triton, 16-byte reads (this package)",
    "vector": "CUDA C++, 16-byte reads",
    "vector_l2_256": "CUDA C++, 16-byte reads that ask L2 for 256 bytes",
    "bulk": "CUDA C++, bulk asynchronous copies (TMA) through shared memory",
}


def inside_gemm(result: dict[str, Any]) -> str:
    """Loading and then multiplying beside reading from inside the product."""
    inside = result["inside"]
    rows = "".join(
        f"| {row['experts']} | {row['tokens']} | {row['blocks']} | {row['gather_us']:,.0f} | {row['inside_us']:,.0f} "
        f"| {row['resident_us']:,.0f} | {row['gather_gb_per_s']:.1f} | {row['inside_gb_per_s']:.1f} "
        f"| {row['ratio']:.2f} |\n"
        for row in inside["rows"]
    )
    return (
        "A layer's two products with none of the experts that they need on the GPU: loaded by the gather kernel and "
        "then multiplied, or read out of host memory by vLLM's Marlin kernels themselves, as with `--cpu-offload-gb`; "
        "and with all of them resident. In microseconds; GB/s are the missing experts' bytes over the whole time "
        f"(copy engine: {inside['copy_gb_per_s']:.1f}), blocks the blocks of rows of each expert, for every one of "
        "which the kernels read its weights.\n\n"
        "| experts | tokens | blocks | gather, then GEMM | inside the GEMM | resident | gather, GB/s | inside, GB/s "
        f"| gather / inside |\n|---|---|---|---|---|---|---|---|---|\n{rows}\n"
        f"({card(result['environment'])}; made by `benchmarks/moe_layer.py --parts gather inside`.)\n"
    )


def gpu_acceptance(result: dict[str, Any]) -> str:
    """Every promise as ``gpu_acceptance.py`` judges it today."""
    rows = "".join(
        f"| {found.promise} | {found.limit} | {found.measured} | {'yes' if found.kept else '**no**'} |\n"
        for found in all_criteria(result)
    )
    whole = "tests" in result and set(result["engines"]) == set(ENGINE_NAMES) and "earlier_seconds" not in result
    return (
        f"| promise | limit | measured | kept |\n|---|---|---|---|\n{rows}\n"
        + (f"All of it, from one command, took {result['seconds']} seconds.\n\n" if whole else "")
        + f"(Copy engine: {link_rate(result) / 1e9:.1f} GB/s. {card(result['environment'])}; made by "
        "`benchmarks/gpu_acceptance.py`.)\n"
    )


def planner(result: dict[str, Any]) -> str:
    """Microseconds of deciding a step: of each layer shape the rows with the fewest slots that were measured."""
    fewest: dict[tuple[int, int], int] = {}
    for row in result["rows"]:
        shape = row["experts"], row["top_k"]
        fewest[shape] = min(row["slots"], fewest.get(shape, row["slots"]))
    rows = ""
    for row in result["rows"]:
        if row["slots"] != fewest[row["experts"], row["top_k"]]:
            continue
        every = "" if row["every_expert_us"] is None else f"{row['every_expert_us']:.1f}"
        rows += (
            f"| {row['experts']} | {row['top_k']} | {row['slots']} | {row['tokens']} | {row['plans'][0]['us']:.1f} "
            f"| {row['plans'][-1]['us']:.1f} | {every} | {row['align_us']:.1f} | {row['blocks_us']:.1f} |\n"
        )
    worst = max(result["rows"], key=lambda row: row["growth"] or 0)
    return (
        "Deciding a step, in microseconds, for each shape with the fewest slots that were measured. With as many "
        f"misses as steps can keep up the planner takes at most {result['worst_growth']:.2f} times what it takes "
        f"without ({worst['experts']} experts, {worst['slots']} slots, {worst['tokens']} tokens).\n\n"
        "| experts | k | slots | tokens | plan, no miss | most misses | every expert named | align | blocks |\n"
        f"|---|---|---|---|---|---|---|---|---|\n{rows}\n"
    )


def layer_steps(result: dict[str, Any]) -> str:
    rows = "".join(
        f"| {row['tokens']} | {row['slots']} | {row['misses']} | {row['step_us']:.0f} | {row['resident_us']:.0f} "
        f"| {row['link_us']:.0f} | {row['overhead_us']:.0f} | {row['limit']} |\n"
        for row in result["rows"]
    )
    return (
        f"One layer's step in microseconds; the link's share is the missing experts' bytes at "
        f"{result['copy_gb_per_s']:.1f} GB/s, the overhead what neither it nor the resident layer accounts for.\n\n"
        "| tokens | slots | misses | step | resident | link | overhead | limited by |\n"
        f"|---|---|---|---|---|---|---|---|\n{rows}\n"
    )


LAYER_PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gather": loading,
    "plan": lambda result: planner(result["plan"]),
    "layer": lambda result: layer_steps(result["layer"]),
}


def gpu_speed(result: dict[str, Any]) -> str:
    """Decoding beside stock vLLM, as a picture."""
    figures = "; ".join(
        f"{group.title.replace(chr(10), ', ')}: "
        + ", ".join(f"{bar.label} {bar.tokens_per_second:,.0f}" for bar in group.bars)
        for group in groups(result)
    )
    return (
        f"![Tokens per second. {figures}](docs/gpu_speed.png)\n\n"
        "Decoding with some of the experts on the GPU: this package, stock vLLM with all of them, and stock vLLM's own "
        "offloading of experts (`uva`: `--cpu-offload-gb`, `prefetch`: `--offload-backend prefetch`) with as much GPU "
        f"memory for experts. Random INT4 weights in the shape of `{result['model']}`, routed with measured locality, "
        "CUDA graphs without torch.compile. With all experts resident the cache plans and loads nothing, so what it "
        "differs by there is how far runs differ. These are a data-centre card's figures, not a consumer card's; what "
        "was promised and missed: [docs/benchmarks.md](docs/benchmarks.md).\n\n"
        f"({card(result['environment'])}; made by `benchmarks/gpu_acceptance.py`.)\n"
    )


def serve(result: dict[str, Any]) -> str:
    """Whole servers under vLLM's own benchmark, their tokens, and the checks that were not kept."""
    rows = ""
    for row in result["servers"]:
        for found in row["measurements"]:
            rate, moved = found.get("hit_rate"), found.get("bytes_per_generated_token")
            rows += (
                f"| {row['server']} | {found['concurrency']} | {found['output_throughput']:,.0f} "
                f"| {found['median_ttft_ms']:,.0f} | {found['median_tpot_ms']:,.2f} "
                f"| {'' if rate is None else f'{rate:.1%}'} | {'' if moved is None else f'{moved / 2**20:,.2f}'} |\n"
            )
    checks = result["checks"]
    missed = "".join(f"- **missed**: {c['what']} ({c['detail']})\n" for c in checks if not c["kept"])
    return (
        f"`{result['model']}`, {result['input_tokens']} tokens in and {result['output_tokens']} out, "
        f"{result['prompts_per_client']} requests a client, routing: {result['routing']}.\n\n"
        "| server | clients | output tok/s | median TTFT, ms | median TPOT, ms | hits | MiB a generated token |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n{served_tokens(result['tokens'])}"
        f"{len([c for c in checks if c['kept']])} of {len(checks)} checks are kept{':' if missed else '.'}\n\n"
        f"{missed}{chr(10) if missed else ''}({card(result['environment'])}; made by `benchmarks/serve.py`.)\n"
    )


def served_tokens(tokens: dict[str, Any]) -> str:
    if not tokens["compared"]:
        return f"Tokens are not compared: {tokens['why']}.\n\n"
    rows = ""
    for name, found in tokens["servers"].items():
        shift = f"{found['mean_shift']:.4f}" if "mean_shift" in found else "not read"
        rows += (
            f"| {name} | {found['tokens']} | {found['distinct']} | {found['first_choices']:.1%} "
            f"| {found['mean_gap']:.3f} | {found['largest_gap']:.3f} | {shift} |\n"
        )
    return (
        "Greedy tokens against the resident server's first choice after the same past, and how far log probabilities "
        "of fixed texts are from the resident server's, its own between a text alone and in a batch:\n\n"
        "| tokens of | tokens | distinct | first choices | mean gap, nats | largest gap, nats | fixed texts, nats |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n"
    )
