"""A worker's warm start: slots filled from a profile when warm-up has ended, and the profile saved from then on.

Slots are filled by ordinary steps, one expert each, the least valuable first: so table, stamps and banks are what
serving would have left, whatever planner runs. Only the counters are set back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .device_expert_cache import DeviceExpertCache
from .errors import ExpertCacheError
from .expert_profile import ModelFingerprint, Profile, load_profile
from .host_expert_cache import HostExpertCache
from .options import flag
from .profile_saver import ProfileSaver, SlotReader
from .trace_recorder import path_of_rank
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")


class WarmStart:
    """One rank's profile.

    Args:
        file: what the user gave.
        vllm_config: of the engine.
        rank: of the worker in it.

    Attributes:
        seeded: slots that were filled, by layer name.

    Raises:
        ExpertCacheError: the file is no profile of this model, or its folder is not there.
    """

    def __init__(self, file: str, vllm_config: Any, rank: int) -> None:
        parallel = vllm_config.parallel_config
        self._own_path = path_of_rank(Path(file), rank, parallel)
        # Ranks of a tensor-parallel group hold parts of the same experts: they fill their slots from one file.
        first = rank - rank % parallel.tensor_parallel_size
        self.path = self._own_path or path_of_rank(Path(file), first, parallel)
        assert self.path is not None
        if not self.path.parent.is_dir():
            raise ExpertCacheError(f"{flag('profile')} {file}: folder {self.path.parent} does not exist; make it first")
        self._model_config = vllm_config.model_config
        self._saver: ProfileSaver | None = None
        self.seeded: dict[str, int] = {}
        self._model: ModelFingerprint | None = None
        self._profile: Profile | None = None
        if Path(self._model_config.model).is_dir():
            self.read()

    def read(self) -> None:
        """Read the profile, if that has not been done: of a model that vLLM downloads, when it is there.

        Raises:
            ExpertCacheError: the file is no profile of this model.
        """
        if self._model is None:
            assert self.path is not None
            self._model = ModelFingerprint.of(self._model_config)
            self._profile = load_profile(self.path, self._model)

    def start(self, layers: Sequence[Any]) -> None:
        """Fill slots, which are empty, and begin to save; only enqueues on a device.

        Args:
            layers: ``OffloadedRoutedExperts`` with their caches.
        """
        self.close()
        cached = [layer for layer in layers if layer.expert_cache.table is not None]
        if not cached:
            logger.warning("Expert profile: all experts are resident, so that %s is neither read nor saved", self.path)
            return
        began = time.monotonic()
        known = {} if self._profile is None else self._profile.layers
        worth: dict[str, list[int]] = {}
        for layer in cached:
            global_ids = ids_in_checkpoint(layer)
            local = {number: expert for expert, number in enumerate(global_ids)}
            worth[layer.layer_name] = [number for number in known.get(layer.layer_name, []) if number in local]
            experts = [local[number] for number in worth[layer.layer_name]]
            self.seeded[layer.layer_name] = seed(layer.expert_cache, experts)
        if self._profile is None:
            logger.info("Expert profile: %s is not there yet, slots start empty", self.path)
        else:
            logger.info(
                "Expert profile: %d of %d slots in %d of %d layers filled from %s in %.1f s",
                sum(self.seeded.values()), sum(layer.expert_cache.num_slots for layer in cached),
                sum(count > 0 for count in self.seeded.values()), len(cached), self.path, time.monotonic() - began,
            )  # fmt: skip
        if self._own_path is not None:
            reader = SlotReader({layer.layer_name: layer.expert_cache.table for layer in cached})
            numbers = {layer.layer_name: ids_in_checkpoint(layer) for layer in cached}
            self._saver = ProfileSaver(self._own_path, reader, numbers, worth, self._new_profile)

    def _new_profile(self, layers: dict[str, list[int]]) -> Profile:
        assert self._model is not None
        return Profile(vllm=version("vllm"), model=self._model, layers=layers)

    def save(self) -> str | None:
        """Save the profile now; its path, None where there is nothing to save on this rank.

        Raises:
            ExpertCacheError: it could not be saved.
        """
        if self._saver is None:
            return None
        failure = self._saver.save()
        if failure:
            raise ExpertCacheError(
                f"{flag('profile')} {self._saver.path} could not be saved: {failure}; make room, or make the folder "
                "writable"
            )
        return str(self.path)

    def close(self) -> None:
        """Save it for the last time."""
        if self._saver is not None:
            self._saver.close()


def seed(cache: HostExpertCache | DeviceExpertCache, experts: Sequence[int]) -> int:
    """Fill a cache's empty slots; returns how many. Counts nothing.

    Args:
        cache: with a table.
        experts: local ids, the most valuable first; those that do not fit are left out.
    """
    assert cache.table is not None
    chosen = experts[: cache.num_slots]
    for expert in reversed(chosen):
        cache.admit(expert)
    cache.table.counters.zero_()
    return len(chosen)


def ids_in_checkpoint(layer: Any) -> list[int]:
    """For each expert on this rank its id in the checkpoint, which is another one under expert parallelism."""
    if layer.expert_map is None:
        return list(range(layer.expert_cache.num_experts))
    found = [0] * layer.expert_cache.num_experts
    for number, local in enumerate(layer.expert_map.tolist()):
        if local >= 0:
            found[local] = number
    return found
