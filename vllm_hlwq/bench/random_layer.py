"""One layer of random INT4 experts without an engine: what vLLM's loader would hand to the layer's cache.

A whole engine would bring gigabytes of embeddings and a minute of start-up for the sake of one layer. The tests compare
configuration and record with those of a model that vLLM has loaded.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ..expert_formats import compressed_tensors_int4
from ..host_store import HostStore
from ..int4_checkpoint import int4_arguments
from ..marlin_moe import MarlinBackend
from ..vllm_compat import borrow
from .moe_shapes import MoeShape

ACTIVATION_SETTINGS = (
    "swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta",
)  # fmt: skip
"""What vLLM reads for the activation between the products; none of the shapes' activations has any."""
SMALLEST_SCALE = 2.0**-9
"""Scales are this times 1 to 2, as in ``make_checkpoint.py``: weights have a root mean square of 0.014."""


def moe_config(shape: MoeShape) -> SimpleNamespace:
    """All that ``MarlinBackend`` reads of vLLM's configuration of a layer, for one GPU."""
    activation = borrow("MoEActivation").from_str(shape.activation)
    return SimpleNamespace(
        num_experts=shape.experts,
        num_local_experts=shape.experts,
        hidden_dim=shape.hidden,
        intermediate_size_per_partition=shape.width,
        in_dtype=torch.bfloat16,
        activation=activation,
        is_act_and_mul=activation.is_gated,
        w13_num_shards=2 if activation.is_gated else 1,
        **dict.fromkeys(ACTIVATION_SETTINGS),
    )


def marlin_backend(shape: MoeShape) -> MarlinBackend:
    """The backend of a layer of this shape, with symmetric codes."""
    weight_quant = int4_arguments(shape.group_size, symmetric=True)
    return MarlinBackend(compressed_tensors_int4(weight_quant), moe_config(shape))


def random_experts(shape: MoeShape, seed: int = 0) -> HostStore:
    """A layer's experts as they lie in host memory when a checkpoint has been read; the seed decides every byte."""
    store = HostStore(shape.experts, shape.checkpoint_layout())
    generator = torch.Generator().manual_seed(seed)
    for name in store.layout:
        field = store.field(name)
        if field.dtype == torch.int32:
            field.copy_(torch.randint(-(2**31), 2**31, field.shape, dtype=torch.int32, generator=generator))
        else:
            field.copy_(torch.rand(field.shape, generator=generator).add_(1).mul_(SMALLEST_SCALE))
    return store


def use_engine_workspace(device: torch.device) -> None:
    """Let Marlin keep its locks between calls as in an engine; else each call would allocate and clear them."""
    borrow("init_workspace_manager")(device)
