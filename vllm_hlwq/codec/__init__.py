"""HLWQ's codec: matrices to Hadamard-rotated, Lloyd-coded blocks and back, on CPU and CUDA."""

from .blocks import GAIN, NORM, SEARCH, BlockCoder, Refinement
from .codebooks import CodebookName, codebook, detect
from .matrix import CodedMatrix, blocks_of, dequantize_matrix, quantize_matrix
from .packing import pack, packed_size, unpack

__all__ = [
    "GAIN",
    "NORM",
    "SEARCH",
    "BlockCoder",
    "CodebookName",
    "CodedMatrix",
    "Refinement",
    "blocks_of",
    "codebook",
    "dequantize_matrix",
    "detect",
    "pack",
    "packed_size",
    "quantize_matrix",
    "unpack",
]
