"""The file format: what is written is read, entry by entry; what is not whole is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from traces import equal, header, trace

from vllm_hlwq.errors import TraceError
from vllm_hlwq.trace import STATES, Trace

HEADER = header([(16, 2), (16, 2)], cache_size=4)
STEPS = [(0, [[3, 1], [-1, -1]]), (1, [[15, 0], [-1, -1]]), (0, [[2, 3]]), (1, [[0, 1]]), (1, [[5, 6]])]


def test_an_entry_holds_step_layer_tokens_and_ids() -> None:
    made = trace(HEADER, STEPS)
    assert made.step.tolist() == [0, 0, 1, 1, 2]  # a layer that does not follow a lower one begins a forward pass
    assert made.layer.tolist() == [0, 1, 0, 1, 1]
    assert made.tokens.tolist() == [2, 2, 1, 1, 1]
    assert made.expert_ids.tolist() == [3, 1, 255, 255, 15, 0, 255, 255, 2, 3, 0, 1, 5, 6]
    assert made.expert_ids.dtype == np.uint8
    assert (made.num_steps, made.nbytes) == (3, 5 * 10 + 14)


def test_a_file_gives_back_every_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    made = trace(HEADER, STEPS)
    made.save(path)
    read = Trace.load(path)
    assert equal(read, made)
    for layer in (0, 1):
        assert [ids.tolist() for ids in read.steps_of(layer)] == [rows for of, rows in STEPS if of == layer]
    assert os.listdir(tmp_path) == [path.name]


@given(st.data())
def test_any_layers_and_steps_come_back(data: st.DataObject) -> None:
    """Layers may have other numbers of experts and other top-k; 256 experts and more take two bytes an id."""
    layer_shape = st.tuples(st.sampled_from([1, 255, 256, 1023]), st.integers(1, 3))
    layers = data.draw(st.lists(layer_shape, min_size=1, max_size=3))
    steps = []
    for _ in range(data.draw(st.integers(0, 6))):
        layer = data.draw(st.integers(0, len(layers) - 1))
        experts, top_k = layers[layer]
        row = st.lists(st.integers(-1, experts - 1), min_size=top_k, max_size=top_k)
        steps.append((layer, data.draw(st.lists(row, max_size=4))))
    made = trace(header(layers), steps)
    assert made.expert_ids.dtype == (np.uint8 if max(experts for experts, _ in layers) <= 255 else np.int16)
    for layer in range(len(layers)):
        assert [ids.tolist() for ids in made.steps_of(layer)] == [rows for of, rows in steps if of == layer]


def test_an_empty_trace_has_no_steps(tmp_path: Path) -> None:
    trace(HEADER, []).save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").num_steps == 0


def spoil(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a trace's tensors and header."""
    trace(HEADER, STEPS).save(path)
    tensors, head = load_file(path), json.loads(HEADER.model_dump_json())
    change(tensors, head)
    save_file(tensors, path, metadata={"trace": json.dumps(head)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.update(expert_ids=t["expert_ids"][:-1]), "13 expert ids, but its entries need 14"),
        (lambda t, h: t.update(tokens=t["tokens"][:-1]), r"tensor tokens is int32\[4\]"),
        (lambda t, h: t.update(step=t["step"].astype(np.int64)), r"tensor step is int64\[5\]"),
        (lambda t, h: t.update(expert_ids=t["expert_ids"].astype(np.float32)), "tensor expert_ids is float32"),
        (lambda t, h: t["layer"].__setitem__(0, 2), "an entry is of none of the 2 layers"),
        (lambda t, h: t["expert_ids"].__setitem__(0, 16), "expert id 16 is none of its layer's"),
        (lambda t, h: t.pop("step"), "not a trace of expert routing"),
        (lambda t, h: h.update(version=2), "header field version=2: "),
        (lambda t, h: h.update(state="lost"), "header field state='lost': "),
        (lambda t, h: h.pop("model"), "header field model="),
        (lambda t, h: h.update(layers=[]), r"header field layers="),
        (lambda t, h: h["layers"][0].update(experts=10**6), r"header field layers.0.experts=1000000: "),
        (lambda t, h: h["layers"][0].update(top_k=0), r"header field layers.0.top_k=0: "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "trace.safetensors"
    spoil(path, change)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(path)
    assert str(path) in str(caught.value)
    assert "record" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no such file"):
        Trace.load(tmp_path / "absent")
    path = tmp_path / "other"
    for content in (b"", b"text, no safetensors at all", b"\x08" + b"\0" * 7 + b"{}      "):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"not a trace of expert routing"):
            Trace.load(path)
    trace(HEADER, STEPS).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TraceError, match=r"not a trace of expert routing"):
        Trace.load(path)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.safetensors"
    trace(HEADER, STEPS).save(path)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trace(HEADER, STEPS[:1]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_every_state_is_explained() -> None:
    for state in STATES:
        assert header([(2, 1)], state=state).state == state
