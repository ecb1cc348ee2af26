"""Times ways to multiply with coded weights on a GPU, to set the constants of ``vllm_hlwq/hf/rotated_kernel.py``.

Run by ``hlwq_linear.py --sweep``. Every way is first held against the product with the decoded weight. Times are of
whole products, rotation included, in replayed graphs over several weights in turn, like those of the benchmark itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product, takewhile
from math import inf
from typing import Any

import torch
from torch.nn import functional

from vllm_hlwq.codec import CodedMatrix, dequantize_matrix
from vllm_hlwq.hf import rotated_kernel
from vllm_hlwq.hf.coded_weight import CodeFormat, coded_linear, norm_values

FEW = {"ROWS": (2, 4, 8, 16, 32), "GROUPS": (64, 128), "AHEAD": (1, 2, 3)}
DECODED = {"GROUPS_DECODED": (128, 256, 512, 1024), "WARPS_DECODED": (4, 8)}
READ_AGAIN = (1, 2, 3, 4, 8, 16)
"""Tokens for which codes are also read again for each."""
TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 2048)
EARLY = 3
"""Of the fastest shapes for one token as many are also launched early."""
REPEATS = 15
ALLOWED = 2**-8
"""Of an error relative to the result's norm, as in ``tests/test_hf_gpu.py``."""

Seconds = Callable[[Callable[[int], None], int], float]
Parts = Sequence[tuple[torch.Tensor, torch.Tensor]]


def on_device(call: Callable[[int], None], calls: int) -> float:
    """Seconds a call on a GPU."""
    from vllm_hlwq.bench.cuda_timing import seconds_per_call

    return seconds_per_call(call, calls, repeats=REPEATS)


