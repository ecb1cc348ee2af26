"""A real vLLM worker in this process, with its model loaded and its layers ready to be called one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context


@cache
def rendezvous() -> str:
    """One file for all workers of this process: torch's process group is made once and kept."""
    return f"file://{tempfile.mkdtemp()}/rendezvous"


def engine_config(
    model: Path,
    cache_size: int | str,
    staging_size: int | None = None,
    trace: Path | None = None,
    profile: Path | None = None,
    store_cache: Path | None = None,
    **engine_args: Any,
) -> Any:
    """vLLM's finished configuration, as ``LLM(model, additional_config=...)`` would make it."""
    arguments = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 512, **engine_args}
    options: dict[str, Any] = {"moe_expert_cache_size": cache_size, "moe_expert_staging_size": staging_size}
    files = {"trace": trace, "profile": profile, "store_cache": store_cache}
    options |= {f"moe_expert_{name}": str(path) for name, path in files.items() if path is not None}
    return EngineArgs(model=str(model), additional_config=options, **arguments).create_engine_config()


def start_worker(config: Any) -> Any:
    """The configuration's worker, ours or stock, with its device and process groups ready, no model loaded."""
    from vllm_hlwq.worker import ExpertCacheWorker, StockWorker

    cached = config.additional_config["moe_expert_cache_size"] != 0
    worker = (ExpertCacheWorker if cached else StockWorker)(
        vllm_config=config, local_rank=0, rank=0, distributed_init_method=rendezvous(), is_driver_worker=True
    )
    with set_current_vllm_config(config):
        worker.init_device()
    return worker


class LoadedModel:
    """A model loaded by our worker, or by stock's for cache size 0; ``run`` calls one of its expert layers."""

    def __init__(self, model: Path, cache_size: int | str, **engine_args: Any) -> None:
        self.config = engine_config(model, cache_size, **engine_args)
        self.worker = start_worker(self.config)
        with set_current_vllm_config(self.config):
            self.worker.load_model()
        for runner in self.runners:
            runner.gate = None  # the caller's router logits count, not the gate's

    @property
    def runners(self) -> list[Any]:
        layers = self.config.compilation_config.static_forward_context.values()
        return [layer for layer in layers if hasattr(layer, "routed_experts")]

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output [T, hidden] of a layer for hidden states [T, hidden], router logits [T, E] and a padding mask [T]."""
        with self.forward_pass(len(hidden_states), is_padding):
            return self.runners[layer].forward(hidden_states.clone(), router_logits)

    @contextmanager
    def forward_pass(self, tokens: int, is_padding: torch.Tensor | None = None) -> Iterator[None]:
        """One forward pass of vLLM's, inside of which ``runners`` may be called one after the other."""
        with (
            torch.inference_mode(),
            set_current_vllm_config(self.config),
            set_forward_context(None, self.config, num_tokens=tokens, is_padding=is_padding),
        ):
            yield
