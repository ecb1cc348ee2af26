"""What sizing must know of a model's configuration: read from transformers' object, which vLLM's own is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.tensor_folder import read_json
from .checkpoint_sizes import ModelFacts
from .errors import CheckpointError

EXPERT_COUNTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""In vLLM's order."""
FLOAT_BYTES = 2
"""vLLM loads float32 models in 16 bit too, unless it is told otherwise."""


@dataclass(frozen=True)
class ConfiguredModel:
    """A model as its ``config.json`` describes it, served without encoders of images and sound.

    facts: for sizing.
    top_k: experts of a token.
    longest: tokens of the longest sequence.
    """

    facts: ModelFacts
    top_k: int
    longest: int


def layer_configs(text_config: Any) -> list[Any]:
    """The configuration of each decoder layer: where layers differ, transformers refuses to name one value for all."""
    count = text_config.num_hidden_layers
    by_layer = getattr(text_config, "per_layer_config", None)
    return [text_config] * count if by_layer is None else [by_layer[layer] for layer in range(count)]


def rotary_elements(text_config: Any, length: int) -> int:
    """Values of the tables of rotary positions, one for each kind of attention, at the model's full length or more."""
    positions = max(int(getattr(text_config, "max_position_embeddings", 0) or 0), length)
    layers = layer_configs(text_config)
    kinds = getattr(text_config, "layer_types", None) or [None] * len(layers)
    tables = {(kind, _head_dim(layer)) for kind, layer in zip(kinds, layers, strict=False)}
    return positions * sum(head_dim for _, head_dim in tables)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // _heads(config))


def _heads(config: Any) -> int:
    return int(getattr(config, "num_attention_heads", None) or 1)


def least_kv_heads(text_config: Any) -> int:
    """Heads of keys and values of the layer with the fewest: more ranks than that hold copies."""
    layers = layer_configs(text_config)
    return min(int(getattr(layer, "num_key_value_heads", None) or _heads(layer)) for layer in layers)


def configured_model(path: Path, length: int) -> ConfiguredModel:
    """Read ``config.json`` as transformers does, with its defaults.

    Args:
        path: the model's folder.
        length: tokens that will be served.

    Raises:
        CheckpointError: there is none, transformers does not know the model, or it has no experts.
    """
    from transformers import AutoConfig

    folder = path if path.is_dir() else path.parent
    settings = {key: value for key, value in read_json(folder / "config.json").items() if key != "quantization_config"}
    kind = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **settings)
        text = config.get_text_config()
    except Exception as error:  # noqa: BLE001 - a damaged configuration fails anywhere in transformers, with any error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it ({reason})") from None
    experts, top_k = (_first(text, names) for names in (EXPERT_COUNTS, EXPERTS_OF_A_TOKEN))
    if not experts or not top_k:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} has no mixture-of-experts layers, so there is nothing to "
            "cache"
        )
    facts = ModelFacts(
        num_layers=text.num_hidden_layers,
        num_experts=experts,
        float_bytes=FLOAT_BYTES,
        tied_head=bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)),
        layer_types=tuple(getattr(text, "layer_types", None) or ()),
        sliding_window=getattr(text, "sliding_window", None),
        kv_shared_layers=getattr(text, "num_kv_shared_layers", None) or 0,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        rotary_elements=rotary_elements(text, length),
        kv_heads=least_kv_heads(text),
    )
    return ConfiguredModel(facts, top_k, int(getattr(text, "max_position_embeddings", 0) or length))


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of some settings that is a positive whole number, 0 if none is."""
    values = [getattr(config, name, None) for name in names]
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
