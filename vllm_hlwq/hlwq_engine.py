"""What every vLLM process knows of HLWQ checkpoints: their name as a quantisation, and what an engine is not told.

Light, because each process imports it; ``hlwq_serving.py`` has the rest and is imported where such a checkpoint is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .vllm_compat import borrow

QUANT_METHODS = ("polarengine", "polar")
"""As ``quant_method`` of a config.json; the second is the older one."""

_options: ContextVar[dict[str, Any] | None] = ContextVar("options of the engine being configured", default=None)


def register_quant_methods() -> None:
    """Make the names known to vLLM; harmless when done before."""

    class PolarEngineConfig(borrow("QuantizationConfig")):  # type: ignore[misc]
        """Stands for ``HlwqConfig`` until vLLM asks for one."""

        def __new__(cls) -> Any:  # without a quantization_config in config.json
            return cls.from_config({})

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            from .hlwq_serving import HlwqConfig

            return HlwqConfig.from_config(config)

    for name in QUANT_METHODS:
        borrow("register_quantization_config")(name)(PolarEngineConfig)


def loader_options() -> dict[str, Any]:
    """``--model-loader-extra-config`` of the engine that is being configured."""
    return _options.get() or {}


@contextmanager
def configuring(engine_args: Any) -> Iterator[None]:
    """While vLLM makes its configuration: checkpoints that do not say what they are do, and options are at hand."""
    if engine_args.quantization is None and is_unnamed_hlwq(engine_args.model):
        engine_args.quantization = QUANT_METHODS[0]
    extra = engine_args.model_loader_extra_config
    token = _options.set(dict(extra) if isinstance(extra, dict) else {})
    try:
        yield
    finally:
        _options.reset(token)


def is_unnamed_hlwq(model: str) -> bool:
    """Whether a folder holds HLWQ codes though its config.json names no quantisation, as the oldest files do."""
    from .checkpoint.reader import is_hlwq
    from .checkpoint.tensor_folder import TensorFolder

    path = Path(model)
    if not path.is_dir():
        return False
    try:
        return "quantization_config" not in TensorFolder(path).config() and is_hlwq(path)
    except CheckpointError:
        return False  # whatever else the folder holds is for vLLM to judge


def choose_loader(vllm_config: Any) -> None:
    """Let our loader read an HLWQ checkpoint.

    Raises:
        CheckpointError: another one was asked for.
    """
    if vllm_config.model_config.quantization not in QUANT_METHODS:
        return
    from .hlwq_serving import LOAD_FORMAT

    load_config = vllm_config.load_config
    if load_config.load_format not in ("auto", "hf", "safetensors", "dummy", LOAD_FORMAT):
        raise CheckpointError(
            f"--load-format {load_config.load_format} cannot read HLWQ checkpoints: leave it at auto, or serve the "
            "INT4 sibling (hlwq export)"
        )
    if load_config.load_format != "dummy":
        load_config.load_format = LOAD_FORMAT
