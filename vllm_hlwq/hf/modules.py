"""Linear layers, embeddings and stacks of experts whose weights stay coded.

A module keeps its class, of which it becomes an instance of a subclass: models ask their modules for much more than
``forward``. Codes and norms are parameters of integers in place of the weight: ``weight__packed``, ``weight__norms``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from ..errors import CheckpointError
from .coded_weight import CodeFormat, coded_linear, decode

PACKED, NORMS = "__packed", "__norms"
MAKING = {f"aten::{name}" for name in ("empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones")}
"""What asks a weight for its shape, dtype and device alone."""
FILLING = {"aten::normal_", "aten::uniform_", "aten::zero_", "aten::fill_"}
"""How models start a weight; on one that is kept as codes nothing happens."""


class AbsentWeight(torch.Tensor):
    """Shape, dtype and device of a weight that is kept as codes; views have no data either, all else is refused."""

    _is_hf_initialized = True  # transformers then does not start it

    @staticmethod
    def __new__(
        cls: type[AbsentWeight], shape: Iterable[int], dtype: torch.dtype, device: torch.device
    ) -> AbsentWeight:
        made: AbsentWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        own, name, returns = arguments[0] if arguments else None, function._schema.name, function._schema.returns
        if isinstance(own, cls) and name in FILLING:
            return own
        if isinstance(own, cls) and name in MAKING:
            asked = dict(options or {})
            asked["device"] = asked.get("device") or own.device
            return function(torch.empty(own.shape, dtype=own.dtype, device="meta"), *arguments[1:], **asked)
        if isinstance(own, cls) and returns and returns[0].alias_info and not returns[0].alias_info.is_write:
            device = own.device
            views = function(torch.empty(own.shape, dtype=own.dtype, device="meta"), *arguments[1:], **(options or {}))
            return tree_map_only(torch.Tensor, lambda view: cls(view.shape, view.dtype, device), views)
        raise CheckpointError(
            f"{name.removeprefix('aten::')}: the model computes with a weight that is kept as codes; leave it in 16 "
            "bit with HLWQConfig(modules_to_not_convert=[...]), or load with mode='decode'"
        )


class CodedModule(nn.Module):
    """What has coded weights.

    layouts: what the codes stand for, by the weight's name.
    weight_dtype: of the weight that they replace.
    """

    layouts: dict[str, CodeFormat]
    weight_dtype: torch.dtype

    def codes(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed codes uint8 ``[..., rows, row_bytes]`` and norms int16 ``[..., rows, blocks]`` of a weight."""
        return getattr(self, name + PACKED), getattr(self, name + NORMS)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What changes a model's dtype changes the weights' too, of which codes, integers, know nothing."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def __getattr__(self, name: str) -> Any:
        """The weight without data: models ask a layer's weight for its dtype, shape or device."""
        layout = self.__dict__.get("layouts", {}).get(name)
        if layout is None:
            return super().__getattr__(name)
        packed = self.codes(name)[0]
        return AbsentWeight((*packed.shape[:-1], layout.in_features), self.weight_dtype, packed.device)


