"""The kernels that multiply with coded weights, against weights decoded by the codec, in float64."""

from __future__ import annotations

import pytest
import torch

from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.hf.coded_weight import CodeFormat, rotate
from vllm_hlwq.hf.rotated_kernel import rotated_linear


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "bits", "block_size"),
    [(1, 9, 256, 5, 128), (1, 40, 200, 5, 128), (1, 8, 100, 3, 64), (3, 37, 200, 5, 128), (17, 33, 128, 4, 32),
     (2, 5, 130, 8, 128), (20, 70, 300, 6, 128), (1, 3, 48, 7, 16), (2, 3, 48, 2, 16)],
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
    found = rotated_linear(rotate(x, layout), coded.packed.view(rows, -1), coded.norms.view(torch.int16), layout)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    error = (found.double() - wanted).abs().amax(0) / wanted.abs().amax(0)
    assert found.shape == (tokens, rows)
    assert float(error.max()) < 2e-5


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (1, torch.float16), (4, torch.float16)])
def test_half_precision_rounds_once(tokens: int, dtype: torch.dtype) -> None:
    """The error is that of rounding both factors, not of a lost norm or level.

    Triton's interpreter multiplies the bits of BF16 tiles as integers, so a tile of those is for a GPU to test.
    """
    generator = torch.Generator().manual_seed(1)
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(64, 512, generator=generator), coder, NORM)
    layout = CodeFormat(table, 128, 512)
    x = torch.randn(tokens, 512, generator=generator).to(dtype)
    found = rotated_linear(rotate(x, layout), coded.packed.view(64, -1), coded.norms.view(torch.int16), layout)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps
