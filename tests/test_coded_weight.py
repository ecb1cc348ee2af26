"""Products with coded weights on a CPU, against weights decoded by the definition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hlwq_files import Coded, pack_msb, table

from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.hf import avx512, rotated_cpu
from vllm_hlwq.hf.coded_weight import CodeFormat, coded_linear, decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(33, 200, 128), (5, 128, 128), (70, 96, 32), (3, 24, 8)])
def test_the_product_is_that_of_the_decoded_weight(
    rows: int, columns: int, block_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotated_cpu, "CHUNK_WEIGHTS", 1024)  # several chunks, the last of fewer rows
    generator = torch.Generator().manual_seed(rows)
    coded = Coded.of(torch.randn(rows, columns, generator=generator), table("C"), block_size)
    packed = pack_msb(coded.codes, 5).view(rows, -1)
    norms = torch.from_numpy(coded.norms).view(torch.int16)
    layout = CodeFormat(torch.from_numpy(table("C")).float(), block_size, columns)
    x = torch.randn(2, 3, columns, generator=generator).to(dtype)
    found = coded_linear(x, packed, norms, layout)
    wanted = x.double() @ coded.exact.T
    assert found.dtype == dtype
    assert found.shape == (2, 3, rows)
    allowed = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert float((found.double() - wanted).norm() / wanted.norm()) < allowed


@pytest.mark.parametrize("columns", [256, 200])
def test_an_activation_may_lie_by_columns(columns: int) -> None:
    """As those of state-space models do."""
    levels = codebook("C", 5)
    coded = quantize_matrix(torch.randn(40, columns), BlockCoder(levels, 128, torch.device("cpu")), NORM)
    packed, norms = coded.packed.view(40, -1), coded.norms.view(torch.int16)
    x, layout = torch.randn(columns, 7).T, CodeFormat(levels, 128, columns)
    assert torch.equal(coded_linear(x, packed, norms, layout), coded_linear(x.contiguous(), packed, norms, layout))


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_widths(bits: int) -> None:
    levels = codebook("C", bits)
    coder = BlockCoder(levels, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(40, 300, generator=torch.Generator().manual_seed(bits)), coder, NORM)
    layout = CodeFormat(levels, 128, 300)
    packed, norms = coded.packed.view(40, -1), coded.norms.view(torch.int16)
    x = torch.randn(7, 300)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    found = coded_linear(x, packed, norms, layout)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6
    assert torch.equal(decode(packed, norms, layout, torch.bfloat16), dequantize_matrix(coded, coder))


def test_rotated_weights_are_rounded_to_the_nearest_bf16() -> None:
    """Ties to even, as torch rounds; norms of both ends of float16."""
    norms = torch.tensor([[0.0, 6e-8, 65504.0, 1.0, 3.1415]]).half().float()
    levels = codebook("C", 8)
    packed = torch.arange(5 * 128).to(torch.uint8).view(1, -1)
    out = torch.empty(1, 5 * 128, dtype=torch.bfloat16)
    rotated_cpu.decode_rotated(packed, norms, levels, 128, out)
    wanted = levels[packed.long()].view(5, 128) * norms.view(5, 1)
    assert torch.equal(out.view(5, 128), wanted.bfloat16())


def test_halfway_between_two_bf16_numbers_it_is_the_even_one() -> None:
    levels = ((torch.arange(0x3F80, 0x3FA0, dtype=torch.int32) << 16) | 0x8000).view(torch.float32)
    packed = pack_msb(np.arange(32, dtype=np.uint8).reshape(1, 1, 32), 5).view(1, -1)
    out = torch.empty(1, 32, dtype=torch.bfloat16)
    rotated_cpu.decode_rotated(packed, torch.ones(1, 1), levels, 32, out)
    assert torch.equal(out[0], levels.bfloat16())
    assert (out.view(torch.int16) % 2 == 0).all()


@pytest.mark.skipif(not avx512.available(), reason="the processor has no AVX-512 with 16-bit lanes")
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_vectors_give_the_bits_of_single_look_ups(bits: int, block_size: int) -> None:
    """Rows one after another in memory without a gap, so that a store beyond a row's end would be seen."""
    assert avx512.takes(bits, block_size)
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(0, 256, (7, 3 * block_size * bits // 8), generator=generator, dtype=torch.uint8)
    norms = torch.rand(7, 3, generator=generator) * torch.tensor([1e-6, 1.0, 60000.0])
    levels = torch.randn(2**bits, generator=generator).sort().values
    found, wanted = (np.zeros((8, 3 * block_size), np.uint16) for _ in range(2))
    arguments = packed.numpy(), norms.numpy(), levels.numpy()
    avx512.kernel(bits)(*arguments, found[:7], block_size)
    rotated_cpu._kernel(bits, True)(*arguments, wanted[:7], block_size)
    assert np.array_equal(found, wanted)
    assert not found[7].any()


@pytest.mark.parametrize(("bits", "block_size"), [(6, 128), (5, 16)])
def test_what_vectors_cannot_hold_is_not_given_to_them(bits: int, block_size: int) -> None:
    assert not avx512.takes(bits, block_size)


def test_without_vectors_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = codebook("C", 5)
    coded = quantize_matrix(torch.randn(40, 256), BlockCoder(levels, 128, torch.device("cpu")), NORM)
    x, layout = torch.randn(3, 256).bfloat16(), CodeFormat(levels, 128, 256)
    packed, norms = coded.packed.view(40, -1), coded.norms.view(torch.int16)
    found = coded_linear(x, packed, norms, layout)
    monkeypatch.setattr(avx512, "available", lambda: False)
    assert torch.equal(found, coded_linear(x, packed, norms, layout))


@pytest.mark.parametrize("threads", [1, 4])
def test_slices_decoded_on_several_threads_make_one_chunk(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotated_cpu, "CHUNK_WEIGHTS", 1024)
    monkeypatch.setattr(rotated_cpu, "_decoders", lambda: threads)
    levels = codebook("C", 5)
    coder = BlockCoder(levels, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(57, 256, generator=torch.Generator().manual_seed(0)), coder, NORM)
    x = torch.randn(3, 256)
    found = coded_linear(x, coded.packed.view(57, -1), coded.norms.view(torch.int16), CodeFormat(levels, 128, 256))
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


def test_threads_do_not_disturb_one_another() -> None:
    levels = codebook("C", 5)
    coder = BlockCoder(levels, 128, torch.device("cpu"))
    coded = quantize_matrix(torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)), coder, NORM)
    layout = CodeFormat(levels, 128, 512)
    packed, norms = coded.packed.view(2000, -1), coded.norms.view(torch.int16)
    xs = [torch.randn(3, 512) for _ in range(12)]
    wanted = [coded_linear(x, packed, norms, layout) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: coded_linear(x, packed, norms, layout), xs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
