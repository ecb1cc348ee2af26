"""Shared fixtures: random checkpoints, made once a session."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch and vLLM are imported: engines in this process stay in it, and warm-up on two cores stays short.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import checkpoints
import hf_models
import hlwq_files
from int4_format import MODELS
from quantizing import SHARD_BYTES

from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.int4_source import Int4Source
from vllm_hlwq.checkpoint.quantize import quantize

# Run by test_triton_interpreter.py, in a process with Triton's interpreter.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(scope="session")
def tiny_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT4 sibling of the trained model that ships."""
    out = tmp_path_factory.mktemp("trained") / "tiny-moe-CT"
    export_int4(open_source(Path(__file__).parent.parent / "examples/tiny_moe/model"), out)
    return out


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model that ships, in 16 bit."""
    out = tmp_path_factory.mktemp("trained") / "tiny-moe-bf16"
    dequantize(open_source(Path(__file__).parent.parent / "examples/tiny_moe/model"), out)
    return out


@pytest.fixture(scope="session")
def tiny_int4_decoded(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT4 sibling's values in 16 bit: what stock vLLM can serve on processors without AMX."""
    out = tmp_path_factory.mktemp("trained") / "tiny-moe-CT-bf16"
    dequantize(Int4Source(tiny_int4), out)
    return out


@pytest.fixture(scope="session")
def tiny_int4_float32(tiny_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT4 sibling's values unrounded: served in float32, stock vLLM computes just what the sibling stands for."""
    return checkpoints.decode_to_float32(tiny_int4, tmp_path_factory.mktemp("trained") / "tiny-moe-CT-float32")


@pytest.fixture(scope="session")
def gemma4_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.gemma4_config(), tmp_path_factory.mktemp("gemma4"))


@pytest.fixture(scope="session")
def qwen3_moe_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.qwen3_moe_config(), tmp_path_factory.mktemp("qwen3-moe"))


@pytest.fixture(scope="session")
def qwen3_moe_wide_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.qwen3_moe_wide_config(), tmp_path_factory.mktemp("qwen3-moe-wide"))


@pytest.fixture(scope="session")
def gpt_oss_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases that are not zero."""
    return checkpoints.write(checkpoints.gpt_oss_served_config(), tmp_path_factory.mktemp("gpt-oss"), varied=True)


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts another function in the place of the one that chooses a layer's backend, and a size to a GPU that is not."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**34, 2**34))
    return lambda make: monkeypatch.setattr("vllm_hlwq.moe_offload.choose_backend", make)


@pytest.fixture(scope="session")
def dense_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(checkpoints.dense_config(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def hlwq_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of ``hlwq_files`` in BF16."""
    return hlwq_files.write_base(tmp_path_factory.mktemp("hlwq") / "base", hlwq_files.weights())


@pytest.fixture(scope="session")
def hlwq_coded(hlwq_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as our writer codes it, in several shards."""
    out = tmp_path_factory.mktemp("hlwq") / "coded"
    quantize(hlwq_base, out, shard_bytes=12_000)
    return out


@pytest.fixture(scope="session")
def layout_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """16-bit models in all layouts; Qwen3-MoE as it is on disk and as transformers holds it in memory."""
    root = tmp_path_factory.mktemp("models")
    for model, (config, _) in MODELS.items():
        stacked = {"save_original_format": False} if model == "qwen3_moe_stacked" else {}
        checkpoints.write(config(), root / model, varied=True, **stacked)
    return {model: root / model for model in MODELS}


@pytest.fixture(scope="session")
def layout_exports(layout_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for model, source in layout_models.items():
        plan = export_int4(source, root / model)
        assert plan.group_size == MODELS[model][1]
    return {model: root / model for model in layout_models}


@pytest.fixture(scope="session")
def varied_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose expert stacks, dense matrices and norms all are there, with files to copy beside them."""
    out = tmp_path_factory.mktemp("source")
    checkpoints.write(checkpoints.gemma4_config(num_experts=4, top_k_experts=2), out, varied=True)
    (out / "tokenizer.json").write_text("{}")
    (out / "README.md").write_text("the original's card")
    return out


@pytest.fixture(scope="session")
def varied_coded(varied_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, coded without an interruption."""
    out = tmp_path_factory.mktemp("coded") / "out"
    quantize(varied_source, out, shard_bytes=SHARD_BYTES)
    return out


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hf_models.Folders]:
    """Models that transformers loads coded, decoded, and as they were."""
    return {name: hf_models.make(name, tmp_path_factory.mktemp(name)) for name in hf_models.CONFIGS}


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines that the expert cache writes to the log; vLLM's loggers do not reach pytest's."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    # Else the first engine of the process would, and take the handler away.
    configure_logging_if_needed(LoggingConfig())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.expert_cache")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
