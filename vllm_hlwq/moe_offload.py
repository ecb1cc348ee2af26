"""vLLM's container of expert weights, with the weights on the host: loading, and the choice of a cache and backend.

A layer's cache then runs the steps: ``DeviceExpertCache`` with a backend on CUDA, ``HostExpertCache`` elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .backends import choose_backend
from .bank_sizes import BankSizes
from .cached_experts import DeviceCachedExperts, HostCachedExperts
from .device_backend import DeviceBackend
from .device_expert_cache import DeviceExpertCache
from .device_loading import load_cache
from .errors import ExpertCacheError
from .expert_formats import ExpertFormat
from .expert_loading import current_loading
from .host_expert_cache import HostExpertCache
from .host_store import HostStore, RecordLayout
from .loaded_experts import WHOLE, LoadedExperts, Shapes
from .options import ExpertCacheOptions, config_key
from .quant_config import make_quant_method
from .record_files import described
from .vllm_compat import borrow
from .weight_bank import WeightBank


class OffloadedLayer:
    """Mixed into vLLM's containers of expert weights: the weights are in the host store.

    The classes made so are put in the place of vLLM's by its registry of out-of-tree layers; an engine in the same
    process that did not ask for the cache gets stock behaviour.
    """

    stacked = False
    """Whether checkpoint and loader know only gate and up together, and mostly all experts at once."""
    expert_cache: HostExpertCache | DeviceExpertCache | None = None
    store: HostStore | None = None
    restored = False
    """Whether the experts came from files of an earlier start, so that nothing is taken from the checkpoint."""
    layer_name: str
    moe_config: Any
    top_k: int
    named_parameters: Any
    _map_global_expert_id_to_local_expert_id: Any

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        vllm_config = borrow("get_current_vllm_config")()
        self.options = ExpertCacheOptions.from_additional_config(vllm_config.additional_config)
        if self.options.cache_size == 0:
            return super()._get_quant_method(prefix, quant_config, moe_config)  # type: ignore[misc]
        self._loading = current_loading()
        self._engine_layers = vllm_config.compilation_config.static_forward_context
        self._expects_all_weights = vllm_config.load_config.load_format != "dummy"
        self._check_shape(prefix, moe_config)
        self._check_offloading(prefix, vllm_config.offload_config)
        scheduler = vllm_config.scheduler_config
        self._max_tokens = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        return make_quant_method(self, quant_config, prefix)

    def choose_backend(self, expert_format: ExpertFormat) -> None:
        """Choose what computes the experts; called when vLLM has settled the layer's sizes.

        Raises:
            ExpertCacheError: nothing on this machine computes them.
        """
        self._backend = choose_backend(self.layer_name, expert_format, self.moe_config)

    def _check_shape(self, prefix: str, moe_config: Any) -> None:
        if self.options.slots > moe_config.num_local_experts:
            raise ExpertCacheError(
                f"{config_key('cache_size')}={self.options.slots}: {prefix} has only "
                f"{moe_config.num_local_experts} experts on this rank; give a number from 1 to that"
            )

    def _check_offloading(self, prefix: str, offload: Any) -> None:
        """Refuse vLLM's offloading by the name of a block around these experts, before it copies them."""
        for option, taken in (
            ("--cpu-offload-params", offload.uva.cpu_offload_params if offload.uva.cpu_offload_gb else ()),
            ("--offload-params", offload.prefetch.offload_params if offload.prefetch.offload_group_size else ()),
        ):
            names = [name for name in taken if f".{name}." in f".{prefix}.routed_experts."]
            if names:
                raise ExpertCacheError(
                    f"{option} {names[0]} would take the experts of {prefix}, which the expert cache already keeps on "
                    "the host: name other weights"
                )

    def adopt_parameters(self, num_experts: int, expert_format: ExpertFormat, stored: Shapes) -> None:
        """Replace the declared (memory-less) parameters by views into a new host store.

        They are left as they are if the experts come from an earlier start's files.

        Args:
            num_experts: experts on this rank.
            expert_format: of the experts.
            stored: shape of each parameter in the checkpoint, without the expert dimension.

        Raises:
            ExpertCacheError: a parameter is not of the format, or has no expert dimension, so that slots could not
                hold an expert's part of it.
        """
        # A router's parameters that vLLM hangs on the layer too, like a correction of its choice, are left alone.
        declared = {name: p for name, p in self.named_parameters(recurse=False) if name in stored}
        self._declared = tuple(declared)
        for name, parameter in declared.items():
            if name not in expert_format.carried | expert_format.loader_only:
                raise ExpertCacheError(
                    f"{self.layer_name}: weight {name} is none that the expert cache carries for {expert_format.name} "
                    "experts; serve this model without it"
                )
            if parameter.ndim == 0 or parameter.shape[0] != num_experts:
                raise ExpertCacheError(
                    f"{self.layer_name}: weight {name} of shape {tuple(parameter.shape)} has no leading dimension of "
                    f"{num_experts} experts, so the expert cache cannot hold it"
                )
        carried = {name: p for name, p in declared.items() if name in expert_format.carried}
        layout = RecordLayout({n: (tuple(p.shape[1:]), p.dtype) for n, p in carried.items()})
        parallel = self.moe_config.moe_parallel_config
        self._record_key = {
            "layer": self.layer_name,
            "ranks": {"tp": [parallel.tp_rank, parallel.tp_size], "ep": [parallel.ep_rank, parallel.ep_size]},
            "format": expert_format.name,
            "backend": self._backend.name,
            "loaded_fields": described(layout),
        }
        device = torch.device(self.moe_config.device)
        records = self._loading.records
        self.store = None if records is None else records.restore(self._record_key, num_experts, device)
        self.restored = self.store is not None
        if self.store is None:
            self.store = HostStore(num_experts, layout, device)
        device_backend = self._backend if isinstance(self._backend, DeviceBackend) else None
        locked = device_backend is not None and self.options.slots < num_experts
        self._loading.expect(
            self.store.nbytes,
            converted=device_backend is not None and not self.restored and device_backend.converts,
            locked=locked,
            saved=not self.restored,
        )
        if locked:
            self._loading.page_lock(self.store, device)
        shapes = {name: stored[name] for name in carried}
        self.loaded = LoadedExperts(self.layer_name, expert_format, self.moe_config, num_experts, shapes, self.stacked)
        for name, parameter in {} if self.restored else declared.items():
            # vLLM's loader takes another scale than 1 for loaded.
            place = self.store.field(name) if name in carried else torch.ones_like(parameter, device="cpu")
            placed = torch.nn.Parameter(place, requires_grad=False)
            placed.__dict__.update(parameter.__dict__)
            placed.expert_field = name if name in carried else None  # type: ignore[attr-defined]
            setattr(self, name, placed)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> bool | None:
        """Load as vLLM does, but refuse what does not fill its place, and note what came."""
        if self.restored:
            return True if return_success else None
        field = getattr(param, "expert_field", None)
        whole_layer = expert_id is None or (not self.stacked and loaded_weight.ndim == 3)
        part = WHOLE if self.stacked or shard_id is None else shard_id
        if field is not None:
            shape = self._shape_of(loaded_weight[0] if whole_layer else loaded_weight, param)
            self.loaded.check_fits(param, field, part, expert_id, shape)
        success: bool = super().weight_loader(  # type: ignore[misc]
            param, loaded_weight, weight_name, shard_id, expert_id, True
        )
        if success and field is not None:
            local = None if whole_layer else self._map_global_expert_id_to_local_expert_id(expert_id)
            self.loaded.note(field, part, local)
        return success if return_success else None

    def _shape_of(self, loaded_weight: torch.Tensor, param: torch.nn.Parameter) -> tuple[int, ...]:
        """Shape that one expert's checkpoint tensor has in its parameter."""
        return tuple(loaded_weight.shape)

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def load_weights(self, weights: Any) -> Any:
        """Load checkpoint tensors; refused once the experts are in the cache."""
        if self.expert_cache is not None:
            raise ExpertCacheError(
                f"{self.layer_name}: weights cannot be reloaded into a running expert cache; restart the server"
            )
        return super().load_weights(weights)  # type: ignore[misc]

    def finish_loading(self, quant_config: Any) -> Any:
        """Check that all experts came, make the banks, drop the loading parameters, and return the kernel.

        Returns:
            vLLM's kernel frame around ``CachedExperts``.
        """
        assert self.store is not None
        self._check_places(self.store)
        if self._expects_all_weights and not self.restored:
            self.loaded.check_complete()
        device = torch.device(self.moe_config.device)
        for name in self._declared:
            delattr(self, name)
        store, self.store = self.store, None
        records = None if self.restored else self._loading.records
        keep = None if records is None else partial(records.keep, self._record_key)
        prepare = borrow("maybe_make_prepare_finalize")(
            moe=self.moe_config, quant_config=quant_config, allow_new_interface=True, use_monolithic=False
        )
        experts: HostCachedExperts | DeviceCachedExperts
        if isinstance(self._backend, DeviceBackend):
            self._backend.left_out = self.loaded.absent()
            layers = cached_layers(self._engine_layers)
            others = [layer.expert_cache for layer in layers if isinstance(layer.expert_cache, DeviceExpertCache)]
            self.expert_cache = load_cache(
                store, self._backend, self.options.slots, len(layers), self.top_k, self._max_tokens,
                self.options.staging_size, others, device, self._loading.bars, keep,
            )  # fmt: skip
            experts = DeviceCachedExperts(self.moe_config, quant_config, self.expert_cache)
        else:
            if keep is not None:
                keep(store)
            staging = self._staging_bank(store, device)
            self.expert_cache = HostExpertCache(
                store, self.options.slots, staging, self._backend, device, self.moe_config.num_experts
            )
            experts = HostCachedExperts(self.moe_config, quant_config, self.layer_name)
        return borrow("FusedMoEKernel")(prepare, experts)

    def _check_places(self, store: HostStore) -> None:
        """Refuse what was not loaded into the store, because something gave a parameter another place."""
        for name in () if self.restored else store.layout:
            if getattr(self, name).data_ptr() != store.field(name).data_ptr():
                raise ExpertCacheError(
                    f"{self.layer_name}: something else moved {name} while it was loaded, so the expert cache has not "
                    "what the checkpoint holds; remove other offloading (--offload-params, --cpu-offload-params)"
                )

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


class OffloadedRoutedExperts(OffloadedLayer, borrow("RoutedExperts")):  # type: ignore[misc]
    """In the place of ``RoutedExperts``, which most models use."""


def cached_layers(engine_layers: dict[str, Any]) -> list[OffloadedLayer]:
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
        if not isinstance(layer, OffloadedLayer):
            raise ExpertCacheError(
                f"{name}: expert weights are held by {type(layer).__name__}, which the expert cache does not replace; "
                "serve this model without it"
            )
        if layer.options.cache_size:
            found.append(layer)
    return found
