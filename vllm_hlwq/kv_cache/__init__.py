"""HLWQ's KV cache for transformers: keys and values older than a window as 2, 3 or 4 bit codes."""

from .cache import HLWQCache

__all__ = ["HLWQCache"]
