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
AHEAD = rotated_kernel.AHEAD


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


def few_tokens(bits: int, capability: int, early: bool) -> str:
    return ptx(
        rotated_kernel._few_tokens, capability, {"x_ptr": "*fp32", "out_ptr": "*bf16"}, BLOCKS=32, BITS=bits,
        BLOCK_SIZE=128, ROWS=rotated_kernel.ROWS, GROUPS=128, AHEAD=AHEAD, EARLY=early,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_few_tokens_read_each_word_once(bits: int, capability: int) -> None:
    code = few_tokens(bits, capability, early=False)
    # Of a group of 32 codes: their words and norm, of the first rows and in the loop, and in the loop their levels. x
    # before the loop.
    assert len(re.findall(r"ld\.global\.b32", code)) == (AHEAD + 1) * bits + 32 + 32
    assert len(re.findall(r"ld\.global\.b16", code)) == AHEAD + 1
    # Values stay in their threads but for the sums at the end.
    assert code.count("bar.sync") <= 4
    assert "griddepcontrol" not in code


@pytest.mark.parametrize("capability", [90, 120])
def test_codes_may_be_read_before_the_rotation_is_done(capability: int) -> None:
    code = few_tokens(5, capability, early=True)
    before, after = code.split("griddepcontrol.wait")
    assert len(re.findall(r"ld\.global\.b32", before)) == 5 * AHEAD
    assert "ld.global" in after
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
    rotation = ptx(rotated_kernel._rotate, capability, types, HIGH=8, LOW=16, GROUP=32, EARLY=True)
    assert "griddepcontrol.launch_dependents" in rotation


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("bits", "block_size"), [(3, 128), (5, 128), (7, 16)])
def test_eight_decoded_weights_are_written_together(bits: int, block_size: int, capability: int) -> None:
    types = {"packed_ptr": "*u8", "out_ptr": "*bf16"}
    code = ptx(rotated_kernel._decode, capability, types, BITS=bits, BLOCK_SIZE=block_size, GROUPS=128)
    assert len(re.findall(r"ld\.global\.b8", code)) == bits
    assert len(re.findall(r"ld\.global\.b32", code)) == 8
    assert re.findall(r"st\.global\S*", code) == ["st.global.v4.b32"]
    assert code.count("cvt.rn.bf16x2.f32") == 4
    assert "bar.sync" not in code


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("high", "low"), [(8, 16), (4, 4)])
def test_the_rotation(high: int, low: int, capability: int) -> None:
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
    assert "st.global" in ptx(rotated_kernel._rotate, capability, types, HIGH=high, LOW=low, GROUP=32, EARLY=False)
