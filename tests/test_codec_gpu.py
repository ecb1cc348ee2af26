"""The codec on a CUDA device against the CPU: the same codes but where rounding decides, and the same weights.

A code may differ only where the coordinate lies so near a threshold that the two devices' sums of 128 products, added
in different orders, fall on different sides of it. The sums differ by less than ``ROUNDING`` of the block's norm: a sum
of n terms is within n units of rounding of the sum of their absolute values, which is at most sqrt(n) norms, and
float32's unit is 2 ** -24. Coordinates are sqrt(n) times larger than the terms of a unit block, which z is told in.
"""

from __future__ import annotations

import math
from pathlib import Path

import checkpoints
import pytest
import torch
from typer.testing import CliRunner

from vllm_hlwq.cli import app
from vllm_hlwq.codec import GAIN, NORM, SEARCH, BlockCoder, codebook, dequantize_matrix, quantize_matrix, unpack
from vllm_hlwq.codec.codebooks import boundaries
from vllm_hlwq.codec.hadamard import sylvester

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCK = 128
ROUNDING = 2 * BLOCK * math.sqrt(BLOCK) * 2.0**-24
"""Of z, on both devices together."""


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def codes_of(coded: object, coder: BlockCoder, rows: int, columns: int) -> torch.Tensor:
    blocks = -(-columns // BLOCK)
    return unpack(coded.packed.cpu(), rows * blocks * BLOCK, coder.bits).view(rows * blocks, BLOCK)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [256, 704])
def test_codes_differ_only_within_rounding_of_a_threshold(bits: int, columns: int) -> None:
    weight = weights(3000, columns)
    table = codebook("C", bits)
    coders = [BlockCoder(table, BLOCK, device) for device in (CPU, CUDA)]
    here, there = (quantize_matrix(weight, coder, NORM) for coder in coders)
    a, b = (codes_of(coded, coders[0], *weight.shape) for coded in (here, there))
    padded = torch.nn.functional.pad(weight.double(), (0, -columns % BLOCK)).view(-1, BLOCK)
    z = padded / padded.norm(dim=1, keepdim=True) @ sylvester(BLOCK, CPU).double()
    to_threshold = (z.unsqueeze(-1)[a != b] - boundaries(table)).abs().amin(-1)
    assert (to_threshold <= ROUNDING).all()
    assert (a != b).float().mean() < 1e-4
    assert (a.int() - b.int()).abs().max() <= 1
    # Norms are rounded to float16, so a unit of it at most.
    assert torch.allclose(here.norms.float(), there.norms.float(), rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.parametrize("fit", [GAIN, SEARCH], ids=["gain", "search"])
def test_the_error_is_the_same(fit: object) -> None:
    """Searches may end in other minima of the same depth; what they reach is equal."""
    weight = weights(2000, 704, torch.bfloat16)
    here, there = (
        quantize_matrix(weight, BlockCoder(codebook("C", 5), BLOCK, device), fit, measure=True)  # type: ignore[arg-type]
        for device in (CPU, CUDA)
    )
    assert there.squared_error == pytest.approx(here.squared_error, rel=1e-3)
    assert there.packed.device == CPU, "the result is where the weights are"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [256, 704])
def test_weights_are_the_same_to_rounding(bits: int, columns: int) -> None:
    """From the same codes: sums of 128 levels times the norm, in another order; BF16 rounds them alike but at ties."""
    coders = [BlockCoder(codebook("C", bits), BLOCK, device) for device in (CPU, CUDA)]
    coded = quantize_matrix(weights(3000, columns), coders[0], GAIN)
    here, there = (dequantize_matrix(coded, coder, torch.float32) for coder in coders)
    bound = ROUNDING * coded.norms.float().max()
    assert (here - there).abs().max() <= bound
    rounded = [dequantize_matrix(coded, coder) for coder in coders]
    assert (rounded[0] != rounded[1]).float().mean() < 1e-2
    assert torch.allclose(rounded[0].float(), rounded[1].float(), rtol=2.0**-7, atol=float(bound))


def test_a_matrix_on_the_device_is_coded_and_decoded_there() -> None:
    weight = weights(300, 512)
    coder = BlockCoder(codebook("C", 5), BLOCK, CUDA)
    there = quantize_matrix(weight.cuda(), coder, GAIN)
    here = quantize_matrix(weight, coder, GAIN)
    assert there.packed.is_cuda
    assert there.norms.is_cuda
    assert torch.equal(there.packed.cpu(), here.packed)
    assert torch.equal(there.norms.cpu(), here.norms)
    restored = dequantize_matrix(there, coder)
    assert restored.is_cuda
    assert torch.equal(restored.cpu(), dequantize_matrix(here, coder))


def test_bad_weights_are_refused_there_too() -> None:
    weight = weights(40, 256)
    weight[33, 200] = math.nan
    with pytest.raises(ValueError, match=r"NaN, inf.*rows 0 to 39"):
        quantize_matrix(weight, BlockCoder(codebook("C", 5), BLOCK, CUDA), NORM)


def test_the_commands_take_a_device(tmp_path: Path) -> None:
    source = checkpoints.write(checkpoints.gemma4_config(num_experts=4, top_k_experts=2), tmp_path / "source")
    steps = [
        ("quantize", source, tmp_path / "q5", "--device", "cuda"),
        ("verify", tmp_path / "q5", "--reference", source),
        ("export", tmp_path / "q5", tmp_path / "int4", "--device", "cuda"),
        ("dequantize", tmp_path / "q5", tmp_path / "bf16", "--device", "cuda"),
        ("verify", tmp_path / "int4", "--reference", tmp_path / "bf16"),
    ]
    for step in steps:
        result = CliRunner().invoke(app, [str(argument) for argument in step])
        assert result.exit_code == 0, result.output
