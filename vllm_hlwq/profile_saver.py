"""Saving the profile of a running server: a thread that reads slot tables beside the steps, and the file.

vLLM gives a server's processes no time to end unless it is told to (``--shutdown-timeout``), so the file is saved while
the server runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .expert_cache import SlotState
from .expert_profile import Profile
from .side_reader import SideReader
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")

SAVE_SECONDS = 10.0
"""How often a profile that has changed is saved; what a server that is killed can lose."""


class SlotReader:
    """Reads which experts the slots of several layers hold, from a thread that is not the one that runs steps.

    Args:
        tables: by layer name.
    """

    def __init__(self, tables: Mapping[str, SlotState]) -> None:
        self._tables = dict(tables)
        self._slots = [table.num_slots for table in tables.values()]
        device = next(iter(tables.values())).expert_of_slot.device
        with torch.inference_mode(False):  # also used by a thread that is not in vLLM's inference mode
            self._experts = torch.zeros(sum(self._slots), dtype=torch.int32, device=device)
            self._both = torch.zeros(2, sum(self._slots), dtype=torch.int64, device=device)
            self._reader = SideReader(self._both)

    def read(self) -> dict[str, list[int]]:
        """The experts in each layer's slots, the last needed first; between two steps exact.

        Those needed last by the same step come in the opposite order of their slots, as they would be evicted last. A
        reading in the middle of a step may miss an expert that is being admitted.
        """
        experts, stamps = self._reader.read(self._gather).tolist()
        found, start = {}, 0
        for name, count in zip(self._tables, self._slots, strict=True):
            here = slice(start, start + count)
            by_age = sorted(zip(stamps[here], range(count), experts[here], strict=True), reverse=True)
            # The two tables are not read in the same instant: an expert may have moved in between.
            found[name] = list(dict.fromkeys(expert for _, _, expert in by_age if expert >= 0))
            start += count
        return found

    def _gather(self) -> None:
        torch.cat([table.expert_of_slot for table in self._tables.values()], out=self._experts)
        self._both[0].copy_(self._experts)
        torch.cat([table.stamp_of_slot for table in self._tables.values()], out=self._both[1])


class ProfileSaver:
    """Keeps a profile's file up to date until it is closed; its thread starts at once.

    An expert that has lost its slot keeps its place behind those that have one, so that the file also serves a server
    with more slots.

    Args:
        path: the file.
        reader: of the slots.
        numbers: by layer name the id in the checkpoint of each expert.
        worth: by layer name the ids that the server started with, the most valuable first.
        new_profile: makes a profile of such lists.
        save_seconds: see ``SAVE_SECONDS``.
    """

    def __init__(
        self,
        path: Path,
        reader: SlotReader,
        numbers: Mapping[str, Sequence[int]],
        worth: Mapping[str, list[int]],
        new_profile: Callable[[dict[str, list[int]]], Profile],
        save_seconds: float | None = None,
    ) -> None:
        self.path = path
        self._reader, self._numbers, self._new_profile = reader, numbers, new_profile
        self._worth = dict(worth)
        self._save_seconds = SAVE_SECONDS if save_seconds is None else save_seconds
        self._failure = ""
        self._saving = threading.Lock()
        self._stopping = threading.Event()
        # A daemon: an engine that is never shut down must not keep its process alive.
        self._thread = threading.Thread(target=self._run, name="expert-profile", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._save_seconds):
            self.save()

    def save(self) -> str:
        """Save the profile if it has changed.

        Returns:
            Why it could not be saved, which is logged once; the file is then as it was. Empty if it is saved.
        """
        with self._saving:
            worth = {
                name: list(dict.fromkeys([*(self._numbers[name][expert] for expert in experts), *self._worth[name]]))
                for name, experts in self._reader.read().items()
            }
            is_there = self.path.exists() or not any(worth.values())
            if worth == self._worth and is_there and not self._failure:
                return ""
            self._worth = worth
            failure = ""
            try:
                self._new_profile(worth).save(self.path)
            except OSError as error:
                failure = error.strerror or str(error)
            if failure and failure != self._failure:
                logger.warning(
                    "Expert profile: %s could not be saved: %s; what it held before is unchanged, and it is tried again"
                    " every %.0f s", self.path, failure, self._save_seconds,
                )  # fmt: skip
            self._failure = failure
            return failure

    def close(self) -> None:
        """Save for the last time, and end the thread."""
        self._stopping.set()
        self._thread.join()
        self.save()
