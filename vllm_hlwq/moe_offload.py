"""The layer that holds its experts on the host, and the scheduler that runs a step through its slots.

``LayerExpertCache.step`` is the way of a step: ids -> plan -> gather -> compute, wave by wave -> sum over top-k.
``OffloadedRoutedExperts`` is vLLM's layer with the weights put into the host store; ``CachedExperts`` is the seam by
which vLLM's kernel frame hands over the final expert ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ExpertCacheError
from .expert_cache import SlotTable
from .host_store import HostStore, RecordLayout
from .options import ExpertCacheOptions, config_key
from .quant_config import make_quant_method
from .reference_backend import ReferenceBackend
from .vllm_compat import borrow
from .weight_bank import WeightBank

LOADER_ONLY = frozenset({"w13_weight_shape", "w2_weight_shape"})
"""Tensors of compressed-tensors checkpoints that the loader fills and no kernel reads."""


@dataclass(frozen=True)
class Wave:
    """Experts that are computed together: int64 [R] local ids, their bank, and the bank row of each."""

    bank: WeightBank
    experts: torch.Tensor
    bank_rows: torch.Tensor


class LayerExpertCache:
    """One layer's experts at run time: host store, slots, staging bank and backend."""

    def __init__(
        self,
        store: HostStore,
        num_slots: int,
        staging_bank: WeightBank | None,
        backend: ReferenceBackend,
        device: torch.device,
    ) -> None:
        """Take the banks.

        Args:
            store: the layer's experts, all loaded.
            num_slots: slots of the layer; with as many as experts all are resident and nothing is planned.
            staging_bank: where experts without a slot are computed; None when all are resident.
            backend: computes experts from a bank.
            device: where the banks lie.
        """
        self.num_experts = store.num_experts
        self.num_slots = num_slots
        self.record_bytes = store.layout.record_bytes
        self.layout_key = store.layout.key()
        self.backend = backend
        self.staging_bank = staging_bank
        self.table: SlotTable | None = None
        self.store: HostStore | None = None
        if staging_bank is None:
            self.slot_bank = WeightBank.resident(store, device)
        else:
            self.store = store
            self.slot_bank = WeightBank.allocate(num_slots, store.layout, device)
            self.table = SlotTable(self.num_experts, num_slots, staging_bank.rows)

    def step(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor | None,
        expert_ids: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Run all experts that a step names; none is ever left out.

        Args:
            hidden_states: [T, hidden] in the model's dtype.
            topk_weights: [T, k]; None when they were applied to the input.
            expert_ids: [T, k] integer, local ids; those outside 0..E-1 belong to no expert of this rank.
            output: [T, hidden], overwritten.
        """
        ids = expert_ids.cpu()
        out_rows = torch.zeros(ids.numel(), output.shape[1], dtype=torch.float32, device=output.device)
        for wave in self._waves(ids):
            self.backend.compute(wave.bank, wave.experts, wave.bank_rows, hidden_states, ids, out_rows)
        self.backend.combine(out_rows, topk_weights, output)

    def _waves(self, ids: torch.Tensor) -> Iterator[Wave]:
        """Plan the step, then load and yield what is computed together; a wave is valid until the next is asked for."""
        if self.table is None or self.store is None or self.staging_bank is None:
            experts = torch.unique(ids).long()
            experts = experts[(experts >= 0) & (experts < self.num_experts)]
            yield Wave(self.slot_bank, experts, experts)
            return
        plan = self.table.plan_step(ids)
        self.slot_bank.load(self.store, plan.load_experts, plan.load_slots)
        if len(plan.resident):
            yield Wave(self.slot_bank, plan.resident, plan.slot_of_expert[plan.resident])
        for start in range(0, len(plan.staged), self.staging_bank.rows):
            experts = plan.staged[start : start + self.staging_bank.rows]
            rows = torch.arange(len(experts))
            self.staging_bank.load(self.store, experts, rows)
            yield Wave(self.staging_bank, experts, rows)

    def reset(self) -> None:
        """Forget residency and counts: what warm-up loaded must leave no trace."""
        if self.table is not None:
            self.table.reset()

    def counts(self) -> dict[str, int]:
        """Counters by name, with ``h2d_bytes`` copied to the device; all zero when every expert is resident."""
        counts = self.table.counts() if self.table is not None else dict.fromkeys(SlotTable(1, 1, 0).counts(), 0)
        counts["h2d_bytes"] = (counts["admitted"] + counts["staged"]) * self.record_bytes
        return counts

    def weight_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First field of each projection, for vLLM's kernel frame, which reads nothing of them but their being."""
        fields = self.slot_bank.fields
        return tuple(next(t for n, t in fields.items() if n.startswith(p)) for p in ("w13_", "w2_"))  # type: ignore[return-value]


@torch.library.custom_op("vllm_hlwq::expert_cache_step", mutates_args=("output",))
def expert_cache_step(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights_on_input: bool,
    layer_name: str,
) -> None:
    """Run a step of the named layer of the engine whose forward context is active.

    An operator of its own because the step reads ids on the host and changes the cache: torch.compile, which traces
    the layer on CPU, must not look inside.
    """
    layer = borrow("get_forward_context")().no_compile_layers[layer_name].routed_experts
    expert_map = layer.expert_map
    local_ids = topk_ids
    if expert_map is not None:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        local_ids = torch.where(known, expert_map[topk_ids.clamp(0, len(expert_map) - 1).long()], -1)
    layer.expert_cache.step(hidden_states, None if weights_on_input else topk_weights, local_ids, output)


@expert_cache_step.register_fake
def _(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    weights_on_input: bool,
    layer_name: str,
) -> None:
    return None


class CachedExperts(borrow("FusedMoEExpertsModular")):  # type: ignore[misc]
    """vLLM's experts interface over a layer's cache; data-parallel ranks have exchanged their tokens before it."""

    def __init__(self, moe_config: Any, quant_config: Any, layer_name: str) -> None:
        super().__init__(moe_config, quant_config)
        self.layer_name = layer_name
        # Made here because torch.compile traces what runs in a step and cannot trace an import.
        self._reduce = borrow("TopKWeightAndReduceNoOP")()

    @staticmethod
    def activation_format() -> Any:
        return borrow("FusedMoEActivationFormat").Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Sizes from the configuration: the weights here are the slots', not the experts'."""
        width = self.moe_config.intermediate_size_per_partition
        return self.moe_config.num_experts, a1.shape[0], 2 * width, a1.shape[-1], topk_ids.shape[1]

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        """No shared workspace, an output of [M, K]; the reference backend makes its own temporary memory."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return self._reduce

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        **_: Any,
    ) -> None:
        torch.ops.vllm_hlwq.expert_cache_step(
            output, hidden_states, topk_weights, topk_ids, apply_router_weight_on_input, self.layer_name
        )

    # What vLLM's kernel oracle would ask; it is never asked for these experts.
    _supports_current_device = staticmethod(lambda: True)
    _supports_no_act_and_mul = staticmethod(lambda: True)
    _supports_quant_scheme = staticmethod(lambda *_: True)
    _supports_activation = staticmethod(lambda *_: True)
    _supports_parallel_config = staticmethod(lambda *_: True)


