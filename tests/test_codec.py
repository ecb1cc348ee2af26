"""The codec against the published vectors, an oracle written from the definition, and properties on any input."""

from __future__ import annotations

import math

import pytest
import torch
from hlwq_vectors import HALVES, WORKED_CODES, WORKED_KV, WORKED_LSB, WORKED_MSB, WORKED_NIBBLES, worked_block
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_weights import KINDS

from vllm_hlwq.codec import (
    GAIN,
    NORM,
    SEARCH,
    BlockCoder,
    Refinement,
    codebook,
    dequantize_matrix,
    detect,
    pack,
    packed_size,
    quantize_matrix,
    unpack,
)
from vllm_hlwq.codec.codebooks import boundaries
from vllm_hlwq.codec.hadamard import sylvester
from vllm_hlwq.codec.packing import pack_half_block_nibbles, unpack_half_block_nibbles, unpack_pairs

CPU = torch.device("cpu")


def hex_of(tensor: torch.Tensor) -> str:
    return bytes(tensor.view(-1).tolist()).hex()


def nearest_by_definition(z: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """First code at the smallest distance, in float64, where the distance of a float32 to a level is exact."""
    distance = (z.double().unsqueeze(-1) - table.double()).abs()
    farther = distance > distance.amin(-1, keepdim=True)
    return farther.cumprod(-1).sum(-1).to(torch.uint8)


def coder(name: str = "C", bits: int = 5, block_size: int = 128) -> BlockCoder:
    return BlockCoder(codebook(name, bits), block_size, CPU)


@pytest.mark.parametrize("key", HALVES)
def test_codebooks_are_the_published_ones(key: str) -> None:
    half = [float(level) for level in HALVES[key].split()]
    table = codebook(key[0], int(key[1]))
    digits = max(len(level.partition(".")[2]) for level in HALVES[key].split())
    expected = torch.tensor([-level for level in reversed(half)] + half)
    # Half a unit of the last published digit, and the spacing of float32.
    assert ((table - expected).abs() <= 0.5 * 10.0**-digits + expected.abs() * 2**-23).all()
    assert torch.equal(table, -table.flip(0))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_table_c_is_optimal(bits: int) -> None:
    """Each level is the mean of a normal density over its cell, by numerical integration."""
    table = codebook("C", bits).double()
    edges = torch.cat([torch.tensor([-12.0]), boundaries(table.float()), torch.tensor([12.0])]).double()
    for low, high, level in zip(edges[:-1], edges[1:], table, strict=True):
        x = torch.linspace(low, high, 20001, dtype=torch.float64)
        density = torch.exp(-0.5 * x * x)
        mean = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
        assert abs(mean - level) < 2e-6


@pytest.mark.parametrize(
    ("bits", "name", "published"),
    [(3, "A", 0.0345478), (4, "B", 0.0095081), (5, "A", 0.0029234), (5, "B", 0.0029017), (5, "C", 0.0025047),
     (6, "A", 0.0010468), (6, "C", 0.0006442), (8, "A", 0.0000803), (8, "B", 0.0000868), (8, "C", 0.0000412)],
)  # fmt: skip
def test_mean_squared_error_on_a_normal_density(bits: int, name: str, published: float) -> None:
    z = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    table = codebook(name, bits)
    nearest = table.double()[torch.bucketize(z, boundaries(table))]
    assert torch.trapezoid((z - nearest) ** 2 * density, z) == pytest.approx(published, abs=6e-8)


def test_hadamard_matrix_follows_its_definition() -> None:
    matrix = sylvester(16, CPU)
    assert all(matrix[i, j] == (-1) ** (i & j).bit_count() for i in range(16) for j in range(16))
    assert torch.equal(matrix @ matrix, 16 * torch.eye(16))
    with pytest.raises(ValueError, match="48 is no power of two"):
        sylvester(48, CPU)


@pytest.mark.parametrize(
    ("codes", "bits", "order", "expected"),
    [
        (range(8), 5, "msb", "00443214c7"), (range(8), 5, "lsb", "2088418a39"),
        ([31, 0] * 4, 5, "msb", "f83e0f83e0"), ([31, 0] * 4, 5, "lsb", "1f7cf0c107"),
        ([1, 2, 4, 8, 16, 31, 21, 10], 5, "msb", "0888887eaa"), ([1, 2, 4, 8, 16, 31, 21, 10], 5, "lsb", "4110047f55"),
        ([21] * 8, 5, "msb", "ad6b5ad6b5"), ([21] * 8, 5, "lsb", "b5d65a6bad"),
        ([17, 3, 29, 0, 0, 0, 0, 0], 5, "msb", "88fa000000"),
        ([0, 1, 2, 3, 3, 2, 1, 0], 2, "msb", "1be4"), (range(8), 3, "msb", "053977"), (range(8), 4, "msb", "01234567"),
    ],
)  # fmt: skip
def test_packing_vectors(codes: list[int], bits: int, order: str, expected: str) -> None:
    tensor = torch.tensor(list(codes), dtype=torch.uint8)
    assert hex_of(pack(tensor, bits, order)) == expected
    assert torch.equal(unpack(pack(tensor, bits, order), 8, bits, order), tensor)


def test_half_block_nibbles() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    assert hex_of(pack_half_block_nibbles(codes, 8)) == "40516273"
    assert torch.equal(unpack_half_block_nibbles(pack_half_block_nibbles(codes, 8), 8), codes)


@given(st.data(), st.integers(2, 8), st.sampled_from(["msb", "lsb"]))
def test_packing_is_one_long_number(data: st.DataObject, bits: int, order: str) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=150))
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, bits, order)
    size = packed_size(len(codes), bits)
    if order == "msb":
        number = sum(code << (8 * size - bits * (i + 1)) for i, code in enumerate(codes))
    else:
        number = sum(code << (bits * i) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(size, "big" if order == "msb" else "little")
    assert unpack(packed, len(codes), bits, order).tolist() == codes
    if bits < 8 and order == "msb" and len(codes) % 2 == 0:
        pairs = unpack_pairs(packed, len(codes), bits).tolist()
        assert pairs == [a << bits | b for a, b in zip(codes[::2], codes[1::2], strict=True)]


def test_a_wrong_length_of_packed_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="11 bytes cannot hold 16 codes of 5 bits; 10 would"):
        unpack(torch.zeros(11, dtype=torch.uint8), 16, 5)


