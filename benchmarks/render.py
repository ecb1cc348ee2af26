"""Render the result files into the documents: every figure there comes from here.

    python benchmarks/render.py

Each block between ``<!-- result: NAME -->`` and ``<!-- end -->`` is replaced by what NAME's function makes of
``benchmarks/results/NAME.json``, in the README and in ``docs/``, and the README's picture is drawn. A test fails when a
document differs from a fresh rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_speed_chart
import render_gpu
import render_hlwq
import throughput_report
from kv_cache_bars import kv_bars
from render_throughput import over_roofline, throughput
from soak_report import soak

from vllm_hlwq.plan_cli import GPU_COLUMNS, NOTE, gpu_rows

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
RESULTS = PROJECT / "benchmarks/results"
BLOCK = re.compile(r"(<!-- result: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MIB = 2**20


def machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['device'].upper()} run, {environment['processor']}, {environment['cores']} threads, "
        f"vLLM {environment['vllm']}, torch {environment['torch']}, {environment['date']}"
    )


def tiny_moe(result: dict[str, Any]) -> str:
    training = result["training"]
    tokens = training["steps"] * training["batch"] * training["context"]
    cost = result["perplexity_hlwq"] / result["perplexity_bf16"] - 1
    return (
        f"Trained on {tokens:,} tokens ({training['environment']['device']}, {training['minutes']:.1f} minutes); "
        f"{training['parameters']:,} parameters. Held-out perplexity over {result['held_out_tokens']:,} tokens: "
        f"**{result['perplexity_bf16']:.2f}** in BF16, **{result['perplexity_hlwq']:.2f}** at {result['bits']} bits "
        f"(+{cost:.2%}; {result['hlwq_bytes'] / MIB:.2f} MiB, what ships; its tied embedding is kept in 16 bit), "
        f"**{result['perplexity_int4']:.2f}** in its "
        f"INT4 sibling (group size {result['group_size']}, what is served). A sample at temperature 0.6, prompted by "
        f"“{result['prompt']}”:\n\n```text\n{(result['prompt'] + result['sample']).strip()}\n```\n\n"
        f"({machine(result['environment'])}; made by `examples/tiny_moe/quantize.py`.)\n"
    )


def load_memory(result: dict[str, Any]) -> str:
    large, tiny = result["with_large_experts"], result["with_tiny_experts"]
    rows = [
        ("expert weights in the checkpoint", result["expert_bytes"], ""),
        (
            "peak of the loading process, outside mapped files",
            large["loading_peak"],
            f"{result['peak_over_limit']:.2f} of 1.1 times the experts + 1 GiB",
        ),
        (
            "afterwards, above the same server with tiny experts",
            result["settled_above_tiny"],
            f"{result['settled_over_limit']:.2f} of 1.02 times the experts + 64 MiB",
        ),
        ("of which slot and staging banks, which a GPU would hold", large["banks"] - tiny["banks"], ""),
    ]
    table = "".join(f"| {what} | {amount / MIB:,.0f} | {limit} |\n" for what, amount, limit in rows)
    return (
        f"| host memory of the whole server | MiB | against its limit |\n|---|---|---|\n{table}\n"
        f"({machine(result['environment'])}; made by `benchmarks/load_memory.py`.)\n"
    )


def codec(result: dict[str, Any]) -> str:
    speed, memory = result["speed"], result["memory"]
    rows = "".join(
        f"| {row['what']} | {row['bits']} | {row['seconds'] * 1000:.0f} | {row['ratio']:.2f} | {row['limit'] or ''} |\n"
        for row in speed["rows"]
    )
    peaks = "".join(
        f"| `hlwq {name}` | {command['peak'] / MIB:,.0f} | {memory['limit'] / MIB:,.0f} | {command['seconds']:.0f} |\n"
        for name, command in memory["commands"].items()
    )
    return (
        f"{speed['weights'] / 1e6:.1f} million float32 weights, median of {speed['repeats']}. The unit is their bare "
        f"block-Hadamard product in the same run, {speed['product_seconds'] * 1000:.1f} ms at its best of "
        f"{speed['product_blocks_at_a_time']:,} blocks at a time ({machine(speed['environment'])}).\n\n"
        f"| | bits | ms | in units of the product | at most |\n|---|---|---|---|---|\n{rows}\n"
        f"Converting a model of {memory['model_bytes'] / 2**30:.1f} GiB, with Python and its libraries "
        f"({machine(memory['environment'])}):\n\n"
        f"| | peak of anonymous memory, MiB | at most | seconds |\n|---|---|---|---|\n{peaks}\n"
        "(Made by `benchmarks/codec.py`.)\n"
    )


def quality(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        cost = row["over_bf16"]
        change = f"{cost['relative']:+.2%} ± {cost['standard_error']:.2%}" if row["relative_mse"] else ""
        errors = [f"{row[key]:.6f}" if row[key] else "0" for key in ("relative_mse", "experts_relative_mse")]
        lines.append(
            f"| {row['name']} | {row['bytes'] / MIB:.2f} | {errors[0]} | {errors[1]} | {row['perplexity']:.3f} "
            f"| {change} |"
        )
    bars = "".join(
        f"- {'holds' if bar['holds'] else '**missed**'} ({bar['relative']:+.2%}): {bar['bar']}\n"
        for bar in result["bars"]
    )
    other = result["llm_compressor"]
    versions = "" if other is None else ", ".join(f"{name} {version}" for name, version in other["versions"].items())
    table = "\n".join(lines)
    kinds = result["synthetic"]
    head = "".join(f" | {row['kind']}" for row in kinds)
    ideas = "".join(
        f"| {idea} | " + " | ".join(f"{row['relative_mse'][idea]:.6f}" for row in kinds) + " |\n"
        for idea in kinds[0]["relative_mse"]
    )
    return (
        f"Held-out perplexity over {result['held_out_tokens']:,} tokens.\n\n"
        "| | MiB | error | of experts | perplexity | above BF16 |\n|---|---|---|---|---|---|\n"
        f"{table}\n\nAgainst what was asked of it:\n\n{bars}\n"
        "## Weights of other kinds\n\n"
        "Relative mean squared error at 5 bits of 512 blocks each, by what is done to lower it.\n\n"
        f"|{head} |\n|---{'|---' * len(kinds)}|\n{ideas}\n"
        f"({machine(result['environment'])}; llm-compressor's environment: {versions}; "
        "made by `benchmarks/quality.py`.)\n"
    )


def codec_ideas(result: dict[str, Any]) -> str:
    first = result["ideas"][0]["relative_mse"]
    bits = list(first["normal"])
    head = "".join(f" | {weights}, {width} bits" for weights in first for width in bits)
    rows = "".join(
        f"| {row['idea']} | {'yes' if row['kept'] else ''} | "
        + " | ".join(f"{error:.6f}" for by_width in row["relative_mse"].values() for error in by_width.values())
        + " |\n"
        for row in result["ideas"]
    )
    return (
        f"Relative mean squared error of {result['blocks']:,} Gaussian blocks and of as many of the tiny model's.\n\n"
        f"| | kept{head} |\n|---|---{'|---' * len(first) * len(bits)}|\n{rows}\n"
        f"({machine(result['environment'])}; made by `benchmarks/codec_ideas.py`.)\n"
    )


def kv_cache(result: dict[str, Any]) -> str:
    environment = result["environment"]
    verdicts = "".join(
        f"- {'holds' if bar['holds'] else '**missed**'} ({bar['value']:.2f}): {bar['bar']}\n" for bar in kv_bars(result)
    )
    steps = "".join(
        f"| {model['model']} | {row['cache']} | {row['ms']:.1f} | {row['ratio']:.2f} |\n"
        for model in result["speed"]
        for row in model["rows"]
    )
    speed = result["speed"][0]
    return (
        f"Against what was asked of it:\n\n{verdicts}\n## Time\n\n"
        f"A step of one token after {speed['length']:,}, median of {speed['steps']} (of {speed['slow_steps']} for "
        f"those that decode), the caches in turn; threads: {environment['cores']}. The ratios count: milliseconds "
        "depend on what else the machine does.\n\n"
        f"| model | cache | ms | of BF16's |\n|---|---|---|---|\n{steps}\n"
        f"{kv_bytes(result['models'])}{kv_accuracy(result)}"
        f"({machine(environment)}; made by `benchmarks/kv_cache.py`.)\n"
    )


def kv_bytes(models: dict[str, Any]) -> str:
    text = "## Bytes\n\nAll that a cache holds, in MiB, room that is not filled yet included.\n"
    for name, model in models.items():
        head = "".join(f" | {length:,}" for length in model["lengths"])
        rows = "".join(
            f"| {cache} | "
            + " | ".join([f"{size / MIB:,.2f}" for size in sizes] + [""] * (len(model["lengths"]) - len(sizes)))
            + " |\n"
            for cache, sizes in model["bytes"].items()
        )
        parts = "; ".join(
            f"{int(length):,} tokens: "
            + ", ".join(f"{kind.replace('_', ' ')} {size / MIB:,.2f}" for kind, size in kinds.items())
            for length, kinds in model["kinds"].items()
        )
        text += f"\n{name}:\n\n|{head} |\n|---{'|---' * len(model['lengths'])}|\n{rows}\n"
        text += f"At 3 bits these are, in MiB, at {parts}.\n"
        for reason in sorted(set(model["skipped"].values())):
            caches = ", ".join(cache for cache, why in model["skipped"].items() if why == reason)
            text += f"\nLeft out: {caches}: “{reason}”.\n"
    return text + "\n"


def kv_accuracy(result: dict[str, Any]) -> str:
    cosines = "".join(f"| {row['cache']} | {row['keys']:.4f} | {row['values']:.4f} |\n" for row in result["cosines"])
    perplexity = "".join(
        f"| {row['cache']} | {'' if row['window'] is None else row['window']} | {row['perplexity']:.3f} | "
        + ("" if row["window"] is None else f"{row['relative']:+.2%} ± {row['error']:.2%}")
        + " |\n"
        for row in result["perplexity"]
    )
    return (
        f"## Accuracy\n\nThe shipped tiny model, {result['texts']} held-out texts of {result['context']} tokens: mean "
        "cosine of its keys and values with what a cache makes of them, and perplexity of each text's second half, "
        "one token a step. It has one layer of full attention.\n\n"
        f"| | keys | values |\n|---|---|---|\n{cosines}\n"
        f"| | exact window | perplexity | above BF16 |\n|---|---|---|---|\n{perplexity}\n"
    )


def sizing(result: dict[str, Any]) -> str:
    """The table of ``hlwq plan`` for each model, and the parts of one GPU's memory."""
    return "".join(plan_tables(name, report) for name, report in result.items()) + f"{NOTE}\n"