class OffloadedRoutedExperts(borrow("RoutedExperts")):  # type: ignore[misc]
    """vLLM's container of expert weights, with the weights in the host store.

    Put in the place of ``RoutedExperts`` by vLLM's registry of out-of-tree layers; an engine in the same process that
    did not ask for the cache gets stock behaviour.
    """

    expert_cache: LayerExpertCache | None = None
    store: HostStore | None = None

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        vllm_config = borrow("get_current_vllm_config")()
        self.options = ExpertCacheOptions.from_additional_config(vllm_config.additional_config)
        if self.options.cache_size == 0:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self._engine_layers = vllm_config.compilation_config.static_forward_context
        self._expects_all_weights = vllm_config.load_config.load_format != "dummy"
        self._check_shape(prefix, moe_config)
        method = make_quant_method(self, quant_config, prefix)
        self._backend = ReferenceBackend(moe_config.activation.value, getattr(method, "weight_quant", None))
        return method

    def _check_shape(self, prefix: str, moe_config: Any) -> None:
        if self.options.cache_size > moe_config.num_local_experts:
            raise ExpertCacheError(
                f"{config_key('cache_size')}={self.options.cache_size}: {prefix} has only "
                f"{moe_config.num_local_experts} experts on this rank; give a number from 1 to that"
            )
        gate_limits = (moe_config.swiglu_limit, moe_config.swiglu_alpha, moe_config.swiglu_beta)
        if any(value is not None for value in gate_limits) and moe_config.activation.value != "swigluoai":
            raise ExpertCacheError(
                f"{prefix}: activation {moe_config.activation.value!r} with swiglu limit, alpha or beta {gate_limits} "
                "is not known to the reference backend; serve this model without the expert cache"
            )

    def adopt_parameters(self, num_experts: int) -> None:
        """Replace the declared (memory-less) parameters by views into a new host store.

        Raises:
            ExpertCacheError: a parameter has no expert dimension, so a slot could not hold an expert's part of it.
        """
        declared = dict(self.named_parameters(recurse=False))
        for name, parameter in declared.items():
            if parameter.ndim == 0 or parameter.shape[0] != num_experts:
                raise ExpertCacheError(
                    f"{self.layer_name}: weight {name} of shape {tuple(parameter.shape)} has no leading dimension of "
                    f"{num_experts} experts, so the expert cache cannot hold it"
                )
        carried = {name: p for name, p in declared.items() if name not in LOADER_ONLY}
        layout = RecordLayout({n: (tuple(p.shape[1:]), p.dtype) for n, p in carried.items()})
        self.store = HostStore(num_experts, layout, torch.device(self.moe_config.device))
        self._loaded: set[tuple[str, str, int]] = set()
        for name, parameter in declared.items():
            data = self.store.field(name) if name in carried else torch.empty(parameter.shape, device="cpu")
            placed = torch.nn.Parameter(data, requires_grad=False)
            placed.__dict__.update(parameter.__dict__)
            placed.expert_field = name  # type: ignore[attr-defined]
            setattr(self, name, placed)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load as vLLM does, but refuse what does not fill its place, and note what came.

        vLLM itself narrows the place to a smaller tensor, for the sake of padded kernels that are not used here.
        """
        field = getattr(param, "expert_field", None)
        if field is not None and field not in LOADER_ONLY:
            self._check_fits(field, shard_id, expert_id, tuple(loaded_weight.shape[-2:]))
        success = super().weight_loader(param, loaded_weight, weight_name, shard_id, expert_id, True)
        if success and field is not None:
            whole_layer = loaded_weight.ndim == 3
            local = self._map_global_expert_id_to_local_expert_id(expert_id)
            experts = range(param.shape[0]) if whole_layer else (local,)
            self._loaded.update((field, shard_id, expert) for expert in experts)
        return success if return_success else None

    def _check_fits(self, field: str, shard_id: str, expert_id: int, shape: tuple[int, ...]) -> None:
        assert self.store is not None
        needed = self.store.layout[field].shape
        if shard_id in ("w1", "w3") and self.moe_config.is_act_and_mul:
            needed = (needed[0] // 2, *needed[1:])
        ranks = self.moe_config.moe_parallel_config.tp_size
        # Checkpoints hold whole matrices: a dimension that tensor parallelism cuts is as many times larger there.
        if len(shape) != len(needed) or any(
            have not in (size, size * ranks) for have, size in zip(shape, needed, strict=True)
        ):
            raise ExpertCacheError(
                f"{self.layer_name}: checkpoint tensor {shard_id} for {field} of expert {expert_id} has shape {shape}, "
                f"the model needs {needed}" + (f" on each of {ranks} ranks" if ranks > 1 else "") + "; export it again"
            )

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def load_weights(self, weights: Any) -> Any:
        """Load checkpoint tensors; refused once the experts are in the cache."""
        if self.expert_cache is not None:
            raise ExpertCacheError(
                f"{self.layer_name}: weights cannot be reloaded into a running expert cache; restart the server"
            )
        return super().load_weights(weights)

    def finish_loading(self, quant_config: Any) -> Any:
        """Check that all experts came, make the banks, drop the loading parameters, and return the kernel.

        Returns:
            vLLM's kernel frame around ``CachedExperts``.
        """
        assert self.store is not None
        if self._expects_all_weights:
            self._check_complete(self.store)
        device = torch.device(self.moe_config.device)
        for name in [name for name, _ in self.named_parameters(recurse=False)]:
            delattr(self, name)
        num_slots = self.options.cache_size
        staging = None if num_slots == self.store.num_experts else self._staging_bank(self.store, num_slots, device)
        if device.type == "cuda" and staging is not None:
            self.store.page_lock()
        self.expert_cache = LayerExpertCache(self.store, num_slots, staging, self._backend, device)
        self.store = None
        prepare = borrow("maybe_make_prepare_finalize")(
            moe=self.moe_config, quant_config=quant_config, allow_new_interface=True, use_monolithic=False
        )
        return borrow("FusedMoEKernel")(prepare, CachedExperts(self.moe_config, quant_config, self.layer_name))

    def _staging_bank(self, store: HostStore, num_slots: int, device: torch.device) -> WeightBank:
        """The staging bank of this engine's layers of the same shape, made by the first of them."""
        for layer in cached_layers(self._engine_layers):
            cache = layer.expert_cache
            if cache is not None and cache.staging_bank is not None and cache.layout_key == store.layout.key():
                return cache.staging_bank
        return WeightBank.allocate(staging_rows(store.num_experts, num_slots, self.top_k), store.layout, device)

    def _check_complete(self, store: HostStore) -> None:
        gated = ("w1", "w3") if self.moe_config.is_act_and_mul else ("w1",)
        expected = {
            (field, shard, expert)
            for field in store.layout
            for shard in (gated if field.startswith("w13_") else ("w2",))
            for expert in range(store.num_experts)
        }
        missing = sorted(expected - self._loaded)
        if missing:
            field, shard, expert = missing[0]
            raise ExpertCacheError(
                f"{self.layer_name}: the checkpoint lacks {len(missing)} expert tensors, first {field} ({shard}) "
                f"of expert {expert}; download or export it again"
            )


def staging_rows(num_experts: int, num_slots: int, top_k: int) -> int:
    """Experts that the shared staging bank holds by default.

    Twice a token's experts: the reference backend computes expert by expert, so that larger waves would cost memory
    and save nothing.
    """
    return min(num_experts - num_slots, 2 * top_k)


def cached_layers(engine_layers: dict[str, Any]) -> list[OffloadedRoutedExperts]:
    """The layers of an engine that keep their experts in a cache, in model order.

    Args:
        engine_layers: the engine's layers by name (``compilation_config.static_forward_context``).

    Raises:
        ExpertCacheError: a mixture-of-experts layer is of a class that the expert cache did not replace.
    """
    found = []
    for name, runner in engine_layers.items():
        if not isinstance(runner, borrow("MoERunnerInterface")):
            continue
        layer = runner.routed_experts
        if not isinstance(layer, OffloadedRoutedExperts):
            raise ExpertCacheError(
                f"{name}: expert weights are held by {type(layer).__name__}, which the expert cache does not replace; "
                "serve this model without it"
            )
        if layer.options.cache_size:
            found.append(layer)
    return found
