"""Tells transformers of HLWQ: at once if its quantizers are imported already, else as soon as they are.

transformers has no entry point for quantizers, and importing it only to register would cost every user of this package
two seconds. So ``import vllm_hlwq`` leaves a finder that waits for one module, and is gone once it has been found.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"
METHODS = ("polarengine", "polar")
"""What ``quant_method`` is called, now and in older files."""


def register() -> None:
    """Put configuration and quantizer into transformers' tables; does nothing where they are there already."""
    from transformers.quantizers import auto

    from .config import HLWQConfig
    from .quantizer import HLWQHfQuantizer

    for method in METHODS:
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(method)(HLWQConfig)
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(method)(HLWQHfQuantizer)
    # Else what a user passes for a checkpoint that has a configuration of its own would be dropped with a warning.
    if HLWQConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, HLWQConfig)


def _register_or_warn() -> None:
    """In the midst of importing transformers, which vLLM cannot do without: what we lack there must not end it."""
    try:
        register()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        warnings.warn(f"vllm-hlwq cannot register HLWQ with this transformers: {error}", stacklevel=2)


class _Waiting(MetaPathFinder):
    """Finds nothing, but registers when transformers' quantizers have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register_or_warn()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Register now if transformers' quantizers are imported, else when they will be."""
    if QUANTIZERS in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
