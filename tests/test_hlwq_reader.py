"""The reader takes every published form of HLWQ files; what it decodes is compared with the definition, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from hlwq_files import (
    CODED,
    CONFIG,
    DOWN,
    EMBEDDING,
    GATE_UP,
    O_PROJ,
    Q_PROJ,
    SPELLINGS,
    STATE,
    Coded,
    Tensors,
    assert_decoded,
    decode,
    polar_state,
    read_all,
    slice_inside,
    slice_suffix,
    table,
    underscored,
    weights,
    write_base,
    write_json,
    write_state,
)
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint.inspect import inspect
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource, is_hlwq
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.errors import CheckpointError

EXPERT_ROWS = 3 * 136
LINEAR = "layer.q_proj"


@pytest.fixture(scope="module")
def model() -> Tensors:
    return weights()


def assert_model(source: HlwqSource, exact: Tensors, model: Tensors) -> None:
    """Coded parameters decode to ``exact``; the others are the model's own."""
    found = read_all(source)
    assert found.keys() == model.keys()
    for name, tensor in found.items():
        if name in exact:
            assert_decoded(tensor, exact[name])
        else:
            assert torch.equal(tensor, model[name])


@pytest.mark.parametrize("meta", [4, 5])
@pytest.mark.parametrize("slices", [slice_suffix, slice_inside])
@pytest.mark.parametrize("spell", SPELLINGS)
def test_every_spelling_with_a_base_model(
    spell: Callable[[str], str],
    slices: Callable[[str, int], str],
    meta: int,
    model: Tensors,
    hlwq_base: Path,
    tmp_path: Path,
) -> None:
    stored, exact = polar_state(model, spell, slices, meta)
    source = HlwqSource(write_state(tmp_path, stored), hlwq_base, "A")
    assert_model(source, exact, model)
    assert source.config() == CONFIG


