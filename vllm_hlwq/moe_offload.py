"""vLLM's container of expert weights, with the weights on the host: loading, and the choice of a cache and backend.

A layer's cache then runs the steps: ``HostExpertCache`` with the reference backend, ``DeviceExpertCache`` with Marlin.
"""

from __future__ import annotations

from typing import Any

import torch

from .cached_experts import DeviceCachedExperts, HostCachedExperts
from .device_expert_cache import DeviceExpertCache
from .device_loading import load_cache
from .errors import ExpertCacheError
from .host_expert_cache import HostExpertCache
from .host_store import HostStore, RecordLayout
from .marlin_moe import MarlinBackend, device_obstacle
from .options import ExpertCacheOptions, config_key
from .quant_config import make_quant_method
from .reference_backend import ReferenceBackend
from .sizing import BankSizes
from .vllm_compat import borrow
from .weight_bank import WeightBank

LOADER_ONLY = frozenset({"w13_weight_shape", "w2_weight_shape"})
"""Tensors of compressed-tensors checkpoints that the loader fills and no kernel reads."""


class OffloadedRoutedExperts(borrow("RoutedExperts")):  # type: ignore[misc]
    """vLLM's container of expert weights, with the weights in the host store.

    Put in the place of ``RoutedExperts`` by vLLM's registry of out-of-tree layers; an engine in the same process that
    did not ask for the cache gets stock behaviour.
    """

    expert_cache: HostExpertCache | DeviceExpertCache | None = None
    store: HostStore | None = None

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        vllm_config = borrow("get_current_vllm_config")()
        self.options = ExpertCacheOptions.from_additional_config(vllm_config.additional_config)
        if self.options.cache_size == 0:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self._engine_layers = vllm_config.compilation_config.static_forward_context
        self._expects_all_weights = vllm_config.load_config.load_format != "dummy"
        self._check_shape(prefix, moe_config)
        scheduler = vllm_config.scheduler_config
        self._max_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        method = make_quant_method(self, quant_config, prefix)
        self._backend = self._choose_backend(
            prefix, moe_config, getattr(method, "weight_quant", None), vllm_config.model_config.enforce_eager
        )
        return method

    def _choose_backend(
        self, prefix: str, moe_config: Any, weight_quant: Any, enforce_eager: bool
    ) -> ReferenceBackend | MarlinBackend:
        """Marlin for INT4 experts on CUDA, else the reference.

        Raises:
            ExpertCacheError: the kernels cannot take the experts, or the reference backend would be captured.
        """
        if not borrow("current_platform").is_cuda():
            return ReferenceBackend(moe_config.activation.value, weight_quant)
        if weight_quant is None:
            if not enforce_eager:
                raise ExpertCacheError(
                    f"{prefix}: 16-bit experts run on the reference backend, which reads expert ids on the host, and a "
                    "CUDA graph cannot hold that: add --enforce-eager, or serve an INT4 checkpoint (hlwq export)"
                )
            return ReferenceBackend(moe_config.activation.value, None)
        obstacle = device_obstacle(moe_config, weight_quant)
        if obstacle is not None:
            raise ExpertCacheError(f"{prefix}: vLLM's Marlin kernels cannot compute these experts: {obstacle}")
        return MarlinBackend(weight_quant, moe_config)

    def _check_shape(self, prefix: str, moe_config: Any) -> None:
        if self.options.slots > moe_config.num_local_experts:
            raise ExpertCacheError(
                f"{config_key('cache_size')}={self.options.slots}: {prefix} has only "
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
        store, self.store = self.store, None
        prepare = borrow("maybe_make_prepare_finalize")(
            moe=self.moe_config, quant_config=quant_config, allow_new_interface=True, use_monolithic=False
        )
        experts: HostCachedExperts | DeviceCachedExperts
        if isinstance(self._backend, MarlinBackend):
            layers = cached_layers(self._engine_layers)
            others = [layer.expert_cache for layer in layers if isinstance(layer.expert_cache, DeviceExpertCache)]
            self.expert_cache = load_cache(
                store, self._backend, self.options.slots, len(layers), self.top_k, self._max_tokens,
                self.options.staging_size, others, device,
            )  # fmt: skip
            experts = DeviceCachedExperts(self.moe_config, quant_config, self.expert_cache)
        else:
            staging = self._staging_bank(store, device)
            if device.type == "cuda" and staging is not None:
                store.page_lock()
            self.expert_cache = HostExpertCache(store, self.options.slots, staging, self._backend, device)
            experts = HostCachedExperts(self.moe_config, quant_config, self.layer_name)
        return borrow("FusedMoEKernel")(prepare, experts)

    def _staging_bank(self, store: HostStore, device: torch.device) -> WeightBank | None:
        """The staging bank of this engine's layers of the same shape, made by the first of them."""
        slots = self.options.slots
        if slots == store.num_experts:
            return None
        for layer in cached_layers(self._engine_layers):
            cache = layer.expert_cache
            if isinstance(cache, HostExpertCache) and cache.staging_bank and cache.layout_key == store.layout.key():
                return cache.staging_bank
        record = store.layout.record_bytes
        sizes = BankSizes((record,), store.num_experts, self.top_k, 0, self.options.staging_size, reference=True)
        return WeightBank.allocate(sizes.staging_rows(slots, record), store.layout, device)

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
