"""The INT4 format of one matrix: published packing vectors and the dequantisation formula."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme

from vllm_hlwq import int4_checkpoint, int4_cpu
from vllm_hlwq.int4_checkpoint import (
    SCALE_FRACTIONS,
    dequantize_weight,
    int4_arguments,
    quantize_weight,
    search_scale,
)


@pytest.mark.parametrize(
    ("codes", "word"),
    [([-8, -7, -1, 0, 1, 2, 6, 7], 0xFEA98710), ([7, 6, 5, 4, 3, 2, 1, 0], 0x89ABCDEF)],
)
def test_packing_vectors(codes: list[int], word: int) -> None:
    packed = pack_to_int32(torch.tensor([codes], dtype=torch.int8), 4)
    assert packed.item() & 0xFFFFFFFF == word


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantised_weights_follow_the_formula(group_size: int | None, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 128, dtype=torch.bfloat16)
    arguments = int4_arguments(group_size, symmetric)
    state = quantize_weight(weight, arguments)
    codes = unpack_from_int32(state["weight_packed"], 4, torch.Size(weight.shape)).to(torch.bfloat16)
    scale = state["weight_scale"].repeat_interleave(128 // state["weight_scale"].shape[1], dim=1)
    if not symmetric:
        groups = state["weight_scale"].shape[1]
        zero = unpack_from_int32(state["weight_zero_point"], 4, torch.Size((24, groups)), packed_dim=0)
        codes = codes - zero.to(torch.bfloat16).repeat_interleave(128 // groups, dim=1)
    restored = dequantize_weight(state, arguments)
    assert torch.equal(restored, codes * scale)
    # Half a step, and two roundings to BF16 (scale and product, 2^-8 each) of values up to 8 steps.
    assert ((restored.float() - weight.float()).abs() <= scale.float() * (0.5 + 2 * 8 / 256) + 1e-6).all()


def test_an_all_zero_group_stays_zero() -> None:
    state = quantize_weight(torch.zeros(8, 64, dtype=torch.bfloat16), int4_arguments(32, True))
    assert not dequantize_weight(state, int4_arguments(32, True)).any()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group size 64 does not divide 96"):
        quantize_weight(torch.zeros(8, 96, dtype=torch.bfloat16), int4_arguments(64, True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_weight_that_is_not_finite_is_refused(value: float, symmetric: bool) -> None:
    weight = torch.ones(8, 64, dtype=torch.bfloat16)
    weight[5, 40] = value
    with pytest.raises(ValueError, match="holds NaN or inf"):
        quantize_weight(weight, int4_arguments(32, symmetric))


def test_a_scale_that_underflows_keeps_its_group_near_zero() -> None:
    weight = torch.full((8, 32), 6e-8, dtype=torch.float16)  # float16's smallest; a seventh of it is zero
    restored = dequantize_weight(quantize_weight(weight, int4_arguments(32, True)), int4_arguments(32, True))
    assert not restored.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_those_of_the_library(search: bool, group_size: int | None, dtype: torch.dtype) -> None:
    """Halves between two levels too: every weight a multiple of half the scale that the largest, 15 of them, gives."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(-14, 15, (24, 256), generator=generator)
    weight = torch.cat([torch.randn(24, 256, generator=generator), halves / 64]).to(dtype)
    weight[24:, ::32] = 15 / 64
    arguments = int4_arguments(group_size, True)
    found = quantize_weight(weight, arguments, search)
    scale = found["weight_scale"]
    state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": torch.zeros_like(scale).char()}
    wanted = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=[], weights=arguments))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_threads_and_ranges_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = quantize_weight(weight, int4_arguments(32, True), True)
    monkeypatch.setattr(int4_checkpoint, "ROWS_WEIGHTS", 24 * 64)
    for name, tensor in quantize_weight(weight, int4_arguments(32, True), True).items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("size", [32, 64, 300])
def test_the_scale_that_is_found_has_the_least_error(size: int) -> None:
    """In double precision, of scales rounded to BF16."""
    groups = torch.randn(100, size, generator=torch.Generator().manual_seed(size))
    largest = groups.abs().amax(-1, keepdim=True) / 7.5
    candidates = (largest * torch.tensor(SCALE_FRACTIONS)).bfloat16().float()
    best = int4_cpu.search_scale(groups, candidates)
    wide = candidates.double().unsqueeze(1)
    codes = (groups.unsqueeze(2) / candidates.unsqueeze(1)).round().clamp(-8, 7).double()
    errors = (codes * wide - groups.double().unsqueeze(2)).square().sum(1)
    chosen = errors.gather(1, best.unsqueeze(1)).squeeze(1)
    assert torch.allclose(chosen, errors.amin(1), rtol=1e-6, atol=0)
    assert len(best.unique()) > 3


def test_scales_are_judged_as_they_are_stored() -> None:
    """Rounding to BF16 moves a scale by up to 1 in 256, enough to make another fraction the best."""
    groups = torch.randn(200, 2, 32, generator=torch.Generator().manual_seed(0))
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    candidates = (scale.float().unsqueeze(-1) * torch.tensor(SCALE_FRACTIONS)).bfloat16()

    def error(stored: torch.Tensor) -> torch.Tensor:
        wide = stored.double().unsqueeze(-1)
        codes = (groups.unsqueeze(2) / stored.float().unsqueeze(-1)).round().clamp(-8, 7)
        return (codes * wide - groups.double().unsqueeze(2)).square().sum(-1)

    best = search_scale(groups, scale)
    assert best.dtype == torch.bfloat16
    torch.testing.assert_close(error(best.unsqueeze(-1)).squeeze(-1), error(candidates).amin(-1), rtol=1e-6, atol=0)


def test_of_equally_good_scales_the_first_is_taken() -> None:
    candidates = torch.tensor([[2.0, 1.0, 1.0, 0.5]])
    assert int4_cpu.search_scale(torch.full((1, 8), 3.0), candidates).tolist() == [1]


def test_what_a_worker_imports_leaves_numba_out() -> None:
    """vLLM's CPU workers scan every module's objects at their start, and llvmlite's library object breaks the scan."""
    code = "import sys, vllm_hlwq.plugin, vllm_hlwq.hlwq_serving; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_loops_are_kept_for_the_next_process(tmp_path: Path, writable: bool) -> None:
    program = f"""
import numba.core.caching
if not {writable}:
    numba.core.caching.CacheImpl._locator_classes = []
import torch
from vllm_hlwq import int4_cpu
best = int4_cpu.search_scale(torch.tensor([[7.0, -8.0] * 4]), torch.tensor([[0.5, 1.0]]))
assert best.tolist() == [1]
print(sum(int4_cpu._search.stats.cache_hits.values()))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert found == ["0\n", f"{int(writable)}\n"]
    assert any(tmp_path.rglob("*.nbc")) == writable
