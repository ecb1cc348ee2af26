"""Whole matrices to packed codes and norms and back, a cache-sized chunk of blocks at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .blocks import CHUNK_BLOCKS, CUDA_CHUNK_BLOCKS, SEARCH, BlockCoder, Refinement
from .chunks import for_each_chunk
from .packing import packed_size


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix ``[out_features, in_features]`` in HLWQ's form.

    packed: uint8 ``[out * blocks * block_size * bits / 8]``, codes row by row, MSB-first.
    norms: float16 ``[out, blocks]``.
    in_features: columns before each row was padded with zeros to whole blocks.
    squared_error: sum over all weights, before rounding to BF16; 0 unless it was measured.
    """

    packed: torch.Tensor
    norms: torch.Tensor
    in_features: int
    squared_error: float = 0.0


def blocks_of(in_features: int, block_size: int) -> int:
    """Blocks in a row; the last is padded with zeros."""
    return -(-in_features // block_size)


def _rows_at_a_time(blocks: int, device: torch.device) -> int:
    return max(1, (CUDA_CHUNK_BLOCKS if device.type == "cuda" else CHUNK_BLOCKS) // blocks)


def quantize_matrix(
    weight: torch.Tensor, coder: BlockCoder, refinement: Refinement = SEARCH, measure: bool = False
) -> CodedMatrix:
    """Code a matrix.

    Args:
        weight: ``[out, in]`` of any floating dtype, on any device; it is moved to the coder's a chunk at a time.
        coder: table, block size and device.
        refinement: how much is done to lower the error.
        measure: whether the squared error is wanted.

    Returns:
        The coded matrix, on the weight's device.

    Raises:
        ValueError: a weight is not finite, or a block's norm exceeds float16; the message says from which row on.
    """
    weight = weight.detach()  # working memory that it is copied to would want gradients from then on
    rows, in_features = weight.shape
    blocks = blocks_of(in_features, coder.block_size)
    row_bytes = packed_size(blocks * coder.block_size, coder.bits)
    packed = torch.empty(rows * row_bytes, dtype=torch.uint8, device=weight.device)
    norms = torch.empty(rows, blocks, dtype=torch.float16, device=weight.device)
    padding = blocks * coder.block_size - in_features

    def quantize_rows(coder: BlockCoder, start: int, stop: int) -> float:
        padded = _padded(weight[start:stop], blocks, coder)
        target = packed[start * row_bytes : stop * row_bytes]
        same_device = target.device == coder.device
        codes = target if same_device else coder.scratch.take("packed", target.shape, torch.uint8)
        try:
            factors, error = coder.encode(padded, refinement, codes, measure, blocks, padding)
        except ValueError as problem:
            raise ValueError(f"{problem} (in rows {start} to {stop - 1})") from None
        if not same_device:
            target.copy_(codes)
        norms[start:stop].copy_(factors.view(-1, blocks))
        return error

    errors = for_each_chunk(quantize_rows, coder, rows, _rows_at_a_time(blocks, coder.device))
    return CodedMatrix(packed, norms, in_features, sum(errors))


def _padded(chunk: torch.Tensor, blocks: int, coder: BlockCoder) -> torch.Tensor:
    """A chunk of rows as float32 blocks on the coder's device."""
    width = blocks * coder.block_size
    if chunk.shape[1] == width and chunk.dtype == torch.float32 and chunk.device == coder.device:
        return chunk.contiguous().view(-1, coder.block_size)
    padded = coder.scratch.take("blocks", (len(chunk), width), torch.float32)
    padded[:, : chunk.shape[1]].copy_(chunk)
    padded[:, chunk.shape[1] :] = 0
    return padded.view(-1, coder.block_size)


def dequantize_matrix(
    coded: CodedMatrix, coder: BlockCoder, dtype: torch.dtype = torch.bfloat16, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrix ``[out, in]`` that a coded one stands for.

    Args:
        coded: codes of the coder's table and width.
        coder: table, block size and device.
        dtype: of the result.
        out: ``[out, in]`` to write to, in place of a new tensor.

    Raises:
        ValueError: the number of packed bytes does not agree with the norms.
    """
    rows, blocks = coded.norms.shape
    row_bytes = packed_size(blocks * coder.block_size, coder.bits)
    if len(coded.packed) != rows * row_bytes:
        raise ValueError(f"{len(coded.packed)} bytes of codes where {rows} x {blocks} norms want {rows * row_bytes}")
    if out is None:
        out = torch.empty(rows, coded.in_features, dtype=dtype, device=coded.packed.device)
    result = out

    def dequantize_rows(coder: BlockCoder, start: int, stop: int) -> None:
        packed = coded.packed[start * row_bytes : stop * row_bytes].to(coder.device)
        norms = coded.norms[start:stop].reshape(-1).to(coder.device)
        weights = coder.decode(packed, norms)
        result[start:stop].copy_(weights.view(stop - start, -1)[:, : coded.in_features])

    for_each_chunk(dequantize_rows, coder, rows, _rows_at_a_time(blocks, coder.device))
    return result
