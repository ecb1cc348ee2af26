"""The specification's block and packings through whole files, byte by byte, and the files of earlier tools."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hlwq_files import (
    Coded,
    Tensors,
    assert_decoded,
    decode,
    pack_lsb,
    pack_msb,
    table,
    write_base,
    write_json,
    write_state,
)
from hlwq_vectors import WORKED_CODES, WORKED_LSB, WORKED_MSB, WORKED_NIBBLES

from vllm_hlwq.checkpoint.reader import HlwqSource

LINEAR = "layer.q_proj"
WORKED = [int(code) for code in WORKED_CODES.split()]
WORKED_NORM = 0x4A13


def worked_tensors(form: str) -> Tensors:
    """The worked block, as the bytes that the specification prints, twice: two rows."""
    codes = np.array([WORKED, WORKED], dtype=np.uint8)
    norms = torch.tensor([[WORKED_NORM]] * 2, dtype=torch.int16).view(torch.float16)
    printed = {"msb": WORKED_MSB, "lsb": WORKED_LSB, "nibbles": WORKED_NIBBLES}
    if form in printed:
        row = torch.tensor(list(bytes.fromhex(printed[form])), dtype=torch.uint8)
    if form == "msb":
        meta = torch.tensor([2, 1, 128, 256, 128])
        return {f"{LINEAR}__packed": row.repeat(2), f"{LINEAR}__norms": norms, f"{LINEAR}__meta": meta}
    stored = torch.from_numpy(codes).to(torch.int8) if form == "codes" else row.repeat(2, 1)
    levels = torch.from_numpy(table("A", 4 if form == "nibbles" else 5)).float()
    return {f"{LINEAR}.codes": stored, f"{LINEAR}.norms": norms, f"{LINEAR}.ct": levels}


DECODED_A = [0.193381, 0.399463, 0.783837, 0.989884]
DECODED_B = [0.195968, 0.400387, 0.768413, 0.972806]


@pytest.fixture
def worked_base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", {f"{LINEAR}.weight": torch.zeros(2, 128, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("form", "name", "decoded"),
    [("msb", "A", DECODED_A), ("msb", "B", DECODED_B), ("codes", None, DECODED_A), ("lsb", None, DECODED_A)],
)
def test_the_worked_block(form: str, name: str, decoded: list[float], worked_base: Path, tmp_path: Path) -> None:
    source = HlwqSource(write_state(tmp_path, worked_tensors(form)), worked_base, name)
    row = source.rows(f"{LINEAR}.weight", 1, 2)[0, :4]
    assert row.tolist() == torch.tensor(decoded).bfloat16().tolist()


def test_the_worked_block_in_nibbles(worked_base: Path, tmp_path: Path) -> None:
    """Its four-bit codes, read off the printed bytes here, by the definition."""
    halves = np.frombuffer(bytes.fromhex(WORKED_NIBBLES), dtype=np.uint8)
    codes = np.concatenate([halves & 15, halves >> 4]).reshape(1, 1, 128)
    norms = np.array([[WORKED_NORM]], dtype=np.int16).view(np.float16)
    source = HlwqSource(write_state(tmp_path, worked_tensors("nibbles")), worked_base)
    found = source.rows(f"{LINEAR}.weight", 0, 2)
    for row in found:
        assert_decoded(row.unsqueeze(0), decode(codes, norms, table("A", 4), 128))


VECTORS = {
    "msb": {
        "00443214c7": range(8), "f83e0f83e0": [31, 0] * 4, "0888887eaa": [1, 2, 4, 8, 16, 31, 21, 10],
        "ad6b5ad6b5": [21] * 8,
    },
    "lsb": {
        "2088418a39": range(8), "1f7cf0c107": [31, 0] * 4, "4110047f55": [1, 2, 4, 8, 16, 31, 21, 10],
        "b5d65a6bad": [21] * 8,
    },
    "nibbles": {"40516273": range(8)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "packed"), [(form, packed) for form, vectors in VECTORS.items() for packed in vectors]
)
def test_packing_vectors_through_whole_files(form: str, packed: str, tmp_path: Path) -> None:
    """Each vector is a block of eight."""
    codes = np.array(list(VECTORS[form][packed]), dtype=np.uint8).reshape(1, 1, 8)
    levels = table("A", 4 if form == "nibbles" else 5)
    row = torch.tensor(list(bytes.fromhex(packed)), dtype=torch.uint8)
    norms = torch.tensor([[3.0]], dtype=torch.float16)
    if form == "msb":
        stored = {f"{LINEAR}__packed": row, f"{LINEAR}__norms": norms, f"{LINEAR}__meta": torch.tensor([1, 1, 8, 8, 8])}
        stored["hlwq.codebook"] = torch.from_numpy(levels).float()
    else:
        stored = {f"{LINEAR}.codes": row.unsqueeze(0), f"{LINEAR}.norms": norms}
        stored[f"{LINEAR}.ct"] = torch.from_numpy(levels).float()
    write_json(tmp_path / "polar_config.json", {"format": "polar_engine_v4", "block_size": 8})
    base = write_base(tmp_path / "base", {f"{LINEAR}.weight": torch.zeros(1, 8, dtype=torch.bfloat16)})
    source = HlwqSource(write_state(tmp_path, stored), base)
    assert_decoded(source.rows(f"{LINEAR}.weight", 0, 1), decode(codes, np.array([[3.0]]), levels, 8))


def legacy(weight: torch.Tensor, bits: int, form: str, scaled: bool, block_size: int) -> tuple[Tensors, torch.Tensor]:
    levels = table("B", bits)
    coded = Coded.of(weight, levels, block_size)
    rows = len(weight)
    if form == "int8":
        codes = torch.from_numpy(coded.codes).view(rows, -1).to(torch.int8)
    elif form == "lsb":
        codes = pack_lsb(coded.codes, bits).view(rows, -1)
    else:
        low, high = np.split(coded.codes, 2, axis=-1)
        codes = torch.from_numpy(high << 4 | low).view(rows, -1)
    stored = torch.from_numpy(levels / math.sqrt(block_size) if scaled else levels).float()
    return {
        f"{LINEAR}.codes": codes.contiguous(),
        f"{LINEAR}.norms": torch.from_numpy(coded.norms),
        f"{LINEAR}.{'ct_scaled' if scaled else 'ct'}": stored,
    }, coded.exact


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("bits", "form"), [(2, "int8"), (3, "int8"), (5, "int8"), (6, "int8"), (3, "nibbles"),
                                            (4, "nibbles"), (5, "lsb")])  # fmt: skip
def test_older_files(bits: int, form: str, scaled: bool, block_size: int, tmp_path: Path) -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(bits)).bfloat16()
    stored, exact = legacy(weight, bits, form, scaled, block_size)
    base = write_base(tmp_path / "base", {f"{LINEAR}.weight": weight})
    write_json(
        tmp_path / "polar_config.json",
        {"format": "polar_engine_v5", "block_size": block_size, "bit_assignment": {LINEAR: bits}, "layers": [LINEAR]},
    )
    source = HlwqSource(write_state(tmp_path, stored), base)
    assert source.table_origin == "stored"
    assert_decoded(source.rows(f"{LINEAR}.weight", 0, 5), exact)


def test_msb_and_lsb_are_the_printed_ones() -> None:
    """The oracle of these tests against the specification."""
    codes = np.array(WORKED, dtype=np.uint8)
    assert bytes(pack_msb(codes, 5).tolist()).hex() == WORKED_MSB
    assert bytes(pack_lsb(codes, 5).tolist()).hex() == WORKED_LSB