def test_the_published_names_are_taken_literally(model: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    stored, _ = polar_state(model)
    assert "model__layers__0__mlp__experts__gate_up_proj_e2__packed" in stored
    assert "model__layers__0__self_attn__q_proj__weight__norms" in stored
    assert is_hlwq(write_state(tmp_path, stored))
    assert not is_hlwq(hlwq_base)


def test_gate_and_up_stored_apart_make_the_fused_stack_again(model: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    """The first half of the rows is gate."""
    stored, exact = polar_state(model, names=(EMBEDDING, Q_PROJ, O_PROJ, DOWN))
    halves = []
    for expert, both in enumerate(model[GATE_UP]):
        for projection, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
            coded = Coded.of(half, table("A"))
            stored |= coded.packed(f"model.layers.0.mlp.experts.{expert}.{projection}", meta=4)
            halves.append(coded.exact)
    exact[GATE_UP] = torch.cat(halves).view(model[GATE_UP].shape)
    assert_model(HlwqSource(write_state(tmp_path, stored), hlwq_base, "A"), exact, model)


def test_rows_of_any_range_are_those_of_the_whole(model: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    stored, _ = polar_state(model)
    source = HlwqSource(write_state(tmp_path, stored), hlwq_base, "A")
    whole = read_all(source)[GATE_UP].reshape(-1, 136)
    for start, stop in ((0, 24), (3, 5), (7, 9), (5, 22), (23, 24)):
        assert torch.equal(source.rows(GATE_UP, start, stop), whole[start:stop])


def test_a_single_file_is_read_without_its_folder(model: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    stored, exact = polar_state(model)
    (tmp_path / "notes.txt").write_text("not a model")
    assert_model(HlwqSource(write_state(tmp_path, stored) / STATE, hlwq_base, "A"), exact, model)


def test_without_a_base_what_is_lacking_is_named(model: Tensors, tmp_path: Path) -> None:
    stored, exact = polar_state(model)
    source = HlwqSource(write_state(tmp_path, stored), codebook_name="A")
    assert source.missing() == ["the norms and routers"]
    assert source.parameters.keys() == set(CODED)
    assert_decoded(source.rows(DOWN, 0, EXPERT_ROWS), exact[DOWN].view(EXPERT_ROWS, -1))


def test_without_a_base_the_architecture_names_what_is_lacking(gemma4_bf16: Path, tmp_path: Path) -> None:
    """Also the widths that 4-element meta leaves out, and the embedding's name of a tied head."""
    original = load_file(gemma4_bf16 / "model.safetensors")
    stem = "model.layers.0"
    coded = {f"{stem}.self_attn.o_proj.weight": "o", f"{stem}.experts.down_proj": "d"}
    stored, exact = polar_state(original, meta=4, names=tuple(coded))
    head = Coded.of(original[EMBEDDING], table("A"))
    stored |= head.packed("lm_head__weight", meta=4)
    (tmp_path / "config.json").write_text((gemma4_bf16 / "config.json").read_text())
    source = HlwqSource(write_state(tmp_path, stored), codebook_name="A")
    assert source.parameters.keys() == {*coded, EMBEDDING}
    assert_decoded(source.rows(EMBEDDING, 0, 512), head.exact)
    experts = f"{stem}.experts.down_proj"
    assert source.parameters[experts].shape == (checkpoints.NUM_EXPERTS, 128, 192)
    assert_decoded(source.rows(experts, 0, 16 * 128).view(16, 128, 192), exact[experts])
    assert source.missing() == sorted(set(original) - {*coded, EMBEDDING})


def test_without_a_base_widths_must_be_known(model: Tensors, tmp_path: Path) -> None:
    stored, _ = polar_state(model, meta=4, names=(Q_PROJ,))
    with pytest.raises(CheckpointError, match=rf"{STATE}: .*q_proj__weight is stored as 2 blocks .* --base-model"):
        HlwqSource(write_state(tmp_path, stored), codebook_name="A")


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("coded", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_is_found_under_either_name(coded: str, kept: str, model: Tensors, tmp_path: Path) -> None:
    names = {"embed_tokens": EMBEDDING, "lm_head": "lm_head.weight"}
    model = {names[kept] if name == EMBEDDING else name: tensor for name, tensor in model.items()}
    (tmp_path / "state").mkdir()
    exact = Coded.of(model[names[kept]], table("A"))
    state = write_state(tmp_path / "state", exact.packed(underscored(names[coded])))
    source = HlwqSource(state, write_base(tmp_path / "base", model), "A")
    assert_model(source, {names[kept]: exact.exact}, model)


def test_an_untied_head_is_not_taken_for_the_embedding(model: Tensors, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    state = write_state(tmp_path / "state", Coded.of(model[EMBEDDING], table("A")).packed("lm_head"))
    base = write_base(tmp_path / "base", model, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head is coded, but the base model .* has no such parameter"):
        HlwqSource(state, base, "A")


# Our own files


def test_our_files_are_complete_and_sharded(hlwq_coded: Path, model: Tensors) -> None:
    stored = {name: tensor for file in hlwq_coded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    levels = stored["hlwq.codebook"].double().numpy()
    assert len(list(hlwq_coded.glob("*.safetensors"))) > 2
    exact = {}
    for name in CODED:
        bases = [name] if model[name].ndim == 2 else [slice_suffix(name, expert) for expert in range(3)]
        parts = []
        for key in bases:
            rows, blocks, size, _, columns = stored[f"{key}__meta"].tolist()
            digits = np.unpackbits(stored[f"{key}__packed"].numpy()).reshape(rows, blocks, size, 5)
            codes = digits @ (1 << np.arange(4, -1, -1))
            parts.append(decode(codes, stored[f"{key}__norms"].numpy(), levels, columns))
        exact[name] = torch.stack(parts).view(model[name].shape)
    source = HlwqSource(hlwq_coded)
    assert source.table_origin == "stored"
    assert_model(source, exact, model)


def test_without_our_lists_the_same_weights_are_read(hlwq_coded: Path, tmp_path: Path) -> None:
    for file in hlwq_coded.iterdir():
        if not file.name.startswith("hlwq_"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    ours, foreign = read_all(HlwqSource(hlwq_coded)), read_all(HlwqSource(tmp_path))
    assert ours.keys() == foreign.keys()
    assert all(torch.equal(ours[name], foreign[name]) for name in ours)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8])
def test_other_widths_that_we_write(bits: int, hlwq_base: Path, model: Tensors, tmp_path: Path) -> None:
    quantize(hlwq_base, tmp_path / "out", bits=bits)
    found = read_all(HlwqSource(tmp_path / "out"))[O_PROJ].double()
    wanted = model[O_PROJ].double()
    error = ((found - wanted).square().sum() / wanted.square().sum()).item()
    # The optimum's error on a normal density falls by about 4 a bit; the gain and the search take some of it.
    optimum = {2: 0.1175, 3: 0.0345478, 4: 0.009501, 6: 0.0006442, 7: 0.00017, 8: 0.0000412}[bits]
    assert 0.7 * optimum < error < 1.15 * optimum


def test_a_folder_is_described(hlwq_coded: Path, model: Tensors) -> None:
    found = inspect(hlwq_coded)
    assert (found["format"], found["bits"], found["block_size"], found["codebook"]) == ("hlwq", [5], 128, "stored")
    assert {p["name"]: tuple(p["shape"]) for p in found["parameters"]} == {n: tuple(t.shape) for n, t in model.items()}
    assert found["bytes_in_16_bit"] == 2 * sum(tensor.numel() for tensor in model.values())
    q_proj = next(p for p in found["parameters"] if p["name"] == Q_PROJ)
    assert (q_proj["stored"], q_proj["bytes"]) == ("Q5", 6 * 2 * (80 + 2) + 5 * 8)
    assert found["missing"] == []


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_a_given_codebook_is_used(name: str, model: Tensors, hlwq_base: Path, tmp_path: Path) -> None:
    stored, exact = polar_state(model, codebook=name)
    source = HlwqSource(write_state(tmp_path, stored), hlwq_base, name)
    assert source.table_origin == f"{name}, given"
    assert_model(source, exact, model)


def test_a_codebook_given_for_a_file_that_stores_one_is_refused(hlwq_coded: Path) -> None:
    with pytest.raises(CheckpointError, match="stores its own codebook; leave --codebook B out"):
        HlwqSource(hlwq_coded, codebook_name="B")


# What the JSON says


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("hlwq_config.json", {"method": "hlwq", "bits": 5, "block_size": 128, "head_dim": 256, "stats": {"n": 7887}}),
        ("config.json", CONFIG | {"quantization_config": {"quant_method": "polarengine", "bits": 5}}),
        ("config.json", CONFIG | {"quantization_config": {"quant_method": "polar", "block_size": 128}}),
    ],
)
def test_metadata_of_other_tools_is_taken(
    file: str, content: dict[str, object], model: Tensors, hlwq_base: Path, tmp_path: Path
) -> None:
    stored, exact = polar_state(model)
    write_json(tmp_path / file, content)
    source = HlwqSource(write_state(tmp_path, stored), hlwq_base, "A")
    assert_model(source, exact, model)
    assert source.config() == CONFIG


@pytest.mark.parametrize("width", [640, 1152, 19280])
def test_a_header_that_starts_like_a_pickle_is_read(width: int, tmp_path: Path) -> None:
    """A header's length comes first: of 640 bytes it is the start of a pickle, of 19,280 that of a zip file."""
    save_file({"a": torch.arange(4.0)}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(width)
    (tmp_path / "m.safetensors").write_bytes(width.to_bytes(8, "little") + header + content[8 + length :])
    assert TensorFolder(tmp_path).tensor("a").tolist() == [0, 1, 2, 3]


def test_empty_and_scalar_tensors_are_kept(hlwq_base: Path, model: Tensors, tmp_path: Path) -> None:
    stored, _ = polar_state(model, names=(Q_PROJ,))
    stored |= {"layer.scalar": torch.tensor(2.5), "layer.none": torch.empty(0), "layer.flat": torch.empty(0, 4)}
    source = HlwqSource(write_state(tmp_path, stored), hlwq_base, "A")
    found = read_all(source)
    assert found["layer.scalar"].item() == 2.5
    assert found["layer.none"].shape == (0,)
    assert found["layer.flat"].shape == (0, 4)
