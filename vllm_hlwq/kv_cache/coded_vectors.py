"""The coded keys, or values, of one layer: packed codes and norms that grow by appending, token after token.

A block is a whole head. Heads whose width is no power of two are padded with zeros, which decoding drops. All tokens'
rows lie one after the other, so that appending writes only what is new and decoding reads one stretch of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property

import torch

from ..codec import GAIN, BlockCoder, codebook, packed_size
from ..codec.scratch import Scratch
from ..errors import KVCacheError

BITS = (2, 3, 4)
LEAST_WIDTH = 8
"""Eight codes of any width are whole bytes."""
GROWTH = 16
"""A store that is full grows by one part in so many: room that is paid for, against how often it is moved."""
ROUND_TO = 32
CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Coordinates that are coded at a time: what one operation leaves is in a core's cache for the next."""


class VectorCoder:
    """Codes vectors of one width on one device.

    Args:
        head_dim: width of a vector.
        bits: 2, 3 or 4.
        device: where the vectors are.
    """

    def __init__(self, head_dim: int, bits: int, device: torch.device) -> None:
        self.head_dim = head_dim
        self.width = max(LEAST_WIDTH, 1 << (head_dim - 1).bit_length())
        self.bits = bits
        self.device = device
        self.row_bytes = packed_size(self.width, bits)
        self.blocks = BlockCoder(codebook("C", bits), self.width, device)
        self._step = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // self.width)

    def _worker(self) -> BlockCoder:
        """A coder whose working memory is given back when the caller is done."""
        worker = copy(self.blocks)
        worker.scratch = Scratch(self.device)
        return worker

    def encode(self, vectors: torch.Tensor, packed: torch.Tensor, norms: torch.Tensor) -> None:
        """Code vectors ``[n, head_dim]`` of any floating dtype.

        Args:
            vectors: what to code.
            packed: uint8 ``[n, row_bytes]``, contiguous, to write the codes to, MSB-first.
            norms: float16 ``[n]`` to write the factors to.

        Raises:
            KVCacheError: a vector is not finite, or so large that its norm is beyond float16.
        """
        worker = self._worker()
        for start in range(0, len(vectors), self._step):
            rows = slice(start, start + self._step)
            blocks = torch.nn.functional.pad(vectors[rows].float(), (0, self.width - self.head_dim)).contiguous()
            try:
                norms[rows], _ = worker.encode(blocks, GAIN, packed[rows].view(-1))
            except ValueError as problem:
                raise KVCacheError(f"a key or value {problem}; use a cache that does not code them") from None

    def decode(self, packed: torch.Tensor, norms: torch.Tensor, out: torch.Tensor) -> None:
        """Write vectors ``[n, ..., head_dim]`` of codes ``[n, ..., row_bytes]`` and norms ``[n, ...]`` to ``out``."""
        worker = self._worker()
        step = max(1, self._step // max(1, norms[:1].numel()))
        for start in range(0, len(norms), step):
            rows = slice(start, start + step)
            vectors = worker.decode(packed[rows].reshape(-1), norms[rows].reshape(-1))
            out[rows] = vectors.view(*norms[rows].shape, self.width)[..., : self.head_dim]

    @cached_property
    def tables(self) -> list[torch.Tensor]:
        """What is kept besides codes."""
        return [value for value in vars(self.blocks).values() if isinstance(value, torch.Tensor)]


class CodedVectors:
    """Codes and norms of ``length`` tokens.

    Args:
        coder: of the vectors' width.
        batch: sequences.
        heads: key-value heads.
    """

    def __init__(self, coder: VectorCoder, batch: int, heads: int) -> None:
        self.coder = coder
        self.length = 0
        self.codes = torch.empty(0, batch, heads, coder.row_bytes, dtype=torch.uint8, device=coder.device)
        self.norms = torch.empty(0, batch, heads, dtype=torch.float16, device=coder.device)

    def append(self, vectors: torch.Tensor) -> None:
        """Code ``[batch, heads, tokens, head_dim]`` behind what is there."""
        tokens = vectors.shape[2]
        stop = self.length + tokens
        self._reserve(stop)
        rows = vectors.permute(2, 0, 1, 3).reshape(-1, vectors.shape[3])
        codes, norms = self.codes[self.length : stop], self.norms[self.length : stop]
        self.coder.encode(rows, codes.view(-1, self.coder.row_bytes), norms.view(-1))
        self.length = stop

    def _reserve(self, tokens: int) -> None:
        capacity = len(self.norms)
        if tokens <= capacity:
            return
        capacity = max(tokens, capacity + capacity // GROWTH)
        capacity = -(-capacity // ROUND_TO) * ROUND_TO
        for name in ("codes", "norms"):
            old = getattr(self, name)
            new = old.new_empty(capacity, *old.shape[1:])
            new[: self.length] = old[: self.length]
            setattr(self, name, new)

    def decode(self, tokens: int, out: torch.Tensor) -> None:
        """Write the first ``tokens`` to ``out`` ``[batch, heads, tokens, head_dim]``."""
        self.coder.decode(self.codes[:tokens], self.norms[:tokens], out.permute(2, 0, 1, 3))

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``; their room is kept."""
        self.length = min(self.length, tokens)

    def choose(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the sequences by those that ``select`` takes from a tensor ``[batch, ...]``."""
        for name in ("codes", "norms"):
            kept = getattr(self, name)[: self.length]
            setattr(self, name, select(kept.transpose(0, 1)).transpose(0, 1).contiguous())
