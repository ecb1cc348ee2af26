"""What the gather kernel compiles to, read from its PTX: Triton's compiler needs no GPU for that."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_hlwq.gather_kernel import CHUNK_BYTES, NARROW_CHUNK_BYTES, WARPS, gather_chunks

SIGNATURE = {
    "store_address": "i64", "record_bytes": "i32", "chunk_table": "*i64", "chunks": "i32", "bank_rows": "i32",
    "experts": "*i32", "rows": "*i32", "count": "*i32", "skip": "*i32", "first": "i32",
    "CHUNK": "constexpr", "READ_CACHE": "constexpr",
}  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_weights_move_in_16_byte_accesses(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(gather_chunks, SIGNATURE, constexprs={"CHUNK": CHUNK_BYTES, "READ_CACHE": ".cg"})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    accesses = Counter(re.findall(r"\b((?:ld|st)\.global[\w.:]*)", compiled.asm["ptx"]))
    in_flight = CHUNK_BYTES // (16 * 32 * WARPS)
    lookups = {"ld.global.b32": 4, "ld.global.b64": 4}  # count, skip, expert, row; four columns of the chunk table
    narrow = NARROW_CHUNK_BYTES.value // (32 * WARPS)
    narrow_path = {"ld.global.b8": narrow, "st.global.b8": narrow}
    assert accesses == {
        "ld.global.cg.v4.b32": in_flight, "st.global.v4.b32": in_flight, **lookups, **narrow_path
    }  # fmt: skip
    # All reads of a chunk are under way before the first write waits for one.
    wide = re.findall(r"(ld\.global\.cg\.v4|st\.global\.v4)", compiled.asm["ptx"])
    assert wide == ["ld.global.cg.v4"] * in_flight + ["st.global.v4"] * in_flight
