"""vllm-hlwq: an expert cache for stock vLLM, and the HLWQ weight codec around it.

Importing it lets transformers load HLWQ checkpoints: see ``hf``. It imports neither transformers nor vLLM nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hf.registration import register_on_import

if TYPE_CHECKING:
    from .hf.config import HLWQConfig

__all__ = ["HLWQConfig"]

register_on_import()


def __getattr__(name: str) -> Any:
    if name == "HLWQConfig":
        from .hf.config import HLWQConfig

        return HLWQConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
