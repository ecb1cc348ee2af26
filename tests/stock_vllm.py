"""Loads checkpoints with stock vLLM, this plugin switched off, and compares every parameter with the files.

    VLLM_PLUGINS= python tests/stock_vllm.py FOLDER...

A process of its own, because another test's engine may have put our layer into vLLM's registry. vLLM builds the model,
loads it and checks that every parameter came from the checkpoint (``enable_weights_track``); kernels do not prepare
the weights. Prints one JSON object a folder: an error, or the names of tensors that reached no parameter.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

# vLLM chooses a kernel when it builds the layer, and on CPUs it has one for SiLU experts on processors with AMX only.
# The checkpoint's tensors are declared and loaded alike for every kernel, so its emulation, which takes every INT4
# layer on CUDA devices, is told that this device will do; it computes nothing here.
Int4EmulationTritonExperts._supports_current_device = staticmethod(lambda: True)


class Recorder(DefaultModelLoader):
    """vLLM's loader, remembering what it handed to the model."""

    def get_all_weights(self, *arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        self.handed: dict[str, torch.Tensor] = {}
        for name, tensor in super().get_all_weights(*arguments):
            self.handed[name] = tensor.clone()
            yield name, tensor

    def track_weights_loading(self, model: Any, loaded: set[str], quantized: bool = False) -> None:
        # vLLM's loader of gpt-oss takes them from no checkpoint.
        shapes = {name for name, _ in model.named_parameters() if name.endswith("_weight_shape")}
        super().track_weights_loading(model, loaded | shapes, quantized)


def load(folder: Path) -> list[str]:
    """Names of checkpoint tensors whose values are in no parameter of the loaded model."""
    config = EngineArgs(
        model=str(folder), enforce_eager=True, dtype="bfloat16", max_model_len=512, moe_backend="emulation",
        skip_tokenizer_init=True, model_loader_extra_config={"enable_weights_track": True},
    ).create_engine_config()  # fmt: skip
    loader = Recorder(config.load_config)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
        init_distributed_environment(1, 0, RENDEZVOUS, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        loader.load_weights(model, config.model_config)
    held: dict[torch.dtype, list[bytes]] = defaultdict(list)
    for tensor in (*model.parameters(), *model.buffers()):
        held[tensor.dtype].append(bytes_of(tensor))
    return [
        name
        for name, tensor in loader.handed.items()
        # Of a fused layer vLLM keeps one weight_shape; no kernel reads it.
        if not name.endswith("weight_shape")
        # Some are held in another dtype, like routers in float32.
        and not any(bytes_of(tensor.to(dtype)) in data for dtype, all_data in held.items() for data in all_data)
    ]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's values. vLLM stacks q, k, v, or gate and up, along the rows, so each stays one run of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main() -> None:
    for folder in sys.argv[1:]:
        try:
            found = {"unplaced": load(Path(folder))}
        except Exception as error:  # noqa: BLE001 - reported to the test, which fails on it
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RENDEZVOUS = f"file://{scratch}/rendezvous"
        main()
