"""Parameter names and shapes of a model from its ``config.json`` alone, as transformers would build it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_REPEATED = re.compile(r"(?<!per_)(layers?|experts?|depths?)$")
MAX_REPEATED = 1024
"""Layers or experts of any model; a damaged configuration may ask for billions, which would take for ever."""


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of parameters and stored buffers, tied copies left out; empty if transformers cannot build it."""
    return _parameter_shapes(json.dumps(config, sort_keys=True))


def _integers(config: Any) -> Iterator[tuple[str, int]]:
    if isinstance(config, dict):
        for key, value in config.items():
            if isinstance(value, int):
                yield key, value
            yield from _integers(value)


@lru_cache(maxsize=4)
def _parameter_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(config_json)
    kind = config.get("model_type")
    repeats = (value for key, value in _integers(config) if _REPEATED.search(key))
    if not isinstance(kind, str) or max(repeats, default=0) > MAX_REPEATED:
        return {}
    try:
        values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        built = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
    except Exception:  # noqa: BLE001 - a damaged configuration fails anywhere in transformers, with any error
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            shapes[name] = tuple(tensor.shape)
        seen.add(id(tensor))
    return shapes
