"""The kernels that multiply with coded weights, against weights decoded by the codec, in float64."""

from __future__ import annotations

import pytest
import torch

from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix, unpack
from vllm_hlwq.hf import rotated_kernel
from vllm_hlwq.hf.coded_weight import CodeFormat, rotate
from vllm_hlwq.hf.rotated_kernel import rotated_linear


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "bits", "block_size"),
    [(1, 9, 256, 5, 128), (1, 40, 200, 5, 128), (1, 8, 100, 3, 64), (3, 37, 200, 5, 128), (17, 33, 128, 4, 32),
     (2, 5, 130, 8, 128), (20, 70, 300, 6, 128), (1, 3, 48, 7, 16), (2, 3, 48, 2, 16),
     (1, 5, 200, 2, 32), (1, 6, 300, 4, 128), (1, 7, 130, 6, 256), (1, 3, 200, 7, 64), (1, 4, 130, 8, 128),
     (1, 5, 4500, 5, 128), (2, 19, 300, 5, 128), (65, 17, 200, 5, 128), (70, 9, 48, 3, 16)],
)  # fmt: skip
def test_products_are_those_of_the_decoded_weight(
    tokens: int, rows: int, columns: int, bits: int, block_size: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-2, 2, rows).unsqueeze(1)  # a norm of another row would show
    table = codebook("C", bits)
    coder = BlockCoder(table, block_size, torch.device("cpu"))
    coded = quantize_matrix(weight, coder, NORM)
    layout = CodeFormat(table, block_size, columns)
    x = torch.randn(tokens, columns, generator=generator)
    found = rotated_linear(x, coded.packed.view(rows, -1), coded.norms.view(torch.int16), layout)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    error = (found.double() - wanted).abs().amax(0) / wanted.abs().amax(0)
    assert found.shape == (tokens, rows)
    assert float(error.max()) < 2e-5


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.bfloat16), (1, torch.float16), (4, torch.float16), (4, torch.bfloat16), (65, torch.bfloat16)],
)
def test_half_precision_rounds_once(tokens: int, dtype: torch.dtype) -> None:
    """The error is that of rounding both factors, not of a lost norm or level."""
    generator = torch.Generator().manual_seed(1)
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(64, 512, generator=generator), coder, NORM)
    layout = CodeFormat(table, 128, 512)
    x = torch.randn(tokens, 512, generator=generator).to(dtype)
    found = rotated_linear(x, coded.packed.view(64, -1), coded.norms.view(torch.int16), layout)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("tokens", "columns", "block_size"), [(3, 200, 128), (2, 48, 16), (1, 300, 256), (2, 96, 32), (65, 200, 128)]
)
def test_the_rotation_is_the_codecs(tokens: int, columns: int, block_size: int) -> None:
    layout = CodeFormat(codebook("C", 5), block_size, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2))
    wanted = rotate(x, layout)
    assert torch.allclose(rotated_kernel.rotate(x, layout), wanted, atol=1e-5)
    if block_size % rotated_kernel.WORD_CODES == 0:
        by_words = rotated_kernel.rotate(x, layout, by_words=True)
        assert torch.allclose(by_words.transpose(1, 2).reshape(tokens, -1), wanted, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_decoded_weight_is_levels_times_norms_rounded_once(bits: int, dtype: torch.dtype) -> None:
    """Triton's interpreter cuts BF16 off where a GPU rounds."""
    table = codebook("C", bits)
    layout = CodeFormat(table, 16, 40)
    coder = BlockCoder(table, 16, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(7, 40, generator=torch.Generator().manual_seed(bits)), coder, NORM)
    found = rotated_kernel.decode_rotated(coded.packed.view(7, -1), coded.norms.view(torch.int16), layout, dtype)
    levels = layout.levels(torch.device("cpu"))[unpack(coded.packed, 7 * 48, bits).long()]
    wanted = levels.view(7, 3, 16) * coded.norms.float().view(7, 3, 1)
    assert torch.equal(found, wanted.to(dtype).view(7, 48))


def test_a_large_weight_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotated_kernel, "DECODED_AT_ONCE", 5 * 256)
    test_products_are_those_of_the_decoded_weight(6, 13, 200, 5, 128)


@pytest.mark.parametrize(("rows", "groups", "ahead"), [(2, 32, 1), (4, 64, 3), (16, 128, 2)])
def test_the_shape_of_a_program_is_free(rows: int, groups: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROWS", rows), ("GROUPS", groups), ("AHEAD", ahead)):
        monkeypatch.setattr(rotated_kernel, name, value)
    test_products_are_those_of_the_decoded_weight(1, 9, 4500, 5, 128)


def test_codes_that_do_not_begin_at_a_word_are_read_by_bytes() -> None:
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(9, 256, generator=torch.Generator().manual_seed(3)), coder, NORM)
    layout = CodeFormat(table, 128, 256)
    shifted = torch.empty(len(coded.packed) + 1, dtype=torch.uint8)[1:].copy_(coded.packed)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(4))
    by_words, by_bytes = (
        rotated_linear(x, packed.view(9, -1), coded.norms.view(torch.int16), layout)
        for packed in (coded.packed, shifted)
    )
    assert torch.allclose(by_words, by_bytes, rtol=1e-5, atol=1e-5)
