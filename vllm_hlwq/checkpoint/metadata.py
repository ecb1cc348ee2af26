"""The JSON that goes with HLWQ weights: what ``config.json`` says of them, and ``hlwq_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError

HLWQ_CONFIG = "hlwq_config.json"
LEGACY_CONFIG = "polar_config.json"
HASHES = "hlwq_sha256.json"
QUANT_METHODS = ("polarengine", "polar")


class QuantizationConfig(BaseModel):
    """``quantization_config`` of ``config.json``, as our writer writes it."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["polarengine"] = "polarengine"
    format: str
    bits: int = Field(ge=2, le=8)
    block_size: int
    norm_dtype: Literal["float16"] = "float16"
    packing: Literal["msb"] = "msb"
    rotation: Literal["sylvester"] = "sylvester"
    codebook: Literal["explicit"] = "explicit"
    modules_to_not_convert: list[str]


class ParameterStats(BaseModel):
    """One coded parameter: how it looks, and the relative mean squared error of its coding."""

    shape: list[int]
    relative_mse: float
    bytes: int


class HlwqConfig(BaseModel):
    """``hlwq_config.json`` as our writer writes it."""

    method: str = "Hadamard-Lloyd weight quantization"
    format: str
    bits: int
    block_size: int
    codebook: str
    fit: str
    relative_mse: float
    original_bytes: int
    bytes: int
    coded: dict[str, ParameterStats]
    kept: dict[str, str]
    """Parameters left in 16 bit, and why."""


def parse(model: type[BaseModel], content: dict[str, Any], path: Path) -> Any:
    """Validate JSON against a model.

    Raises:
        CheckpointError: naming the first field that is wrong and its value.
    """
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {field} is {first['input']!r}: {first['msg']}; make it again") from None