@pytest.mark.parametrize(("name", "decoded"), [("A", [0.193381, 0.399463, 0.783837, 0.989884]),
                                               ("B", [0.195968, 0.400387, 0.768413, 0.972806])])  # fmt: skip
def test_worked_block(name: str, decoded: list[float]) -> None:
    coded = quantize_matrix(worked_block(), coder(name), NORM)
    assert unpack(coded.packed, 128, 5).tolist() == [int(code) for code in WORKED_CODES.split()]
    assert hex_of(coded.packed) == WORKED_MSB
    assert hex_of(pack(unpack(coded.packed, 128, 5), 5, "lsb")) == WORKED_LSB
    assert coded.norms.view(torch.int16).item() == 0x4A13
    assert dequantize_matrix(coded, coder(name), torch.float32)[0, :4].tolist() == pytest.approx(decoded, abs=3e-6)


def test_worked_block_at_four_and_three_bits() -> None:
    four = quantize_matrix(worked_block(), coder("A", 4), NORM)
    assert hex_of(pack_half_block_nibbles(unpack(four.packed, 128, 4), 128)) == WORKED_NIBBLES
    assert hex_of(quantize_matrix(worked_block(), coder("B", 3), NORM).packed) == WORKED_KV


@pytest.mark.parametrize(("name", "first"), [("A", 0.974056), ("B", 0.970316)])
def test_impulse(name: str, first: float) -> None:
    impulse = torch.zeros(1, 128)
    impulse[0, 0] = 1
    coded = quantize_matrix(impulse, coder(name), NORM)
    assert hex_of(coded.packed) == "ad6b5ad6b5" * 16
    assert coded.norms.view(torch.int16).item() == 0x3C00
    restored = dequantize_matrix(coded, coder(name), torch.float32)[0]
    assert restored[0] == pytest.approx(first, abs=3e-6)  # a float32 sum of 128 equal terms
    assert restored[1:].abs().max() < 1e-6


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", "ABC")
def test_nearest_level_is_exact(name: str, bits: int) -> None:
    """Thresholds, the floats around them, levels, zero and far values; ties go to the lower code."""
    table = codebook(name, bits)
    edges = boundaries(table)
    rounded = edges.float()
    probes = torch.cat([
        rounded, torch.nextafter(rounded, torch.tensor(9.0)), torch.nextafter(rounded, torch.tensor(-9.0)), table,
        torch.tensor([0.0, -0.0, 11.4, -11.4]), torch.randn(5000, generator=torch.Generator().manual_seed(bits)),
    ])  # fmt: skip
    # Nearer to zero than the oracle's float64 can tell from zero beside a level.
    probes = torch.where(probes.abs() < 1e-12, 0.0, probes)
    probes = torch.nn.functional.pad(probes, (0, -len(probes) % 128)).view(-1, 128)
    assert torch.equal(coder(name, bits)._nearest(probes.clone()), nearest_by_definition(probes, table))


