"""A worker's side of the metrics: a thread that reads the counters and writes them where /metrics finds them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from .counter_block import CounterBlock
from .metrics import Layer, Rank, metric_values
from .metrics_files import MetricFiles, folder_of
from .vllm_compat import borrow

PUBLISH_SECONDS = 0.5
"""How old what /metrics says can be."""

_STOP_SECONDS = 5

logger = borrow("init_logger")("vllm.expert_cache")


class MetricsPublisher:
    """Publishes a rank's counters until it is stopped; its thread starts at once.

    Args:
        block: counters of the layers.
        layers: the layers, in the block's order.
        rank: the rank's part in the sums of its engine.
        files: where values are written; closed when stopped.
        per_layer: whether layers are reported apart.
    """

    def __init__(
        self, block: CounterBlock, layers: Sequence[Layer], rank: Rank, files: MetricFiles, per_layer: bool
    ) -> None:
        self._reader = block.reader()
        self._layers, self._rank, self._files, self._per_layer = layers, rank, files, per_layer
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-cache-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        published = None
        while True:
            counters = self._reader.read()
            if counters != published:
                self._files.write(metric_values(self._layers, counters, self._rank, self._per_layer))
                published = counters
            if self._stopping.wait(PUBLISH_SECONDS):
                return

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(_STOP_SECONDS)
        if not self._thread.is_alive():
            self._files.close()


def start_publisher(
    vllm_config: Any, rank: int, block: CounterBlock, layers: Sequence[Layer], per_layer: bool
) -> MetricsPublisher | None:
    """Publish a worker's counters if its engine's metrics are exposed on this machine. All ranks must call it."""
    parallel = vllm_config.parallel_config
    part = _part_of_rank(parallel, rank, sum(layer.slots for layer in layers))
    folder = folder_of(vllm_config.instance_id)
    if not folder.exists():
        return None
    labels = {
        "model_name": vllm_config.model_config.served_model_name,
        "engine": str(parallel.data_parallel_index),
    }
    try:
        files = MetricFiles(folder, labels)
    except OSError as error:
        logger.warning(
            "Expert cache: its metrics are not on /metrics: %s could not be written (%s); make room there, or set "
            "TMPDIR to another folder", folder, error.strerror,
        )  # fmt: skip
        return None
    return MetricsPublisher(block, layers, part, files, per_layer)


def _part_of_rank(parallel: Any, rank: int, slots: int) -> Rank:
    own_experts = parallel.enable_expert_parallel
    counts_experts = own_experts or rank % parallel.tensor_parallel_size == 0
    engine_slots = slots
    if parallel.world_size > 1:
        group = borrow("get_world_group")()
        total = torch.tensor(slots if counts_experts else 0)
        torch.distributed.all_reduce(total, group=group.cpu_group)
        engine_slots = int(total) * parallel.world_size // group.world_size
    return Rank(counts_experts, parallel.tensor_parallel_size if own_experts else 1, engine_slots)
