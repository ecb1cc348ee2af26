"""Files of routing traces: which experts every step of a server needed, layer by layer.

A safetensors file with four tensors. Entry i says what one layer was asked for in one forward pass:

- ``step`` int32 ``[n]``: number of the forward pass, from 0.
- ``layer`` int16 ``[n]``: index into the header's list of layers.
- ``tokens`` int32 ``[n]``: rows of the step, those that only pad it included.
- ``expert_ids`` uint8 or int16 ``[sum of tokens * k]``: the entries' expert ids one after the other, a token's k
  experts as the router lists them. -1 (255 in uint8) in padding rows and for experts of other ranks.

The metadata's ``trace`` is ``Header`` as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .atomic_file import replacing
from .errors import TraceError

NO_EXPERT = -1
_NO_EXPERT_IN_BYTES = 255

State = Literal["running", "ended", "full", "overrun"]

STATES: dict[str, str] = {
    "running": "saved while its server ran: what came later is in it only if a later save replaced it",
    "ended": "complete: from the end of warm-up to the server's shutdown",
    "full": "ends where the largest size of a trace was reached",
    "overrun": "ends where the device's buffer was overwritten before it was read",
}
"""What became of a recording, by its state."""

MOST_EXPERTS = 2**15 - 1
"""Of a layer: ids are at most 16 bits wide."""

Array = npt.NDArray[Any]


class TraceLayer(BaseModel):
    """A layer of a trace.

    Attributes:
        name: in vLLM.
        experts: on the rank that was recorded.
        top_k: experts of a token.
        record_bytes: bytes of an expert.
        global_experts: on all ranks; None if that is as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int = Field(ge=1, le=MOST_EXPERTS)
    record_bytes: int = Field(ge=0)
    global_experts: int | None = Field(default=None, ge=1)

    @property
    def everywhere(self) -> int:
        """Experts on all ranks."""
        return self.global_experts or self.experts


