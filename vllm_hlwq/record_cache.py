"""Converted experts on disk, so that the next start of the same engine reads them and converts nothing.

A folder for each engine key (which checkpoint, vLLM, layout and device), in it a file for each layer and rank. A file
that is not there, damaged or of something else is no obstacle: its layer is loaded from the checkpoint, and the file
made anew. Neither is a disk that takes no file.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .checkpoint_identity import checkpoint_identity
from .errors import ExpertCacheError
from .host_store import HostStore
from .options import flag
from .progress_bars import ProgressBars
from .record_files import RecordFileError, read_records, write_records
from .served_checkpoint import model_folder
from .vllm_compat import borrow

logger = borrow("init_logger")("vllm.expert_cache")

LAYOUT_VERSION = 1
"""Goes up when this package converts experts into other records than before."""
SUFFIX = ".experts"
READS_ALL = ("fastsafetensors", "instanttensor", "runai_streamer")
"""Formats of loading in which vLLM reads whole files of a checkpoint."""


class RecordCache:
    """The files of one rank while its engine loads.

    Args:
        root: what the user gave; made when the first file is.
        vllm_config: of the engine.
        bars: where reading and saving show.
    """

    def __init__(self, root: Path, vllm_config: Any, bars: ProgressBars) -> None:
        self.root = root
        self._bars = bars
        self._config = vllm_config
        self._settings = engine_settings(vllm_config)
        self._checkpoints: list[str] | None = None
        self._writable = True
        self._read_seconds = 0.0
        self.restored = self.saved = self.missed = self._read_bytes = 0

    def restore(self, layer: dict[str, Any], num_experts: int, device: torch.device) -> HostStore | None:
        """A layer's records; None if they have to be made.

        Args:
            layer: the layer's own part of the key, with its ``layer`` name and ``ranks``.
            num_experts: experts on this rank.
            device: that will read the store.
        """
        store = self._read(layer, num_experts, device)
        if store is None:
            self.missed += 1
        else:
            self.restored += 1
        return store

    def _read(self, layer: dict[str, Any], num_experts: int, device: torch.device) -> HostStore | None:
        key = self._key(layer)
        if key is None:
            return None
        path = self._path(layer)
        if not self.restored:
            self._bars.expect("Reading", sum(file.stat().st_size for file in path.parent.glob(f"*{_of_rank(layer)}")))
        began = time.monotonic()
        try:
            store = read_records(path, key, num_experts, device, lambda n: self._bars.advance("Reading", n))
        except FileNotFoundError:
            return None
        except (RecordFileError, OSError) as error:
            logger.warning("Expert store cache: %s: %s; it is made anew from the checkpoint", path, error)
            return None
        self._read_seconds += time.monotonic() - began
        self._read_bytes += store.nbytes
        return store

    def keep(self, layer: dict[str, Any], store: HostStore) -> None:
        """Write a layer's records for the next start; where that fails, say so once and go on."""
        if not self._writable:
            return
        if not self.saved:
            self._checkpoints = None  # vLLM may have downloaded files since
        key = self._key(layer)
        if key is None:
            self._give_up(f"{self._config.model_config.model} has no safetensors files here by which to know it again")
            return
        path = self._path(layer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_records(path, key, store, lambda n: self._bars.advance("Saving", n))
        except OSError as error:
            self._give_up(f"{path} could not be written: {error.strerror or error}")
            return
        self.saved += 1

    def _give_up(self, reason: str) -> None:
        self._writable = False
        logger.warning(
            "Expert store cache: %s; serving goes on, but the next start converts again: free space or give another "
            "folder (%s), or remove the flag", reason, flag("store_cache"),
        )  # fmt: skip

    def report(self) -> None:
        """Say in the log what came from files, what was saved, and what was read for nothing."""
        logger.info(
            "Expert store cache: %d of %d layers read from %s (%d bytes, %.1f s), %d saved",
            self.restored, self.restored + self.missed, self.root, self._read_bytes, self._read_seconds, self.saved,
        )  # fmt: skip
        whole = reads_whole_files(self._config.load_config)
        if self.restored and whole:
            logger.warning(
                "Expert store cache: %s reads whole checkpoint files, experts too, though they came from %s: leave "
                "them in the files with --safetensors-load-strategy lazy", whole, self.root,
            )  # fmt: skip

    def _key(self, layer: dict[str, Any]) -> dict[str, Any] | None:
        if self._checkpoints is None:
            self._checkpoints = identities(checkpoint_folders(self._config))
        return None if self._checkpoints is None else {**self._settings, "checkpoints": self._checkpoints, **layer}

    def _path(self, layer: dict[str, Any]) -> Path:
        engine = json.dumps({**self._settings, "checkpoints": self._checkpoints}, sort_keys=True)
        name = Path(self._config.model_config.model).name
        folder = f"{name}-{hashlib.sha256(engine.encode()).hexdigest()[:16]}"
        return self.root / folder / (re.sub(r"[^\w.-]", "_", layer["layer"]) + _of_rank(layer))


def _of_rank(layer: dict[str, Any]) -> str:
    return "".join(f"-{name}{rank}of{size}" for name, (rank, size) in layer["ranks"].items()) + SUFFIX


def engine_settings(vllm_config: Any) -> dict[str, Any]:
    """What records depend on beside the checkpoint and the layer, as JSON values."""
    model, load = vllm_config.model_config, vllm_config.load_config
    platform = borrow("current_platform")
    values = model.hf_config.to_dict()
    values.pop("_name_or_path", None)  # where the model lies
    configuration = json.dumps(values, sort_keys=True, default=str)
    return {
        "layout": LAYOUT_VERSION,
        "plugin": version("vllm-hlwq"),
        "vllm": version("vllm"),
        "configuration": hashlib.sha256(configuration.encode()).hexdigest(),
        "quantization": model.quantization,
        "dtype": str(model.dtype),
        "loader_options": json.dumps(load.model_loader_extra_config, sort_keys=True, default=str),
        "expert_placement": vllm_config.parallel_config.expert_placement_strategy,
        "device": str(platform.get_device_capability()) if platform.is_cuda() else platform.device_type,
    }


def checkpoint_folders(vllm_config: Any) -> list[Path | None]:
    """Folders of all checkpoints that an engine's experts may come from; None for one that is not there."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    folders = [model_folder(model.model, model.revision)]
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        folders.append(model_folder(draft.model, draft.revision))
    extra = vllm_config.load_config.model_loader_extra_config
    if isinstance(extra, dict) and extra.get("base_model"):
        folders.append(Path(extra["base_model"]))
    return folders


def identities(folders: Sequence[Path | None]) -> list[str] | None:
    """Digests of checkpoints; None if one of them cannot be told."""
    found = []
    for folder in folders:
        identity = None if folder is None else checkpoint_identity(folder)
        if identity is None:
            return None
        found.append(hashlib.sha256(f"{identity.contents} {identity.times}".encode()).hexdigest())
    return found


def reads_whole_files(load_config: Any) -> str | None:
    """The setting by which vLLM reads whole files of a checkpoint, None if it reads what it is asked for."""
    if load_config.load_format in READS_ALL:
        return f"--load-format {load_config.load_format}"
    if load_config.safetensors_load_strategy in ("eager", "prefetch"):
        return f"--safetensors-load-strategy {load_config.safetensors_load_strategy}"
    extra = load_config.model_loader_extra_config
    return "enable_multithread_load" if isinstance(extra, dict) and extra.get("enable_multithread_load") else None


def check_folder(folder: str) -> None:
    """Refuse a folder that can be none.

    Raises:
        ExpertCacheError: something else is in its place.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ExpertCacheError(f"{flag('store_cache')} {folder}: is a file; give a folder, which is made if need be")