@contextmanager
def constants(values: dict[str, Any]) -> Iterator[None]:
    """Let the kernels be started with other constants."""
    before = {name: getattr(rotated_kernel, name) for name in values}
    try:
        for name, value in values.items():
            setattr(rotated_kernel, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(rotated_kernel, name, value)


class Sweep:
    """Ways to multiply with some weights.

    Args:
        plain: BF16 weights ``[out_features, in_features]``.
        parts: packed codes and norms of each, as ``coded_linear`` takes them.
        layout: of the codes.
        seconds: times calls that are numbered from 0.
    """

    def __init__(self, plain: Sequence[torch.Tensor], parts: Parts, layout: CodeFormat, seconds: Seconds) -> None:
        self.plain, self.parts, self.layout, self.seconds = plain, parts, layout, seconds
        self.device = plain[0].device
        packed, norms = parts[0]
        coded = CodedMatrix(packed.reshape(-1), norm_values(norms), layout.in_features)
        self.exact = dequantize_matrix(coded, layout.coder(self.device), torch.float32).double()

    def activation(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(tokens)
        x = torch.randn(tokens, self.layout.in_features, generator=generator, device=self.device)
        return x.to(self.plain[0].dtype)

    def time(self, call: Callable[[int], object]) -> float:
        """Microseconds of a call."""
        return round(self.seconds(lambda number: void(call(number % len(self.parts))), 2 * len(self.parts)) * 1e6, 2)

    def coded(self, tokens: int, values: dict[str, Any]) -> dict[str, Any]:
        """Time and error of the product of some tokens with these constants, or why it cannot be had."""
        x = self.activation(tokens)
        row: dict[str, Any] = {"tokens": tokens, **values}
        with torch.no_grad(), constants(values):
            try:
                found = coded_linear(x, *self.parts[0], self.layout).double()
                wanted = x.double() @ self.exact.T
                row["error"] = float(f"{float((found - wanted).norm() / wanted.norm()):.2e}")
                if row["error"] < ALLOWED:
                    row["us"] = self.time(lambda number: coded_linear(x, *self.parts[number], self.layout))
            except Exception as problem:  # noqa: BLE001 - what a compiler or driver refuses is a result here
                row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
        return row

    def pieces(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Times of what products consist of."""
        x, dtype = self.activation(1), self.plain[0].dtype
        weight = rotated_kernel.decode_rotated(*self.parts[0], self.layout, dtype)
        found: dict[str, Any] = {
            "rotation_by_words": self.time(lambda _: rotated_kernel.rotate(x, self.layout, by_words=True)),
            "decoding": self.time(
                lambda number: rotated_kernel.decode_rotated(*self.parts[number], self.layout, dtype)
            ),
        }
        for count in tokens:
            many = rotated_kernel.rotate(self.activation(count), self.layout)
            found[f"product_of_{count}_with_one_weight"] = self.time(lambda _, many=many: torch.mm(many, weight.T))  # type: ignore[misc]
        return found


def void(_: object) -> None:
    return None


def combinations(choices: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that were timed, the fastest first."""
    return sorted((row for row in rows if "us" in row), key=lambda row: row["us"])


def sweep(
    found: Sweep,
    few: dict[str, Sequence[Any]] = FEW,
    decoded: dict[str, Sequence[Any]] = DECODED,
    read_again: Sequence[int] = READ_AGAIN,
    tokens: Sequence[int] = TOKENS,
) -> dict[str, Any]:
    """Shapes of programs for one token and of decoding; then by number of tokens BF16's product and both ways.

    Returns:
        rows of each, the fastest first, and ``constants``, what they say the module's should be.
    """
    never, always = {"FEW_TOKENS": 0}, {"FEW_TOKENS": 10**6}
    tried = [found.coded(1, values | {"LAUNCH_EARLY": False}) for values in combinations(few)]
    shapes = best(tried)
    early = [
        found.coded(1, {name: row[name] for name in few} | {"LAUNCH_EARLY": True})
        for row in shapes[:EARLY]
        if found.device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    ]
    fastest = {name: best([*shapes, *early])[0][name] for name in (*few, "LAUNCH_EARLY")}
    decodings = best([found.coded(64, never | values) for values in combinations(decoded)])
    decoding = {name: decodings[0][name] for name in decoded}
    by_tokens = []
    for count in tokens:
        x = found.activation(count)
        row = {"tokens": count, "bf16": found.time(lambda number, x=x: functional.linear(x, found.plain[number]))}  # type: ignore[misc]
        if count in read_again:
            row["few"] = found.coded(count, always | fastest).get("us")
        for name, most in (("decoded, rotated by the kernel", 10**6), ("decoded, rotated by a product", 0)):
            row[name] = found.coded(count, never | decoding | {"ROTATED_BY_KERNEL": most}).get("us")
        by_tokens.append(row)
    return {
        "one_token": shapes, "one_token_not_timed": [row for row in tried if row not in shapes],
        "one_token_launched_early": early,
        "decoding_at_64": decodings, "by_tokens": by_tokens, "pieces_us": found.pieces(tokens),
        "constants": {**fastest, **decoding, **thresholds(by_tokens)},
    }  # fmt: skip


def thresholds(by_tokens: list[dict[str, Any]]) -> dict[str, int]:
    """The most tokens up to which, at every number that was timed, the first of two ways is the faster one."""
    by_kernel, by_product = "decoded, rotated by the kernel", "decoded, rotated by a product"
    pairs = {"FEW_TOKENS": ("few", by_kernel), "ROTATED_BY_KERNEL": (by_kernel, by_product)}
    found = {}
    for name, (first, second) in pairs.items():
        faster = takewhile(lambda row: (row.get(first) or inf) <= (row[second] or inf), by_tokens)  # noqa: B023
        found[name] = max((row["tokens"] for row in faster if row.get(first)), default=0)
    return found


def summary(result: dict[str, Any]) -> str:
    """The fastest of each, as lines."""
    lines = ["one token:"]
    lines += [f"  {row}" for row in result["one_token"][:5] + result["one_token_launched_early"]]
    lines += ["decoding, 64 tokens:"] + [f"  {row}" for row in result["decoding_at_64"][:3]]
    lines += ["us by tokens:"] + [f"  {row}" for row in result["by_tokens"]]
    lines += [f"pieces, us: {result['pieces_us']}", f"constants: {result['constants']}"]
    return "\n".join(lines)
