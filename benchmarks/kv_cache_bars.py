"""The bars that were set for the KV cache beforehand, and whether a result clears them."""

from __future__ import annotations

from typing import Any

FEWER_BYTES, SLOWER = 4.5, 1.25
"""Of a coded token's bytes at head_dim 256 and 3 bits, and of a step's time after 4,096 tokens."""


def kv_bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar in words, the value measured, and whether it holds."""
    ratio = round(result["coded_ratio"], 3)
    text = f"coded tokens at head_dim 256, 3 bits: at least {FEWER_BYTES} times fewer bytes than BF16"
    found = [{"bar": text, "value": ratio, "holds": ratio >= FEWER_BYTES}]
    for model in result["speed"]:
        slowest = max(row["ratio"] for row in model["rows"] if row["cache"] == "HLWQ 3 bit")
        text = f"{model['model']}, {model['length']:,} tokens, 3 bits: a step at most {SLOWER} times BF16's"
        found.append({"bar": text, "value": slowest, "holds": slowest <= SLOWER})
    return found
