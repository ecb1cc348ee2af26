"""What the tests of the writer share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.errors import CheckpointError

SHARD_BYTES = 100_000
"""Of the varied model, which makes seven shards."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        quantize(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