class CodedLinear(CodedModule, nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = coded_linear(input, *self.codes("weight"), self.layouts["weight"])
        return product if self.bias is None else product + self.bias


class CodedEmbedding(CodedModule, nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed, norms = self.codes("weight")
        ids = input.reshape(-1)
        chosen = packed.index_select(0, ids), norms.index_select(0, ids)  # raises for negative ids, as torch's does
        return decode(*chosen, self.layouts["weight"], self.weight_dtype).view(*input.shape, self.embedding_dim)


class CodedExperts(CodedModule):
    """Experts in 3-D stacks, of which a step decodes those that a token goes to."""

    num_experts: int
    has_gate: bool
    act_fn: nn.Module

    if TYPE_CHECKING:

        def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...

    def _product(self, name: str, expert: int, states: torch.Tensor) -> torch.Tensor:
        if name not in self.layouts:
            return functional.linear(states, getattr(self, name)[expert])
        packed, norms = self.codes(name)
        return coded_linear(states, packed[expert], norms[expert], self.layouts[name])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Shapes: ``[tokens, hidden]``, ``[tokens, k]`` twice; the result like the first."""
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # stands for experts of another process
                continue
            tokens, places = torch.where(top_k_index == expert)
            states = hidden_states[tokens]
            if self.has_gate:
                inner = self._apply_gate(self._product("gate_up_proj", expert, states))
            else:
                inner = self.act_fn(self._product("up_proj", expert, states))
            weighted = self._product("down_proj", expert, inner) * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out


STACKS = ("gate_up_proj", "up_proj", "down_proj")


def keep_vocabulary(model: Any) -> None:
    """Have a model whose tokens' embeddings or output layer are coded refuse to get another number of tokens.

    In place of the model's own method, before which nothing has changed. It knows nothing of the model, so that copies
    of it may share it.
    """
    try:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # what has no tokens
        return
    if any(isinstance(layer, CodedModule) for layer in layers):
        model._get_resized_embeddings = keep_rows


def keep_rows(
    old_embeddings: nn.Embedding,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Embedding:
    """The embeddings as they are.

    Raises:
        CheckpointError: other than their own number of rows is wanted.
    """
    rows = len(old_embeddings.weight)
    wanted = rows if new_num_tokens is None else new_num_tokens
    wanted += -wanted % (pad_to_multiple_of or 1)
    if wanted != rows:
        raise CheckpointError(
            f"resize_token_embeddings: {rows} tokens cannot become {wanted} where weights are kept as codes; load with "
            "HLWQConfig(mode='decode'), or a 16-bit model with modules_to_not_convert=['embed_tokens', 'lm_head']"
        )
    return old_embeddings


@cache
def _coded_class(kind: Any) -> type[nn.Module]:
    name = f"Coded{kind.__name__}"
    if issubclass(kind, nn.Embedding):
        # Below the model's own class, whose forward scales what nn.Embedding's gives.
        return CodedEmbedding if kind is nn.Embedding else type(name, (kind, CodedEmbedding), {})
    first: type[nn.Module] = CodedLinear if issubclass(kind, nn.Linear) else CodedExperts
    return first if kind is nn.Linear else type(name, (first, kind), {})


def can_be_coded(module: nn.Module, name: str) -> bool:
    """Does the module compute from codes of this weight of its own?

    Args:
        module: of the model, coded already or not.
        name: of one of its parameters.
    """
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        return name == "weight" and forward in (nn.Linear.forward, CodedLinear.forward)
    if isinstance(module, nn.Embedding):
        plain = forward in (nn.Embedding.forward, CodedEmbedding.forward)
        scales_rows = {"super", "forward"} <= set(getattr(forward, "__code__", can_be_coded.__code__).co_names)
        return name == "weight" and module.max_norm is None and (plain or scales_rows)
    if name not in STACKS or not hasattr(type(module), "_apply_gate"):
        return False
    return not (getattr(module, "is_transposed", True) or getattr(module, "has_bias", True))


def make_coded(
    module: Any, name: str, layout: CodeFormat, packed: torch.Tensor | None = None, norms: torch.Tensor | None = None
) -> None:
    """Put codes in the place of one weight of a module.

    Args:
        module: one of which ``can_be_coded``.
        name: of the weight.
        layout: of the codes.
        packed: uint8 ``[..., rows, row_bytes]``; without, memory-less ones, to be loaded.
        norms: int16 ``[..., rows, blocks]``, likewise.
    """
    weight = module._parameters.pop(name)
    if not isinstance(module, CodedModule):
        module.__class__ = _coded_class(type(module))  # type: ignore[arg-type]
        module.layouts = {}
    module.layouts[name] = layout
    module.weight_dtype = weight.dtype
    if packed is None or norms is None:
        rows = weight.shape[:-1]
        packed = torch.empty(*rows, layout.row_bytes, dtype=torch.uint8, device="meta")
        norms = torch.empty(*rows, layout.blocks, dtype=torch.int16, device="meta")
    module.register_parameter(name + PACKED, nn.Parameter(packed, requires_grad=False))
    module.register_parameter(name + NORMS, nn.Parameter(norms, requires_grad=False))