@given(st.lists(st.integers(-(2**15), 2**15), min_size=4, max_size=4, unique_by=lambda level: level // 128))
def test_nearest_level_is_exact_for_any_table(levels: list[int]) -> None:
    table = torch.tensor(sorted(levels)) / 2**10
    any_coder = BlockCoder(table, 8, CPU)
    probes = torch.cat([table, boundaries(table).float(), torch.linspace(-40, 40, 49)]).view(-1, 8)
    assert torch.equal(any_coder._nearest(probes.clone()), nearest_by_definition(probes, table))


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 300), st.sampled_from([8, 64, 128]), st.integers(2, 8),
    st.sampled_from([NORM, GAIN, SEARCH]), st.sampled_from([1e-6, 1.0, 300.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_quantising_matches_the_definition(
    rows: int, columns: int, block_size: int, bits: int, refinement: Refinement, size: float, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    table = codebook("C", bits)
    blocks = -(-columns // block_size)
    padded = torch.zeros(rows, blocks * block_size, dtype=torch.float64)
    padded[:, :columns] = weight
    matrix = sylvester(block_size, CPU).double() / math.sqrt(block_size)
    norm = padded.view(rows, blocks, block_size).norm(dim=-1)
    z = padded.view(rows, blocks, block_size) / norm.clamp(min=1e-10).unsqueeze(-1) @ matrix * math.sqrt(block_size)
    block_coder = coder("C", bits, block_size)
    coded = quantize_matrix(weight, block_coder, refinement, measure=True)
    codes = unpack(coded.packed, rows * blocks * block_size, bits).view(rows, blocks, block_size)
    levels = table.double()[codes.long()]
    if refinement == NORM:
        assert ((coded.norms.double() - norm).abs() <= norm * 2**-11 + 2.0**-24).all()
        assert ((z - levels).abs() <= (z.unsqueeze(-1) - table.double()).abs().amin(-1) + 1e-4).all()
    elif refinement == GAIN:
        gain = (z * levels).sum(-1) / (levels * levels).sum(-1)
        assert ((coded.norms.double() - norm * gain).abs() <= norm * gain * 2**-10 + 2.0**-24).all()
    decoded = (levels / math.sqrt(block_size)) @ matrix * coded.norms.double().unsqueeze(-1)
    restored = dequantize_matrix(coded, block_coder, torch.float32)
    assert torch.allclose(restored.double(), decoded.view(rows, -1)[:, :columns], rtol=1e-4, atol=1e-6 * size)
    error = (decoded.view(rows, -1) - padded)[:, :columns].square().sum()
    assert coded.squared_error == pytest.approx(error.item(), rel=1e-3, abs=1e-9 * size**2)


@pytest.mark.parametrize("kind", KINDS)
def test_each_refinement_lowers_the_error(kind: str) -> None:
    weight = KINDS[kind](torch.Generator().manual_seed(0))
    energy = weight.square().sum().item()
    errors = [
        quantize_matrix(weight, coder(), refinement, measure=True).squared_error / energy
        for refinement in (NORM, GAIN, SEARCH)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < (0.05 if kind in {"block means", "constant", "ramp", "alternating"} else 0.0024)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_turned_round_is_coded_as_well(kind: str) -> None:
    """A block whose far coordinates are negative gets as good a factor as one whose are positive."""
    weight = KINDS[kind](torch.Generator().manual_seed(0))
    coded, turned = (quantize_matrix(both, coder(), SEARCH, measure=True) for both in (weight, -weight))
    assert torch.equal(turned.norms, coded.norms)
    assert turned.squared_error == pytest.approx(coded.squared_error, rel=1e-6)


def test_gaussian_error_is_the_known_one() -> None:
    weight = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    error = {
        name: quantize_matrix(weight, coder(), refinement, measure=True).squared_error / weight.square().sum().item()
        for name, refinement in {"gain": GAIN, "one round": Refinement(rounds=1)}.items()
    }
    assert error["gain"] == pytest.approx(0.002410, abs=1e-5)
    assert error["one round"] == pytest.approx(0.002344, abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(40, 256)
    weight[33, 200] = value
    with pytest.raises(ValueError, match=r"NaN, inf.*rows 0 to 39"):
        quantize_matrix(weight, coder())


def test_a_norm_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_matrix(torch.full((1, 128), 1e5), coder())
    weight = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    weight /= weight.norm()
    assert quantize_matrix(weight * 65500, coder(), NORM).norms.item() == 65504
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_matrix(weight * 65600, coder(), NORM)


@pytest.mark.parametrize("width", [32, 64, 128, 160, 192])
@pytest.mark.parametrize("refinement", [NORM, GAIN, SEARCH])
def test_zero_and_tiny_blocks_decode_to_zero(refinement: Refinement, width: int) -> None:
    weight = torch.zeros(5, width)
    weight[1], weight[2, 7], weight[3] = 1e-12, -1e-12, torch.randn(width)
    coded = quantize_matrix(weight, coder(), refinement)
    zeros = [0, 1, 2, 4]
    assert not coded.norms[zeros].any()
    restored = dequantize_matrix(coded, coder())
    assert not restored[zeros].any()
    assert restored[3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_do_not_show(dtype: torch.dtype) -> None:
    weight = torch.randn(3000, 200, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = quantize_matrix(weight, coder())
    apart = [quantize_matrix(weight[a:b], coder()) for a, b in ((0, 777), (777, 3000))]
    restored = dequantize_matrix(whole, coder())
    again = torch.cat([dequantize_matrix(part, coder()) for part in apart])
    # The matrix library may round a product differently with the number of rows, so a code may differ by one level.
    assert (restored != again).float().mean() < 1e-3
    assert whole.packed.shape == torch.cat([part.packed for part in apart]).shape


def test_the_table_is_detected_from_the_codes() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(80_000, 128, generator=generator)
    for name in "ABC":
        coded = quantize_matrix(weight, coder(name), NORM)
        counts = torch.bincount(unpack(coded.packed, weight.numel(), 5).int(), minlength=32)
        assert detect(counts, 128) == name
    assert detect(torch.full((32,), 10**6), 128) is None
