"""``HLWQConfig``: how transformers is to load an HLWQ checkpoint, or to code a 16-bit model while loading it."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from .registration import METHODS

BLOCK_SIZE = 128
CHOICES = {
    "mode": (None, "decode", "coded"),
    "codebook": (None, "A", "B", "C"),
    "fit": ("norm", "gain", "search"),
    "bits": tuple(range(2, 9)),
}


class HLWQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Options of ``from_pretrained(..., quantization_config=HLWQConfig(...))``.

    Args:
        bits: width of a code, 2 to 8, for a 16-bit model that is coded while it loads.
        mode: ``decode`` to the model's dtype at load, the default for checkpoints; ``coded`` to keep the codes and
            compute from them, about 5.1 bits a weight, the default for what is coded while it loads.
        base_model: folder of the 16-bit model, for checkpoints that hold only what is coded.
        codebook: table of a checkpoint that stores none, detected if there are enough codes; or to code with, then C.
        fit: what is stored for a block when coding: ``norm``, ``gain`` or ``search``.
        modules_to_not_convert: what else to leave in 16 bit when coding: parts of names, between dots.

    Raises:
        CheckpointError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        bits: int = 5,
        mode: str | None = None,
        base_model: str | None = None,
        codebook: str | None = None,
        fit: str = "search",
        modules_to_not_convert: list[str] | None = None,
    ) -> None:
        self.quant_method = METHODS[0]
        self.bits = bits
        self.mode = mode
        self.base_model = base_model
        self.codebook = codebook
        self.fit = fit
        self.modules_to_not_convert = modules_to_not_convert
        self.block_size = BLOCK_SIZE
        self.left_out: list[str] = []
        parts = modules_to_not_convert or []
        if isinstance(parts, str) or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(
                f"HLWQConfig: modules_to_not_convert is {parts!r}; give a list of parts of names, as ['lm_head']"
            )
        for option, choices in CHOICES.items():
            value = getattr(self, option)
            if value not in choices or isinstance(value, float):
                listed = ", ".join(str(choice) for choice in choices if choice is not None)
                raise CheckpointError(f"HLWQConfig: {option} is {value!r}; give one of {listed}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that a checkpoint states; how it is packed is for the checkpoint's reader to judge.

        ``left_out`` names what only a user can mean; a checkpoint may use these words for something else.
        """
        names = ("bits", "mode", "modules_to_not_convert")
        config = cls(**{name: config_dict[name] for name in names if config_dict.get(name) is not None})
        config.left_out = [name for name in ("base_model", "codebook", "fit") if config_dict.get(name) is not None]
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @property
    def dequantize(self) -> bool:
        """Whether the loaded model is an ordinary one; transformers then forgets that it was quantised."""
        return self.mode in (None, "decode")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the user's configuration says beside the checkpoint's own."""
        given = {name: getattr(self, name) for name in ("mode", "base_model", "codebook")}
        return {name: value for name, value in given.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """What is saved with coded weights."""
        return {
            "quant_method": self.quant_method,
            "format": f"hlwq-q{self.bits}",
            "bits": self.bits,
            "block_size": self.block_size,
            "norm_dtype": "float16",
            "packing": "msb",
            "rotation": "sylvester",
            "codebook": "explicit",
            "modules_to_not_convert": self.modules_to_not_convert or [],
            **({"mode": self.mode} if self.mode else {}),
        }
