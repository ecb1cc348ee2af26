"""What the layers of an engine share while it loads: progress bars, and records from the start before.

The worker opens a loading around vLLM's; layers find it without vLLM having to hand it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from .cudart import PageLocker
from .host_store import HostStore
from .options import ExpertCacheOptions
from .progress_bars import ProgressBars
from .record_cache import RecordCache
from .vllm_compat import borrow

LOCKING_THREADS = 4
"""One thread makes 2 to 4 GB of pages a second, no more than a fast disk gives; cores are left to the loader."""


class ExpertLoading:
    """One rank's loading of its experts.

    Args:
        bars: of the work.
        records: converted experts on disk; None if none are kept.
    """

    def __init__(self, bars: ProgressBars, records: RecordCache | None = None) -> None:
        self.bars = bars
        self.records = records
        self._lockers: ThreadPoolExecutor | None = None

    def expect(self, nbytes: int, converted: bool, locked: bool, saved: bool) -> None:
        """Announce the work on one layer's experts of ``nbytes``."""
        if converted:
            self.bars.expect("Converting", nbytes)
        if locked:
            self.bars.expect("Page-locking", nbytes)
        if saved and self.records is not None:
            self.bars.expect("Saving", nbytes)

    def page_lock(self, store: HostStore, device: torch.device, runtime: PageLocker | None = None) -> None:
        """Begin to page-lock a layer's experts, on threads beside the loading; see ``HostStore.page_lock_on``."""
        if self._lockers is None:
            self._lockers = ThreadPoolExecutor(LOCKING_THREADS, "page-locking")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        store.page_lock_on(self._lockers, runtime, device)

    def close(self) -> None:
        """End what runs beside the loading: what has not begun does not begin any more."""
        self.bars.close()
        if self._lockers is not None:
            self._lockers.shutdown(cancel_futures=True)

    @property
    def all_restored(self) -> bool:
        """Whether the experts of every layer that has been built came from files."""
        return self.records is not None and self.records.restored > 0 and self.records.missed == 0


_current: ContextVar[ExpertLoading | None] = ContextVar("loading of the engine that is being built", default=None)


def current_loading() -> ExpertLoading:
    """The loading that is open; a silent one that keeps nothing if there is none."""
    return _current.get() or ExpertLoading(ProgressBars(shown=False))


@contextmanager
def loading(vllm_config: Any, options: ExpertCacheOptions) -> Iterator[ExpertLoading]:
    """Open a loading for an engine's layers."""
    bars = ProgressBars(borrow("enable_tqdm")(vllm_config.load_config.use_tqdm_on_load))
    records = None if options.store_cache is None else RecordCache(Path(options.store_cache), vllm_config, bars)
    current = ExpertLoading(bars, records)
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)
        current.close()
    if records is not None:
        records.report()
