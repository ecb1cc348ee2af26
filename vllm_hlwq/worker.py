"""vLLM's worker with an expert cache in its model: chosen through ``worker_cls`` when the cache is on.

Before the model is built it settles a cache size of ``auto``, checks that the cache leaves room for a KV cache and puts
our layer in place; afterwards it checks that every mixture-of-experts layer is ours, clears what warm-up left in the
caches, and answers questions about counters. With a trace, it drives the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .auto_size import settle_cache_size
from .counter_block import CounterBlock
from .device_expert_cache import DeviceExpertCache
from .errors import ExpertCacheError
from .expert_loading import loading
from .gpt_oss_layer import OffloadedGptOssRoutedExperts
from .host_expert_cache import HostExpertCache
from .kept_loader import keeping_experts
from .memory_check import Device, check_memory
from .metrics import Layer
from .metrics_publisher import MetricsPublisher, start_publisher
from .moe_offload import OffloadedLayer, OffloadedRoutedExperts, cached_layers
from .options import AUTO, ExpertCacheOptions
from .record_cache import check_folder
from .slot_audit import audit
from .trace_recorder import TraceRecorder, check_trace_file, make_recorder
from .vllm_compat import borrow
from .warm_start import WarmStart

logger = borrow("init_logger")("vllm.expert_cache")

StockWorker: Any = borrow("CPUWorker") if borrow("current_platform").is_cpu() else borrow("GPUWorker")


LAYERS = {"RoutedExperts": OffloadedRoutedExperts, "GptOssRoutedExperts": OffloadedGptOssRoutedExperts}
"""Our layers by the names of vLLM's classes in whose place they are put."""

_WITHOUT_EXPERTS = "its experts are no parameters, and vLLM would leave them out; copy the checkpoint instead"


def install_layers() -> None:
    """Register our layers in the place of vLLM's; harmless when done before.

    Raises:
        ExpertCacheError: another plugin has registered a layer of its own there.
    """
    for name, layer in LAYERS.items():
        holder = borrow("op_registry_oot").get(name)
        if holder is layer:
            continue
        if holder is not None:
            raise ExpertCacheError(
                f"another plugin has replaced vLLM's {name} by {holder.__module__}.{holder.__qualname__}; "
                "disable it (VLLM_PLUGINS) or serve without the expert cache"
            )
        borrow("PluggableLayer").register_oot(layer, name=name)