class Header(BaseModel):
    """What a trace says of its recording.

    Attributes:
        state: a key of ``STATES``.
        cache_size: slots of each layer while it was recorded.
        layers: in the order of the model.
        counters: the server's own counters of each layer, by layer name and counter, over the very steps of the trace;
            None in what was saved while steps may have run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    state: State
    model: str
    vllm: str
    rank: int
    backend: str
    cache_size: int
    layers: tuple[TraceLayer, ...] = Field(min_length=1)
    counters: dict[str, dict[str, int]] | None = None


@dataclass(frozen=True)
class Trace:
    """A routing trace in memory; the arrays are those of the file."""

    header: Header
    step: Array
    layer: Array
    tokens: Array
    expert_ids: Array

    @classmethod
    def of_entries(cls, header: Header, entries: Array, expert_ids: Array) -> Trace:
        """Number the forward passes of a recording.

        Layers run in the order of the model, so a pass begins where a layer does not follow a lower one.

        Args:
            header: goes with it.
            entries: int32 ``[n, 2]``, layer and tokens of each entry, in the order of time.
            expert_ids: of ``id_dtype``, as in the file.
        """
        layer, tokens = entries[:, 0], entries[:, 1]
        step = np.cumsum(np.diff(layer, prepend=-1) <= 0, dtype=np.int32)
        return cls(header, step, layer.astype(np.int16), tokens.astype(np.int32), expert_ids)

    @property
    def nbytes(self) -> int:
        return int(self.step.nbytes + self.layer.nbytes + self.tokens.nbytes + self.expert_ids.nbytes)

    @property
    def num_steps(self) -> int:
        """Forward passes."""
        return int(self.step[-1]) + 1 if len(self.step) else 0

    def steps_of(self, layer: int) -> Iterator[torch.Tensor]:
        """What a layer was asked for, step by step: int64 ``[tokens, k]``, ``NO_EXPERT`` where a row names none."""
        ends = np.cumsum(self.tokens * self._top_k()[self.layer], dtype=np.int64)
        top_k = self.header.layers[layer].top_k
        for entry in np.flatnonzero(self.layer == layer):
            count = int(self.tokens[entry]) * top_k
            ids = torch.from_numpy(self.expert_ids[ends[entry] - count : ends[entry]].astype(np.int64))
            if self.expert_ids.dtype == np.uint8:
                ids[ids == _NO_EXPERT_IN_BYTES] = NO_EXPERT
            yield ids.view(-1, top_k)

    def _top_k(self) -> Array:
        return np.array([layer.top_k for layer in self.header.layers], dtype=np.int64)

    def save(self, path: Path, new: bool = False) -> None:
        """Write the file, under its name only when it is whole and on the disk.

        Args:
            path: of the file.
            new: whether something of this name is to be left alone.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        tensors = {"step": self.step, "layer": self.layer, "tokens": self.tokens, "expert_ids": self.expert_ids}
        with replacing(path, new) as descriptor, open(descriptor, "wb", closefd=False) as file:
            file.write(save(tensors, metadata={"trace": self.header.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a file and check that its parts fit each other.

        Raises:
            TraceError: it is no trace, of another version, or not whole.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = Header.model_validate_json((file.metadata() or {})["trace"])
                arrays = [file.get_tensor(name) for name in ("step", "layer", "tokens", "expert_ids")]
        except FileNotFoundError:
            raise TraceError(f"{path}: no such file; give one that --moe-expert-trace recorded") from None
        except OSError as error:
            reason = error.strerror or "no ordinary file"
            raise TraceError(f"{path}: cannot be read ({reason}); give one that --moe-expert-trace recorded") from None
        except (KeyError, SafetensorError) as error:
            raise TraceError(f"{path}: not a trace of expert routing ({_one_line(error)}); record one with "
                             "--moe-expert-trace") from None  # fmt: skip
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise TraceError(
                f"{path}: header field {where}={problem['input']!r}: {problem['msg']}; record the trace again with "
                "this version"
            ) from None
        trace = cls(header, *arrays)
        trace._check(path)
        return trace

    def _check(self, path: Path) -> None:
        columns = {"step": np.int32, "layer": np.int16, "tokens": np.int32}
        for name, dtype in columns.items():
            column: Array = getattr(self, name)
            if column.ndim != 1 or column.dtype != dtype or len(column) != len(self.step):
                raise TraceError(f"{path}: tensor {name} is {column.dtype}{list(column.shape)}; record the trace again")
        if self.expert_ids.dtype not in (np.uint8, np.int16) or self.expert_ids.ndim != 1:
            raise TraceError(f"{path}: tensor expert_ids is {self.expert_ids.dtype}; record the trace again")
        layers = len(self.header.layers)
        if len(self.layer) and not (self.layer.min() >= 0 and self.layer.max() < layers and self.tokens.min() >= 0):
            raise TraceError(f"{path}: an entry is of none of the {layers} layers; record the trace again")
        counts = self.tokens * self._top_k()[self.layer]
        have, wanted = len(self.expert_ids), counts.sum()
        if have != wanted:
            raise TraceError(f"{path}: {have} expert ids, but its entries need {wanted}; record the trace again")
        experts = np.array([layer.experts for layer in self.header.layers], dtype=np.int16)
        no_expert = _NO_EXPERT_IN_BYTES if self.expert_ids.dtype == np.uint8 else NO_EXPERT
        strange = (self.expert_ids >= np.repeat(experts[self.layer], counts)) & (self.expert_ids != no_expert)
        if strange.any():
            raise TraceError(
                f"{path}: expert id {self.expert_ids[strange.argmax()]} is none of its layer's; record the trace again"
            )


def id_dtype(layers: Sequence[TraceLayer]) -> tuple[type[np.generic], int]:
    """Dtype in which a trace holds the ids of these layers, and the value there that means no expert."""
    if max(layer.experts for layer in layers) <= _NO_EXPERT_IN_BYTES:
        return np.uint8, _NO_EXPERT_IN_BYTES
    return np.int16, NO_EXPERT


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
