"""Are a local checkpoint's safetensors files whole? Asked before the first byte of a weight is loaded.

The safetensors library notices a damaged header or a short file but names neither file nor tensor; this does.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import ExpertCacheError

INDEX = "model.safetensors.index.json"
REMEDY = "download or export it again"


def check_checkpoint_files(model: str) -> None:
    """Check every safetensors file of a checkpoint folder; a name that is no local folder is passed over.

    Raises:
        ExpertCacheError: a shard of the index is missing, or a file is truncated or not a safetensors file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    index = folder / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ExpertCacheError(f"{index}: not a readable index of shards ({error}); {REMEDY}") from None
        for shard in sorted(shards):
            if not (folder / str(shard)).is_file():
                raise ExpertCacheError(f"{folder / str(shard)}: listed in {INDEX} but missing; {REMEDY}")
    for path in sorted(folder.glob("*.safetensors")):
        check_file(path)


def check_file(path: Path) -> None:
    """Check header and length of one safetensors file.

    Raises:
        ExpertCacheError: naming the file and, where its header can be read, the first tensor that is cut off.
    """
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise ExpertCacheError(f"{path}: {_diagnosis(path)} ({error}); {REMEDY}") from None


def _diagnosis(path: Path) -> str:
    try:
        size = path.stat().st_size
        ends = _ends(path, size)
    except OSError:
        return "cannot be read"
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        ends = None
    if ends is None:
        return f"not a safetensors file, or its header is damaged; file size {size} bytes"
    cut = next(((end, name) for end, name in ends if end > size), None)
    if cut is not None:
        return f"truncated: tensor {cut[1]} ends at byte {cut[0]}, the file at byte {size}"
    return f"header and data disagree; file size {size} bytes"


def _ends(path: Path, size: int) -> list[tuple[int, str]] | None:
    """Where each tensor ends in the file, in order; None, or any error of parsing, if the header is damaged."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            return None
        tensors = json.loads(file.read(length))
    return sorted((8 + length + int(t["data_offsets"][1]), n) for n, t in tensors.items() if n != "__metadata__")
