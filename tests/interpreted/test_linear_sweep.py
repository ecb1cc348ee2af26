"""The sweep over shapes of kernels, on small weights and with a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hlwq_linear_sweep
import pytest
import torch
from hlwq_linear_sweep import Sweep, best, combinations, sweep, thresholds

from vllm_hlwq.codec import NORM, BlockCoder, codebook, quantize_matrix
from vllm_hlwq.hf import rotated_kernel
from vllm_hlwq.hf.coded_weight import CodeFormat

FEW = {"ROWS": (2, 8), "GROUPS": (32,), "AHEAD": (1, 2)}
DECODED = {"GROUPS_DECODED": (128, 512), "WARPS_DECODED": (4,)}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(hlwq_linear_sweep, "coded_linear", rotated_kernel.rotated_linear)
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, torch.device("cpu"))
    plain = [torch.randn(20, 200, generator=torch.Generator().manual_seed(i)).half() for i in range(2)]
    coded = [quantize_matrix(weight.float(), coder, NORM) for weight in plain]
    parts = [(each.packed.view(20, -1), each.norms.view(torch.int16)) for each in coded]

    def seconds(call: Callable[[int], None], _: int) -> float:
        call(1)
        return 1e-5 * (1 + (rotated_kernel.ROWS != 8) + (rotated_kernel.AHEAD == 1) + rotated_kernel.GROUPS_DECODED)

    return Sweep(plain, parts, CodeFormat(table, 128, 200), seconds)


def test_the_fastest_shapes_are_found_and_constants_put_back(ways: Sweep) -> None:
    before = {name: value for name, value in vars(rotated_kernel).items() if name.isupper()}
    found = sweep(ways, FEW, DECODED, read_again=(1, 2), tokens=(1, 2, 4))
    assert {name: getattr(rotated_kernel, name) for name in before} == before
    assert len(found["one_token"]) == 4
    assert len(found["decoding_at_64"]) == 2
    assert all(row["error"] < 1e-3 for row in found["one_token"] + found["decoding_at_64"])
    wanted = {"ROWS": 8, "GROUPS": 32, "AHEAD": 2, "GROUPS_DECODED": 128, "WARPS_DECODED": 4}
    assert found["constants"].items() >= wanted.items()
    assert [row["tokens"] for row in found["by_tokens"]] == [1, 2, 4]
    assert found["by_tokens"][2].keys() == found["by_tokens"][0].keys() - {"few"}
    assert "constants: " in hlwq_linear_sweep.summary(found)


def test_a_shape_that_computes_or_compiles_badly_is_not_timed(ways: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hlwq_linear_sweep, "coded_linear", lambda x, *_: x.new_zeros(len(x), 20))
    row = ways.coded(1, {"ROWS": 4})
    assert row == {"tokens": 1, "ROWS": 4, "error": 1.0}

    def fail(*_: object) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(hlwq_linear_sweep, "coded_linear", fail)
    assert "out of resources" in ways.coded(1, {"ROWS": 4})["failed"]
    assert best([row]) == []


def test_a_threshold_is_the_last_before_the_other_way_is_faster() -> None:
    kernel, library = "decoded, rotated by the kernel", "decoded, rotated by a product"
    rows: list[dict[str, Any]] = [
        {"tokens": 1, "few": 10, kernel: 30, library: 33}, {"tokens": 2, "few": 20, kernel: 30, library: 33},
        {"tokens": 4, "few": 40, kernel: 30, library: 33}, {"tokens": 64, kernel: 33, library: 33},
        {"tokens": 128, kernel: 40, library: 34},
    ]  # fmt: skip
    assert thresholds(rows) == {"FEW_TOKENS": 2, "ROTATED_BY_KERNEL": 64}
    assert thresholds([rows[0] | {"few": None}]) == {"FEW_TOKENS": 0, "ROTATED_BY_KERNEL": 1}


def test_all_combinations() -> None:
    assert combinations({"a": (1, 2), "b": (3,)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