def plan_tables(name: str, report: dict[str, Any]) -> str:
    settings, target = report["settings"], report["target"]
    rows = "".join(f"| {' | '.join(row)} |\n" for row in gpu_rows(report))
    parts = {name.replace("_", " "): size for name, size in target["beside_experts"].items()}
    parts |= {f"{target['slots']} slots a layer": target["slot_bytes"], "staging": target["staging_bytes"]}
    cells = "".join(f"| {part} | {size / MIB:,.0f} |\n" for part, size in parts.items())
    return (
        f"### {name} in INT4\n\n"
        f"`hlwq plan MODEL --context {settings['context']} --max-num-seqs {settings['max_num_seqs']}`: "
        f"{report['layers']} layers of {report['experts']} experts, {report['top_k']} of them a token; "
        f"{report['expert_bytes']:,} bytes an expert, {report['slot_bytes'] / MIB:,.0f} MiB for one slot in every "
        f"layer, {report['all_experts_bytes'] / 2**30:.1f} GiB for all experts.\n\n"
        f"| {' | '.join(GPU_COLUMNS)} |\n|{'---|' * len(GPU_COLUMNS)}\n{rows}\n"
        f"Of {target['gpu']}, {target['granted'] / MIB:,.0f} MiB are granted:\n\n| | MiB |\n|---|---|\n{cells}"
        f"| **together** | {target['vram_bytes'] / MIB:,.0f} |\n\n"
    )


