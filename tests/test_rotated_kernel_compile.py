"""The kernels that multiply with coded weights compile for the GPUs they may meet, at every width of code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_hlwq.hf import rotated_kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")
TYPES = {"packed_ptr": "*i32", "norms_ptr": "*fp16", "levels_ptr": "*fp32", "scale": "fp32"}
ROWS = rotated_kernel.ROWS_ONE_TOKEN


def ptx(kernel: Any, capability: int, types: dict[str, str], **constants: Any) -> str:
    """PTX of a kernel whose other arguments are int32, with base pointers as aligned as torch's memory is."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    found: str = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
    return found


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_one_token_reads_each_word_once(bits: int, capability: int) -> None:
    code = ptx(
        rotated_kernel._one_token_by_words, capability, {"x_ptr": "*fp32", "out_ptr": "*bf16"},
        BLOCKS=32, BITS=bits, BLOCK_SIZE=128, ROWS=ROWS, GROUPS=128,
    )  # fmt: skip
    # For 32 codes of each row: their words, their levels, and one x each that all rows share.
    assert len(re.findall(r"ld\.global\.b32", code)) == ROWS * (bits + 32) + 32
    assert len(re.findall(r"ld\.global\.b16", code)) == ROWS  # norms


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_others(capability: int) -> None:
    for bits, block_size in ((3, 128), (7, 16)):
        constants = {"BITS": bits, "BLOCK_SIZE": block_size}
        types = {"x_ptr": "*bf16", "packed_ptr": "*u8", "out_ptr": "*bf16"}
        assert "ld.global.b8" in ptx(rotated_kernel._one_token, capability, types, **constants, ROWS=ROWS, GROUPS=128)
        tiles = ptx(rotated_kernel._several_tokens, capability, types, **constants, ROWS=16, TOKENS=64)
        assert "mma" in tiles


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("high", "low"), [(8, 16), (4, 4)])
def test_the_rotation(high: int, low: int, capability: int) -> None:
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
    assert "st.global" in ptx(rotated_kernel._rotate, capability, types, HIGH=high, LOW=low, GROUP=32)
