"""Any damage to a checkpoint is refused in our words or does no harm: no other error, no hang, and no changed weights.

Flips and cuts go to every file of a folder that our writer made; edits of the JSON, headers included, go further than
flips can. Files without sums cannot promise the weights, but everything else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hlwq_files import CONFIG, STATE, Tensors, edit_json, polar_state, read_all, underscored, write_json, write_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_hlwq.checkpoint.inspect import inspect
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SMALL = {
    "model.embed_tokens.weight": (8, 64), "model.layers.0.mlp.experts.down_proj": (2, 4, 128),
    "model.layers.0.self_attn.q_proj.weight": (4, 136), "model.norm.weight": (64,),
}  # fmt: skip
Damage = Callable[[Path], object]


def small_model() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SMALL.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, index, sums and lists."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("fuzz") / "ours"
    save_file(small_model(), base / "model.safetensors")
    write_json(base / "config.json", CONFIG | {"hidden_size": 64, "num_experts": 2})
    quantize(base, out, shard_bytes=2000)
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


@pytest.fixture(scope="module")
def original(ours: Path) -> Tensors:
    return read_all(HlwqSource(ours))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``polar_state.safetensors``: coded tensors alone, without sums."""
    stored, _ = polar_state(small_model(), underscored, names=tuple(SMALL)[:3])
    folder = write_state(tmp_path_factory.mktemp("state"), stored)
    write_json(
        folder / "hlwq_config.json", {"method": "hlwq", "bits": 5, "block_size": 128, "head_dim": 64, "stats": {}}
    )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_file(small_model(), folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | {"hidden_size": 64, "num_experts": 2})
    return folder


@contextmanager
def damaged(folder: Path, file: str, damage: Damage) -> Iterator[Path]:
    """A copy of a folder with one file damaged."""
    with tempfile.TemporaryDirectory() as parent:
        copy = Path(shutil.copytree(folder, Path(parent) / "copy"))
        damage(copy / file)
        yield copy


def assert_refused_or_equal(folder: Path, original: Tensors) -> None:
    try:
        found = read_all(HlwqSource(folder))
    except CheckpointError:
        return
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)


def assert_refused_or_read(folder: Path, base: Path | None) -> None:
    """A reader that gets through gives finite weights of the shapes that it announced."""
    try:
        source = HlwqSource(folder, base, "A")
        found = read_all(source)
        inspect(folder, base, "A")
    except CheckpointError:
        return
    for name, parameter in source.parameters.items():
        assert found[name].shape == parameter.shape
        assert found[name].isfinite().all()


# Damage to bytes


