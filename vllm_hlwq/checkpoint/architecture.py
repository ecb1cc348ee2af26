"""Parameter names and shapes of a model from its ``config.json`` alone, as transformers would build it."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of parameter or stored buffer, tied copies left out; empty for what transformers does not know."""
    return _parameter_shapes(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _parameter_shapes(config_json: str) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(config_json)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return {}
    try:
        values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        built = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    # Buffers too: Gemma-4's layer_scalar and the like come from the checkpoint as parameters do.
    stored = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    return {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *buffers]}
