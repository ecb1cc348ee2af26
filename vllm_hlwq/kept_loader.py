"""vLLM's loader for a start whose experts all come from an earlier one: the checkpoint's stay in their files.

Mapping a file and not touching a tensor does not do: safetensors has the kernel read ahead what it is asked for. So for
each tensor of experts vLLM's model is given one without memory, which finds its way to our layer and is passed over
there. Where a model had such weights elsewhere, copying one would fail: nothing can go unnoticed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from safetensors import safe_open

from .checkpoint.tensor_folder import DTYPES
from .checkpoint_sizes import is_of_experts
from .errors import ExpertCacheError
from .expert_loading import current_loading
from .options import flag
from .record_cache import reads_whole_files
from .vllm_compat import borrow

PREFIX = "without-kept-experts-"
FORMATS = ("auto", "hf", "safetensors", "mistral")
"""Of loading, in which vLLM reads safetensors files tensor by tensor."""


class KeptExpertsLoader(borrow("DefaultModelLoader")):  # type: ignore[misc]
    """Loads as vLLM does, unless the experts of all layers are there already."""

    counter_before_loading_weights: float

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format=load_config.load_format.removeprefix(PREFIX)))

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        try:
            super().load_weights(model, model_config)
        except NotImplementedError as error:
            if not current_loading().all_restored:
                raise
            raise ExpertCacheError(
                f"{model_config.model}: holds weights named as experts outside of its mixture-of-experts layers "
                f"({error}), which are not kept; remove {flag('store_cache')}"
            ) from None

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if current_loading().all_restored:
            _, files, are_safetensors, _ = self._prepare_weights(
                source.model_or_path, source.subfolder, source.revision, source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )  # fmt: skip
            if are_safetensors:
                self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
                return ((source.prefix + name, tensor) for file in sorted(files) for name, tensor in tensors(file))
        stock: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(source)
        return stock


def tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors by name, those of experts without memory."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - safe_open's handle is no mapping
            view = opened.get_slice(name)
            if is_of_experts(name) and view.get_dtype() in DTYPES:
                yield name, torch.empty(view.get_shape(), dtype=DTYPES[view.get_dtype()], device="meta")
            else:
                yield name, opened.get_tensor(name)


@contextmanager
def keeping_experts(load_config: Any) -> Iterator[None]:
    """Let an engine that is loaded meanwhile use this loader, where vLLM would read tensor by tensor."""
    load_format = load_config.load_format
    if load_format in FORMATS and reads_whole_files(load_config) is None:
        load_config.load_format = registered_format(load_format)
    try:
        yield
    finally:
        load_config.load_format = load_format


@cache
def registered_format(load_format: str) -> str:
    """The name by which vLLM knows this loader, in the place of a format of its own."""
    borrow("register_model_loader")(PREFIX + load_format)(KeptExpertsLoader)
    return PREFIX + load_format