class ExpertCacheWorker(StockWorker):  # type: ignore[misc]
    """Worker whose model keeps its experts in a cache."""

    _publisher: MetricsPublisher | None = None
    trace_recorder: TraceRecorder | None = None
    warm_start: WarmStart | None = None

    def load_model(self, **arguments: Any) -> None:
        self._settle_cache_size()
        self._check_memory()
        options = self._options()
        trace = options.trace
        if trace is not None:
            check_trace_file(trace, self.rank, self.vllm_config)
        if options.store_cache is not None:
            check_folder(options.store_cache)
        if options.profile is not None:
            self.warm_start = WarmStart(options.profile, self.vllm_config, self.rank)
        install_layers()
        with loading(self.vllm_config, options), self._loader(options):
            super().load_model(**arguments)
        if self.warm_start is not None:
            self.warm_start.read()
        caches = self._caches()
        if not caches:
            raise ExpertCacheError(
                f"{self.model_config.model}: no mixture-of-experts layer was built, so there is nothing to cache; "
                "remove --moe-expert-cache-size"
            )
        logger.info(describe(list(caches.values())))
        self._counter_block = CounterBlock([cache.table for cache in caches.values()])
        if trace is not None:
            self.trace_recorder = make_recorder(self._layers(), self.vllm_config, self.rank, trace)

    def _loader(self, options: ExpertCacheOptions) -> AbstractContextManager[None]:
        """vLLM's own choice of a loader, or ours where experts may come from files of an earlier start."""
        if options.store_cache is None:
            return nullcontext()
        return keeping_experts(self.vllm_config.load_config)

    def _settle_cache_size(self) -> None:
        """Put a number in the place of ``auto``, in this worker's configuration: what is built from now on reads it."""
        options = self._options()
        if options.cache_size == AUTO:
            settle_cache_size(self.vllm_config, options, self._device(), log=self.rank == 0)

    def _check_memory(self) -> None:
        device = self._device()
        if device is not None:
            check_memory(self.vllm_config, self._options(), device)

    def _device(self) -> Device | None:
        """Memory of this worker's GPU, None on a CPU."""
        if not borrow("current_platform").is_cuda():
            return None
        snapshot = self.init_snapshot
        return Device(snapshot.total_memory, snapshot.free_memory, self.requested_memory)

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        for cache in self._caches().values():
            cache.reset()
        if self.warm_start is not None:
            self.warm_start.start(self._layers())
        self._publish_metrics()
        if self.trace_recorder is not None:
            self.trace_recorder.start()
        return result

    def execute_model(self, *arguments: Any, **named: Any) -> Any:
        result = super().execute_model(*arguments, **named)
        if self.trace_recorder is not None:
            self.trace_recorder.poll()
        return result

    def _publish_metrics(self) -> None:
        seeded = {} if self.warm_start is None else self.warm_start.seeded
        layers = [
            Layer(name, cache.num_slots, cache.record_bytes, cache.table is None, seeded.get(name, 0))
            for name, cache in self._caches().items()
        ]
        self._publisher = start_publisher(
            self.vllm_config, self.rank, self._counter_block, layers, self._options().metrics_per_layer
        )

    def reload_weights(self, *_: Any, **__: Any) -> None:
        raise ExpertCacheError("weights cannot be reloaded into a running expert cache; restart the server")

    def update_weights(self, *_: Any, **__: Any) -> None:
        raise ExpertCacheError("weights cannot be updated in a running expert cache; restart the server")

    def save_sharded_state(self, *_: Any, **__: Any) -> None:
        raise ExpertCacheError(f"the model cannot be saved from a running expert cache: {_WITHOUT_EXPERTS}")

    def save_tensorized_model(self, *_: Any, **__: Any) -> None:
        raise ExpertCacheError(f"the model cannot be saved from a running expert cache: {_WITHOUT_EXPERTS}")

    def expert_cache_counters(self) -> dict[str, dict[str, int]]:
        """Counters of each layer by layer name; reachable through vLLM's ``collective_rpc``."""
        return {name: cache.counts() for name, cache in self._caches().items()}

    def expert_cache_faults(self) -> list[str]:
        """What is wrong with slot tables, counters and slots' bytes; reachable through vLLM's ``collective_rpc``.

        Copies all slots to the host between two steps, so it is for tests and diagnosis.
        """
        return [f"{name}: {fault}" for name, cache in self._caches().items() for fault in audit(cache)]

    def expert_cache_sizes(self) -> dict[str, int | str]:
        """What the caches hold, in numbers; reachable through vLLM's ``collective_rpc``."""
        return sizes(list(self._caches().values()))

    def save_expert_trace(self) -> str | None:
        """Write the trace with all steps so far and return its path; reachable through vLLM's ``collective_rpc``."""
        return None if self.trace_recorder is None else self._saved(self.trace_recorder.save)

    def save_expert_profile(self) -> str | None:
        """Save the profile of the slots now and return its path; reachable through vLLM's ``collective_rpc``."""
        return None if self.warm_start is None else self._saved(self.warm_start.save)

    def _saved(self, save: Callable[[], str | None]) -> str | None:
        """A save's answer. Of several ranks none may fail: vLLM would leave the others' answers to its next call."""
        try:
            return save()
        except ExpertCacheError as error:
            if self.vllm_config.parallel_config.world_size == 1:
                raise
            logger.error("%s", error)
            return None

    def shutdown(self) -> None:
        if self._publisher is not None:
            self._publisher.stop()
        try:
            if self.trace_recorder is not None:
                self.trace_recorder.close()
            if self.warm_start is not None:
                self.warm_start.close()
            self._log_counters()
        finally:  # also when the model was refused because a layer is not ours
            super().shutdown()

    def _log_counters(self) -> None:
        counts = list(self.expert_cache_counters().values())
        if counts:
            total = {name: sum(layer[name] for layer in counts) for name in counts[0]}
            logger.info(
                "Expert cache: %(queries)d queries, %(hits)d hits, %(evictions)d evictions, %(staged)d staged, "
                "%(h2d_bytes)d bytes copied to the device",
                total,
            )

    def _caches(self) -> dict[str, HostExpertCache | DeviceExpertCache]:
        return {layer.layer_name: layer.expert_cache for layer in self._layers() if layer.expert_cache is not None}

    def _layers(self) -> list[OffloadedLayer]:
        return cached_layers(self.vllm_config.compilation_config.static_forward_context)

    def _options(self) -> ExpertCacheOptions:
        return ExpertCacheOptions.from_additional_config(self.vllm_config.additional_config)


def sizes(caches: list[HostExpertCache | DeviceExpertCache]) -> dict[str, int | str]:
    """What an engine's caches hold: layers, experts and slots of each, and the bytes of its stores and banks.

    ``host_bytes`` is 0 when all experts are resident; ``slot_bytes`` are then all experts.
    """
    first = caches[0]
    staging = {id(cache.staging_bank): cache.staging_bank for cache in caches if cache.staging_bank is not None}
    return {
        "layers": len(caches),
        "experts": first.num_experts,
        "slots": first.num_slots,
        "record_bytes": first.record_bytes,
        "slot_bytes": sum(cache.slot_bank.nbytes for cache in caches),
        "staging_bytes": sum(bank.nbytes for bank in staging.values()),
        "host_bytes": sum(cache.store.nbytes for cache in caches if cache.store is not None),
        "backend": first.backend.name,
    }


def describe(caches: list[HostExpertCache | DeviceExpertCache]) -> str:
    """One line for the log: layers, slots, bytes a slot, device and host bytes, backend."""
    line = (
        "Expert cache: %(layers)d layers, %(slots)d of %(experts)d experts resident{note}, %(record_bytes)d bytes a "
        "slot, %(slot_bytes)d bytes of slots, %(staging_bytes)d bytes of staging, %(host_bytes)d bytes of experts in "
        "host memory, %(backend)s backend"
    )
    note = "" if caches[0].table is not None else " (all: nothing is planned or copied)"
    return line.format(note=note) % sizes(caches)
