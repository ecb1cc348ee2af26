"""vLLM's CUDA operators around Marlin in plain torch, for machines whose vLLM has none of them.

The layouts are Marlin's by the permutations that vLLM keeps for its own tests; the product decodes them and multiplies.
``marlin_on_cpu`` stands where a layer chooses its backend (the fixture ``use_backend``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import vllm._custom_ops
from moe_operators import align, moe_sum
from random_experts import as_bytes
from vllm.model_executor.layers.quantization.utils.marlin_utils import get_scale_perms
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.scalar_type import ScalarType, scalar_types

from vllm_hlwq.marlin_moe import MarlinBackend

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of each of eight consecutive outputs."""
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_EXPONENT_BIAS = {torch.float16: 8, torch.bfloat16: 120}
"""Marlin leaves the difference of exponents to the scale."""
TILE = 16


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned codes of int32 words, lowest bits first, along ``dim``."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.movedim(-1, dim + 1).flatten(dim, dim + 1)


def gptq_marlin_repack(words: torch.Tensor, size_k: int, size_n: int, bits: int, is_a_8bit: bool) -> torch.Tensor:
    assert words.is_contiguous()
    assert words.shape == (size_k * bits // 32, size_n), (words.shape, size_k, size_n)
    return repacked(unpack(words, bits, 0), bits)


def awq_marlin_repack(words: torch.Tensor, size_k: int, size_n: int, bits: int, is_a_8bit: bool) -> torch.Tensor:
    assert words.is_contiguous()
    assert words.shape == (size_k, size_n * bits // 32), (words.shape, size_k, size_n)
    codes = unpack(words, bits, 1).view(size_k, -1, 8)[:, :, list(AWQ_ORDER)]
    return repacked(codes.reshape(size_k, size_n), bits)


def repacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    size_k, size_n = codes.shape
    assert size_k % TILE == 0, size_k
    assert size_n % 64 == 0, size_n
    return marlin_weights(codes, size_k, size_n, bits, get_weight_perm(bits))


def undo(values: torch.Tensor, permutation: Any) -> torch.Tensor:
    """The values before their runs of ``len(permutation)`` were permuted."""
    order = torch.as_tensor(permutation)
    return values.reshape(-1, len(order))[:, torch.argsort(order)].view(values.shape)


def codes_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[inputs, outputs]`` of a matrix in Marlin's layout."""
    codes = undo(unpack(packed, bits, 1), get_weight_perm(bits))
    tiles, width = codes.shape
    return codes.view(tiles, width // TILE**2, TILE, TILE).permute(0, 2, 1, 3).reshape(tiles * TILE, width // TILE)


def scales_of(permuted: torch.Tensor) -> torch.Tensor:
    """Scales ``[groups, outputs]``."""
    if permuted.dtype == torch.float8_e8m0fnu:
        permuted = undo(permuted.float(), [0, 2, 1, 3])
    grouped, single = get_scale_perms()
    return undo(permuted.float(), grouped if len(permuted) > 1 else single)


def zeros_of(packed: torch.Tensor) -> torch.Tensor:
    """Zero points ``[groups, outputs]``."""
    return undo(undo(unpack(packed, 4, 1), [0, 2, 4, 6, 1, 3, 5, 7]), get_scale_perms()[0])


def matrix_of(
    packed: torch.Tensor, permuted: torch.Tensor, zeros: torch.Tensor | None, quant_type: ScalarType
) -> torch.Tensor:
    """Weights float32 ``[inputs, outputs]`` of an expert in Marlin's layout."""
    codes = codes_of(packed, quant_type.size_bits)
    scales = scales_of(permuted).repeat_interleave(len(codes) // len(permuted), 0)
    if quant_type == scalar_types.uint4b8:
        return (codes - 8) * scales
    if quant_type == scalar_types.uint4:
        assert zeros is not None
        return (codes - zeros_of(zeros).repeat_interleave(len(codes) // len(zeros), 0)) * scales
    if quant_type == scalar_types.float4_e2m1f:
        return FP4_VALUES[codes & 7] * (1 - 2 * (codes >> 3)) * scales
    assert quant_type == scalar_types.float8_e4m3fn
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return values * (scales * 2.0 ** -FP8_EXPONENT_BIAS[permuted.dtype])


def moe_wna16_marlin_gemm(
    a: torch.Tensor, c: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor,
    a_scales: None, global_scale: None, zeros: torch.Tensor | None, workspace: torch.Tensor,
    sorted_rows: torch.Tensor, block_rows: torch.Tensor, padded_rows: torch.Tensor, topk_weights: torch.Tensor,
    block_size: int, top_k: int, mul_topk_weights: bool, type_id: int, size_m: int, size_n: int, size_k: int, *_: Any,
) -> torch.Tensor:  # fmt: skip
    assert a.shape == (size_m, size_k)
    assert a_scales is None
    assert global_scale is None
    output = c.view(-1, size_n)
    for block in range(int(padded_rows) // block_size):
        expert = int(block_rows[block])
        part = None if zeros is None else zeros[expert]
        matrix = matrix_of(b[expert], scales[expert], part, ScalarType.from_id(type_id))
        assert matrix.shape == (size_k, size_n), (matrix.shape, size_k, size_n)
        for row in sorted_rows[block * block_size : (block + 1) * block_size].tolist():
            if row >= size_m * top_k:
                continue
            product = a[row // top_k].float() @ matrix
            if bias is not None:
                product = product + undo(bias[expert].float(), get_scale_perms()[1])
            output[row] = product * topk_weights.view(-1)[row] if mul_topk_weights else product
    return c


def swigluoai_and_mul(out: torch.Tensor, x: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    gate, up = x[..., 0::2].float().clamp(max=limit), x[..., 1::2].float().clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


SCHEMAS = {
    "_C::gptq_marlin_repack(Tensor w, int k, int n, int bits, bool is_a_8bit) -> Tensor": gptq_marlin_repack,
    "_C::awq_marlin_repack(Tensor w, int k, int n, int bits, bool is_a_8bit) -> Tensor": awq_marlin_repack,
    "_C::swigluoai_and_mul(Tensor! out, Tensor x, float alpha=1.702, float limit=7.0) -> ()": swigluoai_and_mul,
    "_moe_C::moe_wna16_marlin_gemm(Tensor a, Tensor(a!) c, Tensor b, Tensor? bias, Tensor scales, Tensor? a_scales, "
    "Tensor? global_scale, Tensor? zeros, Tensor workspace, Tensor sorted_rows, Tensor block_rows, Tensor padded_rows, "
    "Tensor topk_weights, int block_size, int top_k, bool mul_topk_weights, int type_id, int m, int n, int k, "
    "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k, int thread_n, int blocks_per_sm) "
    "-> Tensor(a!)": moe_wna16_marlin_gemm,
}  # fmt: skip
_LIBRARIES = []


def scaled_fp8_quant(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    limit = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale


@cache
def install() -> None:
    """Define those operators that this vLLM lacks, or has only the names of."""
    if not torch.ops._C.static_scaled_fp8_quant.default._schema.arguments:
        vllm._custom_ops.scaled_fp8_quant = scaled_fp8_quant
    for schema, function in SCHEMAS.items():
        namespace, _, rest = schema.partition("::")
        name = rest.partition("(")[0]
        if hasattr(getattr(torch.ops, namespace), name):
            continue
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(rest)
        library.impl(name, function, "CPU")
        _LIBRARIES.append(library)


class OnlyLoads:
    """Stands where a layer chooses its backend, so that what was loaded can be looked at."""

    name = "none"


def marlin_on_cpu(prefix: str, expert_format: Any, moe_config: Any) -> MarlinBackend:
    """Our backend over these operators, for layers whose experts are all resident."""
    install()
    backend = MarlinBackend(expert_format, moe_config)
    backend._align, backend._sum = align, moe_sum
    run = backend._run
    backend._run = lambda **arguments: run(workspace=torch.zeros(1), **arguments)  # else from a CUDA device's size
    return backend


def assert_chunks_convert_as_the_layer(layer: Any) -> None:
    """A layer loaded with ``OnlyLoads``: its experts convert alike however many there are at a time."""
    backend = marlin_on_cpu("", layer.quant_method.expert_format, layer.moe_config)
    backend.left_out = layer.loaded.absent()
    store = layer.expert_cache.store
    raw = {name: store.field(name) for name in store.layout}
    before = {name: as_bytes(tensor).clone() for name, tensor in raw.items()}
    whole = backend.convert(raw)
    for start, end in ((0, 1), (1, 6), (6, store.num_experts)):
        chunk = backend.convert({name: tensor[start:end] for name, tensor in raw.items()})
        assert chunk.keys() == whole.keys()
        for name, tensor in chunk.items():
            assert tensor.is_contiguous()
            assert torch.equal(as_bytes(tensor), as_bytes(whole[name][start:end])), name
    assert all(torch.equal(as_bytes(tensor), before[name]) for name, tensor in raw.items()), "the store was changed"