def routing_traces(result: dict[str, Any]) -> str:
    live = "".join(
        f"| {row['slots']} | {row['steps']:,} | {row['queries']:,} | {row['live_hits']:,} "
        f"| {row['simulated_hits']:,} | {len(row['differences']) or 'none'} |\n"
        for row in result["live"]
    )
    curve = "".join(
        f"| {row['slots']} | {row['hit_rate']:.1%} | {row['optimal_hit_rate']:.1%} "
        f"| {min(row['layer_hit_rates']):.1%} to {max(row['layer_hit_rates']):.1%} "
        f"| {row['decode_bytes_per_token'] / 1e3:,.0f} |\n"
        for row in result["slots"]
    )
    return (
        "Servers of the demo's model with several cache sizes recorded the same requests; of each the trace was "
        "replayed with the same number of slots. Every counter of every layer was compared:\n\n"
        "| slots | steps | experts needed | hits, counted live | hits, simulated | differences |\n"
        f"|---|---|---|---|---|---|\n{live}\n"
        f"The trace of {result['shipped_slots']} slots ships as `examples/tiny_moe/trace.safetensors` "
        f"({result['tokens']:,} tokens, {result['decode_tokens']:,} of them decoded, {result['file_bytes']:,} bytes). "
        "What it says of every cache size of this small model, which spreads its tokens widely:\n\n"
        "| slots | hit rate | optimum | by layer | kB a decoded token |\n"
        f"|---|---|---|---|---|\n{curve}\n"
        "![Hit rate over slots: the cache, each of its layers, and Belady's optimum](routing_traces.png)\n\n"
        f"({machine(result['environment'])}; made by `benchmarks/routing_traces.py`.)\n"
    )


