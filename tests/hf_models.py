"""What the tests of HLWQ in transformers share: models in 16 bit, coded, and as ``hlwq dequantize`` makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_hlwq import HLWQConfig
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.quantize import quantize

CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma4": lambda: checkpoints.gemma4_config(num_experts=8, top_k_experts=2),
    "qwen3_moe": checkpoints.qwen3_moe_config,
    "llama": checkpoints.llama_config,
    "gemma4_multimodal": checkpoints.gemma4_multimodal_config,
}
IDS = torch.tensor([[2, 17, 99, 301, 44, 45, 46, 260], [2, 3, 5, 7, 11, 13, 17, 19]])


@dataclass(frozen=True)
class Folders:
    """One model three times: as it was, coded, and decoded."""

    original: Path
    coded: Path
    decoded: Path


def make(name: str, root: Path) -> Folders:
    folders = Folders(root / "original", root / "coded", root / "decoded")
    checkpoints.write(CONFIGS[name](), folders.original, varied=True)
    quantize(folders.original, folders.coded, fit="gain")
    dequantize(open_source(folders.coded), folders.decoded)
    return folders


def load(folder: Path, mode: str | None = None, **options: Any) -> PreTrainedModel:
    if mode is not None:
        options["quantization_config"] = HLWQConfig(mode=mode)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **inputs).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
