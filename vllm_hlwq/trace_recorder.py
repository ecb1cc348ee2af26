"""A worker's recording of a routing trace, from the end of warm-up to shutdown, and its file.

vLLM's own ``RoutedExpertsCapturer`` does not serve here: it keeps one step, to be fetched before the next, and sees ids
before padding rows and other ranks' experts are taken out, so that a replay would not be what the planner saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .device_expert_cache import DeviceExpertCache
from .errors import ExpertCacheError
from .host_expert_cache import HostExpertCache
from .options import flag
from .routing_log import MAX_TRACE_BYTES, RoutingLog
from .routing_ring import RingOverrunError, RoutingRing
from .served_checkpoint import model_folder
from .trace import Header, State, TraceLayer
from .trace_file import SAVE_SECONDS, Counters, TraceFile, logger


class TraceRecorder:
    """Records what the layers of a worker are asked for.

    Steps append to a log, on CUDA by way of a ring on the device. All methods belong to the worker's thread.

    Args:
        path: of the file.
        header: what is known before the first step.
        caches: of the header's layers; each is made to append its steps.
        max_tokens: rows of the largest step.
        device: where the layers' ids are.
        max_bytes: where the recording ends.
        save_seconds: see ``SAVE_SECONDS``.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        caches: Sequence[HostExpertCache | DeviceExpertCache],
        max_tokens: int,
        device: torch.device,
        max_bytes: int = MAX_TRACE_BYTES,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self._header, self._caches = header, caches
        self._new_file = partial(TraceFile, path, header, save_seconds=save_seconds)
        self._max_bytes = max_bytes
        self._file: TraceFile | None = None
        self._recording = False
        self._ring: RoutingRing | None = None
        if device.type == "cuda":
            with torch.inference_mode(False):  # its tensors are also used outside of vLLM's inference mode
                self._ring = RoutingRing(header.layers, max_tokens, device)
        for layer, cache in enumerate(caches):
            cache.record = partial(self._append_on_host if self._ring is None else self._ring.append, layer)

    def start(self) -> None:
        """Begin here, with slots as empty as the counters."""
        own = None
        if self._file is not None:
            self._file.wait()
            own = self._file.own
        if self._ring is not None:
            self._ring.reset()
        self._file = self._new_file(RoutingLog(self._header.layers, self._max_bytes))
        self._file.own = own
        self._file.start()
        self._recording = True
        memory = "" if self._ring is None else f", by a buffer of {self._ring.nbytes} bytes on the device"
        logger.info(
            "Expert trace: recording %d layers to %s, up to %d bytes%s",
            len(self._header.layers), self._file.path, self._max_bytes, memory,
        )  # fmt: skip

    def _append_on_host(self, layer: int, expert_ids: torch.Tensor) -> None:
        if self._recording and self._file is not None and not self._file.log.add_step(layer, expert_ids):
            self._end("full")

    def poll(self) -> None:
        """Take what the device has ready; after every step. Never waits."""
        if self._recording:
            self._fetch(wait=False)

    def save(self) -> str | None:
        """Write the file now, with all steps so far and the counters at this point; returns its path.

        Raises:
            ExpertCacheError: it could not be written.
        """
        if self._file is None:
            return None
        if self._recording:
            self._fetch(wait=True)
        self._file.save(self._counters() if self._recording else None)
        return str(self._file.path)

    def close(self) -> None:
        """Write the complete file, unless the recording had to end before."""
        if self._file is None:
            return
        if self._recording:
            self._fetch(wait=True)
        self._file.wait()
        if self._recording:
            self._recording = False
            self._file.state = "ended"
            self._file.save_or_log(self._counters())
        else:
            self._file.save_or_log()  # what a full disk kept from being saved when the recording ended

    def _counters(self) -> Counters:
        names = [layer.name for layer in self._header.layers]
        return dict(zip(names, (cache.counts() for cache in self._caches), strict=True))

    def _fetch(self, wait: bool) -> None:
        if self._ring is None or self._file is None:
            return
        try:
            for chunk in self._ring.drain() if wait else [self._ring.poll()]:
                if chunk is not None and not self._file.log.add(chunk):
                    self._end("full")
                    return
        except RingOverrunError as error:
            logger.warning("Expert trace: %s", error)
            self._end("overrun")

    def _end(self, state: State) -> None:
        assert self._file is not None
        self._recording = False
        logger.warning(
            "Expert trace: RECORDING HAS ENDED (%s): %s holds the %d bytes before",
            state, self._file.path, self._file.log.nbytes,
        )  # fmt: skip
        self._file.end(state)


def make_recorder(layers: Sequence[Any], vllm_config: Any, rank: int, file: str) -> TraceRecorder | None:
    """The recorder of a worker; None if another rank records the same.

    Args:
        layers: ``OffloadedRoutedExperts`` with their caches, in the order of the model.
        vllm_config: of the engine.
        rank: of the worker in it.
        file: what the user asked for.
    """
    path = path_of_rank(Path(file), rank, vllm_config.parallel_config)
    if path is None:
        return None
    caches = [layer.expert_cache for layer in layers]
    traced = tuple(
        TraceLayer(
            name=layer.layer_name,
            experts=cache.num_experts,
            top_k=layer.top_k,
            record_bytes=cache.record_bytes,
            global_experts=None if cache.global_experts == cache.num_experts else cache.global_experts,
        )
        for layer, cache in zip(layers, caches, strict=True)
    )
    header = Header(
        state="running",
        model=Path(vllm_config.model_config.model).name,
        vllm=version("vllm"),
        rank=rank,
        backend=caches[0].backend.name,
        cache_size=caches[0].num_slots,
        layers=traced,
    )
    device = torch.device(layers[0].moe_config.device)
    scheduler = vllm_config.scheduler_config
    return TraceRecorder(path, header, caches, max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs), device)


def path_of_rank(file: Path, rank: int, parallel_config: Any) -> Path | None:
    """The file that a rank writes: ``FILE``, on rank r > 0 ``FILE`` with ``-rank<r>`` before its ending.

    None where all ranks of a stage see the same ids and another of them writes.
    """
    if rank % parallel_config.tensor_parallel_size and not parallel_config.enable_expert_parallel:
        return None
    return file.with_name(f"{file.stem}-rank{rank}{file.suffix}") if rank else file


def check_trace_file(file: str, rank: int, vllm_config: Any) -> None:
    """Refuse a file that this rank could not write, or vLLM would take for weights, before weights are loaded.

    Raises:
        ExpertCacheError: its folder is not there, or is a model's, or something of its name is there.
    """
    path = path_of_rank(Path(file), rank, vllm_config.parallel_config)
    if path is None:
        return
    if not path.parent.is_dir():
        raise ExpertCacheError(f"{flag('trace')} {file}: folder {path.parent} does not exist; make it first")
    drafts = vllm_config.speculative_config
    for model in (vllm_config.model_config, None if drafts is None else drafts.draft_model_config):
        folder = None if model is None else model_folder(model.model, model.revision)
        if folder is not None and path.suffix == ".safetensors" and path.parent.resolve() == folder.resolve():
            raise ExpertCacheError(
                f"{flag('trace')} {file}: {folder} holds a model, and vLLM would take the trace for weights when it is "
                "loaded again; give another folder"
            )
    if path.exists():
        raise ExpertCacheError(f"{flag('trace')} {file}: {path} exists; move it away or give another name")