@st.composite
def byte_damage(draw: st.DrawFn) -> Damage:
    """Bytes changed, cut off, put in or taken out, as often in the first kilobyte as in all the rest."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove", "swap"]))
    near = draw(st.booleans())
    place, second = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    patch = draw(st.binary(min_size=1, max_size=8))

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        size = min(len(content), 1024) if near else len(content)
        at, other = int(place * size), int(second * size)
        if kind == "flip":
            for offset, value in enumerate(patch[: 1 + patch[0] % 3]):
                content[(at + offset) % len(content)] ^= value or 1
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = patch
        elif kind == "remove":
            del content[at : at + len(patch)]
        else:
            content[at], content[other] = content[other], content[at]
        path.unlink()
        path.write_bytes(content)

    return damage


OUR_FILES = (
    "model-00001", "model-00002", "config.json", "hlwq_config.json", "hlwq_sha256.json", "model.safetensors.index.json",
)  # fmt: skip


def file_of(folder: Path, start: str) -> str:
    return next(path.name for path in sorted(folder.iterdir()) if path.name.startswith(start))


@pytest.mark.parametrize("file", OUR_FILES)
@settings(FUZZ, max_examples=70)
@given(damage=byte_damage())
def test_damaged_bytes_never_change_weights_unnoticed(file: str, damage: Damage, ours: Path, original: Tensors) -> None:
    with damaged(ours, file_of(ours, file), damage) as folder:
        assert_refused_or_equal(folder, original)


@pytest.mark.parametrize("file", [STATE, "hlwq_config.json"])
@settings(FUZZ, max_examples=100)
@given(damage=byte_damage(), with_base=st.booleans())
def test_damaged_bytes_without_sums(file: str, damage: Damage, with_base: bool, state: Path, base: Path) -> None:
    with damaged(state, file, damage) as folder:
        assert_refused_or_read(folder, base if with_base else None)


def test_every_single_bit_of_a_coded_tensor_and_its_header_counts(ours: Path, original: Tensors) -> None:
    """A flip every 37 bytes through both shards, of a different bit each time."""
    for file in ("model-00001", "model-00002"):
        name = file_of(ours, file)
        for at in range(0, (ours / name).stat().st_size, 37):

            def flip(path: Path, at: int = at) -> None:
                content = bytearray(path.read_bytes())
                content[at] ^= 1 << at % 8
                path.write_bytes(content)

            with damaged(ours, name, flip) as folder:
                assert_refused_or_equal(folder, original)


# Damage to JSON

VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), "", "model.norm.weight", "../x",
     "F16", "I64", "\ud800", [], {}, [0, 0], [-1, 5], [[1]],
     {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}]
)  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def json_damage(draw: st.DrawFn) -> Callable[[Any], None]:
    """A value replaced, removed, moved to another key, or exchanged with a like one elsewhere."""
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "exchange"]))
    place, second = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    value, key = draw(VALUES), draw(st.sampled_from(["", "x__packed", "a_e999999__meta", "a.codes", "b" * 200, "\0"]))

    def damage(content: Any) -> None:
        paths = list(places(content))
        if not paths:
            return
        *path, last = paths[int(place * len(paths))]
        parent = content
        for step in path:
            parent = parent[step]
        if kind == "replace":
            parent[last] = value
        elif kind == "remove":
            del parent[last]
        elif kind == "rename" and isinstance(parent, dict):
            parent[key] = parent.pop(last)
        elif isinstance(parent, (dict, list)):
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            other = keys[int(second * len(keys))]
            parent[last], parent[other] = parent[other], parent[last]

    return damage


def edit_header(file: Path, change: Callable[[Any], None]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.unlink()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def edit(file: Path, change: Callable[[Any], None]) -> None:
    (edit_header if file.suffix == ".safetensors" else edit_json)(file, change)


@pytest.mark.parametrize("file", OUR_FILES)
@settings(FUZZ, max_examples=70)
@given(change=json_damage())
def test_edited_json_never_changes_weights_unnoticed(
    file: str, change: Callable[[Any], None], ours: Path, original: Tensors
) -> None:
    with damaged(ours, file_of(ours, file), lambda path: edit(path, change)) as folder:
        assert_refused_or_equal(folder, original)


@pytest.mark.parametrize("file", [STATE, "hlwq_config.json"])
@settings(FUZZ, max_examples=100)
@given(change=json_damage(), with_base=st.booleans())
def test_edited_json_without_sums(
    file: str, change: Callable[[Any], None], with_base: bool, state: Path, base: Path
) -> None:
    with damaged(state, file, lambda path: edit(path, change)) as folder:
        assert_refused_or_read(folder, base if with_base else None)


@settings(FUZZ, max_examples=30)
@given(change=json_damage())
def test_an_edited_configuration_that_transformers_must_build(
    change: Callable[[Any], None], gemma4_small: Path
) -> None:
    """Widths that the file does not state are asked of the architecture, whatever config.json says."""
    with damaged(gemma4_small, "config.json", lambda path: edit(path, change)) as folder:
        assert_refused_or_read(folder, None)


@pytest.fixture(scope="module")
def gemma4_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4")
    weight = {"model.layers.0.self_attn.q_proj.weight": torch.randn(128, 128).bfloat16()}
    write_state(folder, polar_state(weight, meta=4, names=tuple(weight))[0])
    write_json(folder / "config.json", checkpoints.gemma4_config().to_diff_dict())
    return folder