def warm_start(result: dict[str, Any]) -> str:
    rows = "".join(
        f"| {row['slots']} of {result['experts']} | {row['cold']['hit_rate']:.1%} | {row['warm']['hit_rate']:.1%} "
        f"| {row['cold']['h2d_bytes'] / 1e6:.1f} | {row['warm']['h2d_bytes'] / 1e6:.1f} |\n"
        for row in result["rows"]
    )
    return (
        f"Hits among the experts that a new server needed for its first {result['tokens']} tokens, over "
        f"{result['requests']} servers each, whose first requests were not among those that the profile's server had "
        f"answered (the tiny model: {result['experts']} experts, {result['top_k']} a token). Answers were the same:\n\n"
        "| slots | slots empty | from a profile | MB copied, slots empty | from a profile |\n|---|---|---|---|---|\n"
        f"{rows}\n({machine(result['environment'])}; made by `benchmarks/warm_start.py`.)\n"
    )


def start_up(result: dict[str, Any]) -> str:
    def row(what: str, key: str, scale: float = MIB, form: str = ",.0f") -> str:
        return f"| {what} | {result['first'][key] / scale:{form}} | {result['second'][key] / scale:{form}} |\n"

    of = f"of {result['first']['checkpoint_experts_bytes'] / MIB:,.0f}"
    others = f"of {result['first']['checkpoint_others_bytes'] / MIB:,.0f}"
    return (
        f"A random checkpoint in the shape of {result['shape']} with {result['layers']} layers, on the reference "
        "backend. Nothing was in the page cache before; read is what was in it afterwards, with what the kernel reads "
        "ahead:\n\n"
        "| | first start | second start |\n|---|---|---|\n"
        + row("layers from files", "layers_restored", 1)
        + row(f"MiB of experts read from the checkpoint, {of}", "checkpoint_experts_read")
        + row(f"MiB of other weights read from it, {others}", "checkpoint_others_read")
        + row("MiB read from the kept files", "kept_bytes_read")
        + row("seconds for that, checksums included", "kept_seconds", 1, ".1f")
        + row("seconds of vLLM's loading from the checkpoint", "loading_seconds", 1, ".1f")
        + f"\n({machine(result['environment'])}; made by `benchmarks/start_up.py`. The reference backend converts "
        "nothing, so the time that conversion takes on a GPU is not in it.)\n"
    )


