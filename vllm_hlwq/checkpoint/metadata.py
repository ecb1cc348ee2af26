"""The JSON that goes with HLWQ weights: what ``config.json`` says of them, and ``hlwq_config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError
from .tensor_folder import TensorFolder

HLWQ_CONFIG = "hlwq_config.json"
LEGACY_CONFIG = "polar_config.json"
HASHES = "hlwq_sha256.json"
AUTO_FILE = Path(__file__).parent.parent / "hf/hlwq_auto.py"
AUTO_MAP = {"AutoConfig": "hlwq_auto.HLWQAutoConfig"}
"""What ``config.json`` says of that file, which goes with the weights."""
METHOD = "Hadamard-Lloyd weight quantization"


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

    method: str = METHOD
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


class StoredSettings(BaseModel):
    """What a reader takes from any JSON beside coded weights; its other keys vary from tool to tool."""

    model_config = ConfigDict(extra="ignore", strict=True)

    bits: int | None = Field(default=None, ge=2, le=8)
    block_size: int | None = Field(default=None, ge=2)


class StoredQuantization(StoredSettings):
    """What a reader takes from ``quantization_config``: nothing there may ask for another decoding."""

    quant_method: Literal["polarengine", "polar"] = "polarengine"
    norm_dtype: Literal["float16"] = "float16"
    packing: Literal["msb"] = "msb"
    rotation: Literal["sylvester"] = "sylvester"
    codebook: str | None = None


class LegacyConfig(StoredSettings):
    """What a reader takes from ``polar_config.json``."""

    format: Literal["polar_engine_v4", "polar_engine_v5"] | None = None


_Model = TypeVar("_Model", bound=BaseModel)


def parse(model: type[_Model], content: Any, path: Path) -> _Model:
    """Validate JSON against a model.

    Raises:
        CheckpointError: naming the first field that is wrong and its value.
    """
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the content"
        value = f"{first['input']!r:.60}"
        raise CheckpointError(f"{path}: {field} is {value}: {first['msg']}; download or make it again") from None


@dataclass(frozen=True)
class Settings:
    """All that a folder's JSON says of its coded weights.

    bits, block_size: None where no file states them.
    codebook_stored: whether ``config.json`` says that the table is in the files.
    own: our writer's list of parameters, if our writer made the folder.
    """

    bits: int | None = None
    block_size: int | None = None
    codebook_stored: bool = False
    own: HlwqConfig | None = None


def read_settings(folder: TensorFolder) -> Settings:
    """The settings of a folder.

    Raises:
        CheckpointError: a file is damaged, states what no reader can honour, or contradicts another.
    """
    found: dict[str, StoredSettings] = {}
    own = None
    legacy = folder.json(LEGACY_CONFIG)
    if legacy is not None:
        found[LEGACY_CONFIG] = parse(LegacyConfig, legacy, folder.path / LEGACY_CONFIG)
    content = folder.json(HLWQ_CONFIG)
    if content is not None:
        found[HLWQ_CONFIG] = parse(StoredSettings, content, folder.path / HLWQ_CONFIG)
        if content.get("method") == METHOD:
            own = parse(HlwqConfig, content, folder.path / HLWQ_CONFIG)
    quantization = folder.config().get("quantization_config")
    stored = None
    if quantization is not None:
        stored = parse(StoredQuantization, quantization, folder.path / "config.json")
        found["config.json"] = stored
    return Settings(
        _agreed(folder.path, found, "bits"),
        _agreed(folder.path, found, "block_size"),
        stored is not None and stored.codebook == "explicit",
        own,
    )


def _agreed(path: Path, found: dict[str, StoredSettings], key: str) -> int | None:
    stated = {name: value for name, part in found.items() if (value := getattr(part, key)) is not None}
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{value} in {name}" for name, value in stated.items())
        raise CheckpointError(f"{path}: {key} is {said}; correct the wrong one, or download it again")
    return next(iter(stated.values()), None)
