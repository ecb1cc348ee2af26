"""The one place where transformers' loading is changed: which tensors it fills a model with.

A quantizer of transformers may rename and convert the tensors of the files it is given, but not say where tensors come
from, and HLWQ checkpoints spell names in many ways, take what they lack from a base model, and code a stack of experts
by slices. So the loader's function is wrapped: for HLWQ checkpoints it gets our lazily decoded tensors in place of the
raw ones, and everything else about it stays: the model's own conversions, dtypes, devices, ties.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol, runtime_checkable

from ..errors import CheckpointError

LOADER = "convert_and_load_state_dict_in_model"
PARAMETERS = ("model", "state_dict", "load_config")
HOOK = "update_tp_plan"
"""Of transformers' quantizers: what they are told first. Gone from 5.21 on, where coded experts load otherwise too."""
KNOWN_TRANSFORMERS = "transformers>=5.16.1,<5.20"
"""What vLLM 0.32 and 0.33 both allow; 0.33 also 5.20, with which HLWQ works too."""
_REMEDY = "download the checkpoint again, or give the 16-bit model with HLWQConfig(base_model=...)"


@runtime_checkable
class TensorProvider(Protocol):
    """A quantizer that has a say in what its model is filled with."""

    def tensors(self) -> Mapping[str, Any] | None:
        """Tensors by name in the checkpoint; None to load the files as they are."""
        ...

    def loaded(self, model: Any, info: Any) -> None:
        """Called when all tensors are in the model, with the loader's report, before what is missing is started."""
        ...


def install() -> None:
    """Wrap the loader's function; does nothing the second time.

    Raises:
        CheckpointError: the installed transformers loads models in another way.
    """
    from transformers import __version__, modeling_utils
    from transformers.quantizers.base import HfQuantizer

    load = getattr(modeling_utils, LOADER, None)
    if hasattr(load, "hlwq"):
        return
    hooked = hasattr(HfQuantizer, HOOK)
    if load is None or not hooked or not set(PARAMETERS) <= set(inspect.signature(load).parameters):
        raise CheckpointError(
            f"transformers {__version__} loads models in a way that vllm-hlwq does not know; "
            f"pip install '{KNOWN_TRANSFORMERS}', or use `hlwq dequantize`"
        )

    @wraps(load)
    def load_from_provider(model: Any, state_dict: Any, load_config: Any, **options: Any) -> Any:
        provider = load_config.hf_quantizer
        if not isinstance(provider, TensorProvider):
            return load(model=model, state_dict=state_dict, load_config=load_config, **options)
        tensors = provider.tensors()
        if tensors is not None:
            # Without its quantizer, so that dtypes and shapes are held to the model's as for any 16-bit checkpoint.
            state_dict, load_config = tensors, replace(load_config, hf_quantizer=None)
        result = load(model=model, state_dict=state_dict, load_config=load_config, **options)
        provider.loaded(model, result[0])
        check_complete(model, result[0], load_config.pretrained_model_name_or_path)
        return result

    load_from_provider.hlwq = True  # type: ignore[attr-defined]
    setattr(modeling_utils, LOADER, load_from_provider)


def check_complete(model: Any, info: Any, path: object) -> None:
    """Refuse a model of which a parameter was not loaded; transformers would start it with random numbers.

    Args:
        model: filled with what there is.
        info: the loader's report.
        path: of the checkpoint, for errors.

    Raises:
        CheckpointError: naming the first parameter that is missing, or of another shape, or failed.
    """
    for name, found, wanted in sorted(info.mismatched_keys):
        raise CheckpointError(f"{path}: {name} is {list(found)}, the model's is {list(wanted)}; {_REMEDY}")
    for name, problem in sorted(info.conversion_errors.items()):
        lines = str(problem).strip().splitlines()
        # The exception's own line comes before one that says where it was met.
        reason = lines[-2] if len(lines) > 1 and lines[-1].startswith("Error") else lines[-1]
        raise CheckpointError(f"{path}: {name} cannot be made ({reason}); download or make the checkpoint again")
    ignored = model._keys_to_ignore_on_load_missing or ()
    for name in sorted(untied(info.missing_keys, model.all_tied_weights_keys)):
        if not any(re.search(pattern, name) for pattern in ignored):
            raise CheckpointError(f"{path}: {name} is missing; {_REMEDY}")


def untied(missing: Collection[str], ties: Mapping[str, str]) -> set[str]:
    """Of missing parameters, those that no tie fills.

    Args:
        missing: their names.
        ties: the source of each tied parameter; either may be in the checkpoint.
    """
    groups: dict[str, set[str]] = {}
    for target, source in ties.items():
        groups.setdefault(source, {source}).add(target)
    filled = {name for group in groups.values() if not group <= set(missing) for name in group}
    return set(missing) - filled