THROUGHPUT = tuple(
    f"throughput_{shape}_{routing}" for shape in ("gemma4", "qwen3") for routing in ("measured_locality", "uniform")
)
"""Results of ``throughput.py`` on GPUs; each has a picture of its name in ``docs/``."""


def throughput_block(name: str) -> Callable[[dict[str, Any]], str]:
    """Renders such a result with its picture."""
    picture = f"![Tokens per second over experts resident per layer; the figures are in the tables]({name}.png)\n\n"

    def render_result(result: dict[str, Any]) -> str:
        repeats = max(m["repeats"] for row in result["rows"] for m in row.get("measurements", ()))
        return (
            f"`{result['model']}`, routing: {result['routing']}, each case timed {repeats} times.\n\n"
            f"{picture}{throughput(result)}\n"
            f"(Link: {result['link_bytes_per_second'] / 1e9:.1f} GB/s. {render_gpu.card(result['environment'])}; made "
            "by `benchmarks/throughput.py`.)\n"
        )

    return render_result


def gemma_over_roofline(result: dict[str, Any]) -> str:
    """Of the shape of which one layer has been taken apart."""
    steps = result_of("moe_layer_steps")
    return (
        f"{over_roofline(result, steps['layer'])}"
        f"({render_gpu.card(result['environment'])}; made by `benchmarks/throughput.py`. "
        f"{render_gpu.card(steps['environment'])}; made by `benchmarks/moe_layer.py --parts plan layer`.)\n"
    )


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tiny_moe": tiny_moe,
    "load_memory": load_memory,
    "codec": codec,
    "quality": quality,
    "codec_ideas": codec_ideas,
    "moe_layer": render_gpu.moe_layer,
    "moe_layer_steps": render_gpu.moe_layer,
    "inside_gemm": render_gpu.inside_gemm,
    "inside_gemm_h200": render_gpu.inside_gemm,
    "serve": render_gpu.serve,
    "serve_trained": render_gpu.serve,
    **{name: throughput_block(name) for name in THROUGHPUT},
    "over_roofline": gemma_over_roofline,
    "gpu_acceptance": render_gpu.gpu_acceptance,
    "gpu_acceptance_h100": render_gpu.gpu_acceptance,
    "gpu_acceptance_slower_link": render_gpu.gpu_acceptance,
    "gpu_speed": render_gpu.gpu_speed,
    "sizing": sizing,
    "kv_cache": kv_cache,
    "routing_traces": routing_traces,
    "warm_start": warm_start,
    "start_up": start_up,
    "soak": lambda result: f"{soak(result)}\n({machine(result['environment'])}; made by `benchmarks/soak.py`.)\n",
    "hlwq_linear": lambda result: render_hlwq.hlwq_linear(result, machine(result["linear"]["environment"])),
    "hlwq_gpu": lambda result: render_hlwq.hlwq_gpu(result, render_gpu.card),
    "hlwq_load": lambda result: render_hlwq.hlwq_load(result, machine(result["environment"])),
}


SAME_RESULT = {"gpu_speed": "gpu_acceptance", "over_roofline": "throughput_gemma4_measured_locality"}


def result_of(name: str) -> dict[str, Any]:
    """The result file of a block."""
    found: dict[str, Any] = json.loads((RESULTS / f"{SAME_RESULT.get(name, name)}.json").read_text())
    return found


def render(text: str) -> str:
    """A document's text with every result block made anew."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return match[1] + RENDERERS[name](result_of(name)) + match[3]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(render(document.read_text()))
    (PROJECT / "docs/gpu_speed.png").write_bytes(gpu_speed_chart.draw(result_of("gpu_speed")))
    for name in THROUGHPUT:
        throughput_report.draw_chart(result_of(name), PROJECT / f"docs/{name}.png")
