"""transformers' quantizer for HLWQ: opens the checkpoint, and says what of the model stays coded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError
from .config import HLWQConfig

if TYPE_CHECKING:
    import torch

    from ..checkpoint.reader import HlwqSource
    from .coding_plan import CodingPlan
    from .state_dict import LazyTensor


class HLWQHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads one model.

    Args:
        quantization_config: what the checkpoint and the user say.
        pre_quantized: whether the checkpoint says that it is coded.

    Raises:
        CheckpointError: the installed transformers loads models in another way.
    """

    requires_calibration = False
    quantization_config: HLWQConfig
    pre_quantized: bool

    def __init__(self, quantization_config: HLWQConfig, **kwargs: Any) -> None:
        from . import loading

        loading.install()
        super().__init__(copy(quantization_config), **kwargs)
        self._source: HlwqSource | None = None
        self._plan: CodingPlan | None = None
        self._to_code: set[str] = set()
        self._conversions: Any = None

    def update_tp_plan(self, config: Any) -> Any:
        """The first that transformers shows of the checkpoint: is it coded, and in a file of an older name?"""
        from ..checkpoint.reader import is_hlwq
        from ..checkpoint.tensor_folder import POLAR_STATE

        if not self.pre_quantized and self.quantization_config.left_out:
            named = ", ".join(self.quantization_config.left_out)
            raise CheckpointError(f"quantization_config: a dictionary cannot say {named}; give an HLWQConfig instead")
        folder = Path(config.name_or_path or "")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if POLAR_STATE in names and not any(name.startswith("model") and ".safetensors" in name for name in names):
            config.transformers_weights = POLAR_STATE
        if not self.pre_quantized and any(name.endswith(".safetensors") for name in names):
            self.pre_quantized = is_hlwq(folder)  # older tools wrote nothing into config.json
        if not self.pre_quantized:
            if self.quantization_config.mode == "decode":
                raise CheckpointError(
                    f"{config.name_or_path}: is not coded, so there is nothing to decode; leave HLWQConfig's mode out"
                )
            if self.quantization_config.base_model is not None:
                raise CheckpointError(
                    f"{config.name_or_path}: is not coded, so it lacks nothing; leave HLWQConfig's base_model out"
                )
            self.quantization_config.mode = "coded"
        return config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what codes cannot do."""
        places = device_map.values() if isinstance(device_map, dict) else ()
        if not self.quantization_config.dequantize and "disk" in places:
            raise CheckpointError("device_map: codes cannot be offloaded to disk; leave 'disk' out of device_map")

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from . import coding_plan, on_the_fly

        if not self.pre_quantized:
            self._to_code = on_the_fly.weights_to_code(model, self.quantization_config)
            if not self._to_code:
                raise CheckpointError(f"{model.config.name_or_path}: has no weight that HLWQ codes; load it without")
            return
        if not checkpoint_files:
            raise CheckpointError("HLWQ weights are read from a checkpoint's files; give from_pretrained its folder")
        self._source = self._open(Path(checkpoint_files[0]).parent, decoding_device(device_map))
        if not self.quantization_config.dequantize:
            self._plan = coding_plan.plan(model, self._source)
            if not self._plan.layouts:
                raise CheckpointError(
                    f"{self._source.path}: no layer of the model can keep its codes; use mode='decode'"
                )
            coding_plan.apply(model, self._plan.layouts)
            first = next(iter(self._plan.layouts.values()))
            self.quantization_config.bits, self.quantization_config.block_size = first.bits, first.block_size

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._to_code

    def get_quantize_ops(self) -> Any:
        from .on_the_fly import CodeWeight

        return CodeWeight(self.quantization_config)

    def loaded(self, model: Any, info: Any) -> None:
        """Called by ``loading`` when all that the checkpoint has is in the model."""
        from .on_the_fly import share_codes

        if self._to_code:
            share_codes(model, info.missing_keys, self._to_code)

    def _open(self, folder: Path, device: torch.device) -> HlwqSource:
        from ..checkpoint.reader import HlwqSource

        options = self.quantization_config
        base = Path(options.base_model) if options.base_model else None
        with ordinary_tensors():
            source = HlwqSource(folder, base, options.codebook, device)  # type: ignore[arg-type]
        source.result_device = device
        return source

    def tensors(self) -> Mapping[str, LazyTensor] | None:
        """Every tensor of the checkpoint, for ``loading``."""
        from .state_dict import SourceTensors

        if self._source is None:
            return None
        tensors = SourceTensors(self._source)
        found = {}
        for name in self._source.parameters:
            layout = self._plan.sources.get(name) if self._plan else None
            found.update({name: tensors.weight(name)} if layout is None else tensors.codes(name, layout))
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ..checkpoint.metadata import AUTO_MAP
        from ..checkpoint.tensor_folder import POLAR_STATE
        from .modules import keep_vocabulary

        self._source = None
        for name, value in (("transformers_weights", POLAR_STATE), ("auto_map", AUTO_MAP)):
            if getattr(model.config, name, None) == value:
                delattr(model.config, name)  # of the loaded files, not of the model
        if not self.pre_quantized or not self.quantization_config.dequantize:
            # Undone by ``saving``: transformers would not know how to split and name codes.
            self._conversions, model._weight_conversions = model._weight_conversions, []
            keep_vocabulary(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        from .saving import checkpoint_tensors

        return checkpoint_tensors(model, self._conversions), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """New tensors are float32 on the CPU; while transformers builds a model they are of its dtype, without memory."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def decoding_device(device_map: Any) -> torch.device:
    """Where to decode: the first accelerator that a part of the model goes to, else the CPU."""
    import torch

    if isinstance(device_map, str):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for place in (device_map or {}).values():
        if place not in ("cpu", "disk", "meta") and torch.device(place).type == "cuda":
            return torch.device(place)
    return torch.device("cpu")
