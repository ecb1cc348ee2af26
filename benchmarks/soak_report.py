"""What a soak's result says, for the documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

MIB = 2**20


def soak(result: dict[str, Any]) -> str:
    requests, ends, tokens, counters = (result[name] for name in ("requests", "ends", "tokens", "counters"))
    judged = tokens["judged"]
    problems = "".join(f"- {problem}\n" for problem in result["problems"]) or "- none\n"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in requests.items())
    return (
        f"{result['load_minutes']:g} minutes of load, {result['total_minutes']:g} with everything else: {kinds}. "
        f"{ends['length']:,} requests were answered in full, {ends['abort']:,} aborted, {ends['left']:,} left by their "
        f"clients; the KV cache ran out {result['preemptions']:,} times.\n\n"
        f"- **Tokens**: clients heard {tokens['tokens']:,} tokens in {tokens['sequences']:,} sequences; "
        f"{tokens['unlike_transcript']:,} sequences are not in the transcript or go beyond it. Of "
        f"{judged['tokens']:,} tokens judged by stock vLLM, {judged['first_choices']:,} are its first choice, "
        f"{judged['near_ties']:,} nearly, **{judged['wrong']:,} wrong**.\n"
        f"- **Cache**: {counters['queries']:,} queries = {counters['hits']:,} hits + {counters['admitted']:,} admitted "
        f"+ {counters['staged']:,} staged, the same on `/metrics`; {result['audits']:,} audits of tables and slots.\n"
        "- **What did not hold**:\n\n"
        f"{problems}\n"
        "| process | MiB at first | over the load | middle third | last third |\n"
        f"|---|---|---|---|---|\n{_memory(result['memory'])}\n"
        "| fault, in mid-stream | server | exit code | seconds to the end | streams | processes left | shared memory "
        "|\n"
        f"|---|---|---|---|---|---|---|\n{_faults(result['faults'])}"
    )


def _memory(memory: dict[str, dict[str, Any]]) -> str:
    rows = ""
    for role, found in memory.items():
        course = " ".join(f"{value / MIB:,.0f}" for value in found["course"])
        thirds = " | ".join(f"{found[name] / MIB:,.1f}" for name in ("middle_third", "last_third"))
        rows += f"| {role} | {found['first'] / MIB:,.1f} | {course} | {thirds} |\n"
    return rows


def _faults(faults: list[dict[str, Any]]) -> str:
    rows = ""
    for fault in faults:
        for who, found in fault.items():
            ends = ", ".join(f"{count} {end}" for end, count in found["ends"].items())
            left = found["left"]
            shared = ", ".join(f"{count} {kind}" for kind, count in Counter(left["shared_memory"]).items())
            rows += (
                f"| {found['name']} | {'with the cache' if who == 'ours' else 'stock'} | {found['exit_code']} "
                f"| {found['seconds']:g} | {ends} | {', '.join(left['processes']) or 'none'} | {shared or 'none'} |\n"
            )
    return rows
