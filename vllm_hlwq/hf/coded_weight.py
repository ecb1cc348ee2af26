"""A weight that stays coded, and the products that a model needs of it.

The activation is rotated instead of the weight: ``y = (x H) (W H)^T``, where ``W H`` are the levels that the codes name
times their block's norm. That saves the product with H over all of the weight, which is most of decoding's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch.nn import functional

from ..codec import BlockCoder, CodedMatrix, blocks_of, dequantize_matrix, packed_size

GPU_KERNEL_BLOCK = 16
"""Least block size of the kernels."""


@dataclass(frozen=True, eq=False)
class CodeFormat:
    """What codes stand for.

    table: float32 levels ``[2 ** bits]``, on the CPU.
    block_size: weights that share a norm.
    in_features: columns of the weight, before a row's last block was filled up.
    """

    table: torch.Tensor
    block_size: int
    in_features: int

    @property
    def bits(self) -> int:
        return len(self.table).bit_length() - 1

    @property
    def blocks(self) -> int:
        return blocks_of(self.in_features, self.block_size)

    @property
    def row_bytes(self) -> int:
        return packed_size(self.blocks * self.block_size, self.bits)

    def same(self, other: CodeFormat) -> bool:
        """Do codes of both stand for the same?"""
        sizes = (self.block_size, self.in_features) == (other.block_size, other.in_features)
        return sizes and torch.equal(self.table, other.table)

    @cached_property
    def _coders(self) -> dict[torch.device, BlockCoder]:
        return {}

    @cached_property
    def _levels(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def levels(self, device: torch.device) -> torch.Tensor:
        """The table over the root of the block size, what a normalised rotation's product wants: float32."""
        if device not in self._levels:
            self._levels[device] = (self.table * self.block_size**-0.5).to(device)
        return self._levels[device]

    @cached_property
    def _hadamards(self) -> dict[tuple[torch.device, torch.dtype], torch.Tensor]:
        return {}

    def hadamard(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """H of a block, 1 and -1."""
        if (device, dtype) not in self._hadamards:
            self._hadamards[device, dtype] = self.coder(device).hadamard.to(dtype)
        return self._hadamards[device, dtype]

    def coder(self, device: torch.device) -> BlockCoder:
        """The coder on a device, made at its first use."""
        if device not in self._coders:
            self._coders[device] = shared_coder(self.table, self.block_size, device)
        return self._coders[device]


_shared: list[BlockCoder] = []
_working = Lock()
"""A coder's working memory serves one caller at a time; a model may be called on several threads."""


def shared_coder(table: torch.Tensor, block_size: int, device: torch.device) -> BlockCoder:
    """One coder for all weights of a table: its working memory is as large as a chunk."""
    for coder in _shared:
        if (coder.block_size, coder.device) == (block_size, device) and torch.equal(coder.table.cpu(), table):
            return coder
    _shared.append(BlockCoder(table, block_size, device))
    return _shared[-1]


def norm_values(norms: torch.Tensor) -> torch.Tensor:
    """Norms as numbers. They are kept as int16, which a model's change of dtype leaves alone, unlike float16."""
    return norms.view(torch.float16)


def rotate(activation: torch.Tensor, layout: CodeFormat) -> torch.Tensor:
    """``x H`` by blocks, padded with zeros: ``[tokens, blocks * block_size]`` of the activation's dtype.

    Args:
        activation: ``[tokens, in_features]``.
        layout: of the weight that it will meet.
    """
    width = layout.blocks * layout.block_size
    if width != layout.in_features:
        activation = functional.pad(activation, (0, width - layout.in_features))
    hadamard = layout.coder(activation.device).hadamard
    blocks = activation.float().reshape(-1, layout.block_size)
    rotated = torch.mm(blocks, hadamard).mul_(layout.block_size**-0.5)
    return rotated.to(activation.dtype).view(-1, width)


def coded_linear(
    activation: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
) -> torch.Tensor:
    """The product with a coded weight's transpose.

    Args:
        activation: ``[..., in_features]``, floating.
        packed: uint8 ``[out_features, row_bytes]``, codes MSB-first, on the activation's device.
        norms: int16 ``[out_features, blocks]``, the bits of float16 numbers.
        layout: of the codes.

    Returns:
        ``[..., out_features]`` of the activation's dtype. Gradients reach the activation, not the codes.
    """
    flat = activation.reshape(-1, layout.in_features)
    out: torch.Tensor = _Product.apply(flat, packed, norms, layout)  # type: ignore[no-untyped-call]
    return out.view(*activation.shape[:-1], len(packed))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, norms)
        ctx.layout = layout
        if not activation.is_cuda:
            from .rotated_cpu import rotated_linear as linear_on_cpu

            return linear_on_cpu(activation, packed, norms, layout)
        if layout.block_size >= GPU_KERNEL_BLOCK:
            from .rotated_kernel import rotated_linear

            return rotated_linear(activation, packed, norms, layout)
        return functional.linear(activation, decode(packed, norms, layout, activation.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, norms = ctx.saved_tensors
        return grad @ decode(packed, norms, ctx.layout, grad.dtype), None, None, None


def decode(packed: torch.Tensor, norms: torch.Tensor, layout: CodeFormat, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``[rows, in_features]`` of a coded weight, with the bits that decoding a checkpoint gives.

    Args:
        packed: uint8 ``[rows, row_bytes]``.
        norms: int16 ``[rows, blocks]``.
        layout: of the codes.
        dtype: of the result; the weights are rounded to BF16 first, as a decoded checkpoint's are.
    """
    coded = CodedMatrix(packed.reshape(-1), norm_values(norms), layout.in_features)
    with _working:
        return dequantize_matrix(coded, layout.coder(packed.device)).to(dtype)
