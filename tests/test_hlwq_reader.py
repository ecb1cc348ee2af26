"""The reader takes every published form of HLWQ files; what it decodes is compared with the definition, in float64."""

from __future__ import annotations

import math
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
    pack_lsb,
    pack_msb,
    polar_state,
    read_all,
    slice_inside,
    slice_suffix,
    table,
    underscored,
    weights,
    write_base,
    write_json,
)
from hlwq_vectors import WORKED_CODES, WORKED_LSB, WORKED_MSB, WORKED_NIBBLES
from safetensors.torch import load_file, save_file

from vllm_hlwq.checkpoint.inspect import inspect
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource, is_hlwq
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.errors import CheckpointError

EXPERT_ROWS = 3 * 136
LINEAR = "layer.q_proj"
WORKED = [int(code) for code in WORKED_CODES.split()]
WORKED_NORM = 0x4A13


@pytest.fixture(scope="module")
def model() -> Tensors:
    return weights()


@pytest.fixture(scope="module")
def base(model: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), model)


@pytest.fixture(scope="module")
def complete(model: Tensors, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our writer's form, in several shards."""
    out = tmp_path_factory.mktemp("ours") / "hlwq"
    quantize(base, out, shard_bytes=12_000)
    return out


def write_state(folder: Path, stored: Tensors) -> Path:
    save_file(stored, folder / STATE)
    return folder


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
    base: Path,
    tmp_path: Path,
) -> None:
    stored, exact = polar_state(model, spell, slices, meta)
    source = HlwqSource(write_state(tmp_path, stored), base, "A")
    assert_model(source, exact, model)
    assert source.config() == CONFIG


def test_the_published_names_are_taken_literally(model: Tensors, base: Path, tmp_path: Path) -> None:
    stored, _ = polar_state(model)
    assert "model__layers__0__mlp__experts__gate_up_proj_e2__packed" in stored
    assert "model__layers__0__self_attn__q_proj__weight__norms" in stored
    assert is_hlwq(write_state(tmp_path, stored))
    assert not is_hlwq(base)


def test_gate_and_up_stored_apart_make_the_fused_stack_again(model: Tensors, base: Path, tmp_path: Path) -> None:
    """The first half of the rows is gate."""
    stored, exact = polar_state(model, names=(EMBEDDING, Q_PROJ, O_PROJ, DOWN))
    halves = []
    for expert, both in enumerate(model[GATE_UP]):
        for projection, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
            coded = Coded.of(half, table("A"))
            stored |= coded.packed(f"model.layers.0.mlp.experts.{expert}.{projection}", meta=4)
            halves.append(coded.exact)
    exact[GATE_UP] = torch.cat(halves).view(model[GATE_UP].shape)
    assert_model(HlwqSource(write_state(tmp_path, stored), base, "A"), exact, model)


def test_rows_of_any_range_are_those_of_the_whole(model: Tensors, base: Path, tmp_path: Path) -> None:
    stored, _ = polar_state(model)
    source = HlwqSource(write_state(tmp_path, stored), base, "A")
    whole = read_all(source)[GATE_UP].reshape(-1, 136)
    for start, stop in ((0, 24), (3, 5), (7, 9), (5, 22), (23, 24)):
        assert torch.equal(source.rows(GATE_UP, start, stop), whole[start:stop])


def test_a_single_file_is_read_without_its_folder(model: Tensors, base: Path, tmp_path: Path) -> None:
    stored, exact = polar_state(model)
    (tmp_path / "notes.txt").write_text("not a model")
    assert_model(HlwqSource(write_state(tmp_path, stored) / STATE, base, "A"), exact, model)


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


def test_our_files_are_complete_and_sharded(complete: Path, model: Tensors) -> None:
    stored = {name: tensor for file in complete.glob("*.safetensors") for name, tensor in load_file(file).items()}
    levels = stored["hlwq.codebook"].double().numpy()
    assert len(list(complete.glob("*.safetensors"))) > 2
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
    source = HlwqSource(complete)
    assert source.table_origin == "stored"
    assert_model(source, exact, model)


def test_without_our_lists_the_same_weights_are_read(complete: Path, tmp_path: Path) -> None:
    for file in complete.iterdir():
        if not file.name.startswith("hlwq_"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    ours, foreign = read_all(HlwqSource(complete)), read_all(HlwqSource(tmp_path))
    assert ours.keys() == foreign.keys()
    assert all(torch.equal(ours[name], foreign[name]) for name in ours)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7, 8])
def test_other_widths_that_we_write(bits: int, base: Path, model: Tensors, tmp_path: Path) -> None:
    quantize(base, tmp_path / "out", bits=bits)
    found = read_all(HlwqSource(tmp_path / "out"))[O_PROJ].double()
    wanted = model[O_PROJ].double()
    error = ((found - wanted).square().sum() / wanted.square().sum()).item()
    # The optimum's error on a normal density falls by about 4 a bit; the gain and the search take some of it.
    optimum = {2: 0.1175, 3: 0.0345478, 4: 0.009501, 6: 0.0006442, 7: 0.00017, 8: 0.0000412}[bits]
    assert 0.7 * optimum < error < 1.15 * optimum


def test_a_folder_is_described(complete: Path, model: Tensors) -> None:
    found = inspect(complete)
    assert (found["format"], found["bits"], found["block_size"], found["codebook"]) == ("hlwq", [5], 128, "stored")
    assert {p["name"]: tuple(p["shape"]) for p in found["parameters"]} == {n: tuple(t.shape) for n, t in model.items()}
    assert found["bytes_in_16_bit"] == 2 * sum(tensor.numel() for tensor in model.values())
    q_proj = next(p for p in found["parameters"] if p["name"] == Q_PROJ)
    assert (q_proj["stored"], q_proj["bytes"]) == ("Q5", 6 * 2 * (80 + 2) + 5 * 8)
    assert found["missing"] == []


# Codebooks


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_a_given_codebook_is_used(name: str, model: Tensors, base: Path, tmp_path: Path) -> None:
    stored, exact = polar_state(model, codebook=name)
    source = HlwqSource(write_state(tmp_path, stored), base, name)
    assert source.table_origin == f"{name}, given"
    assert_model(source, exact, model)


def gaussian_state(folder: Path, name: str | None, rows: int) -> Path:
    """Codes of normal blocks by table ``name``, or uniform ones."""
    generator = np.random.default_rng(7)
    if name is None:
        codes = generator.integers(0, 32, (rows, 1, 128), dtype=np.uint8)
    else:
        blocks = generator.standard_normal((rows, 1, 128), dtype=np.float32)
        z = blocks / np.linalg.norm(blocks, axis=-1, keepdims=True) * np.float32(math.sqrt(128))
        levels = table(name)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, z).astype(np.uint8)
    coded = Coded(codes, np.ones((rows, 1), np.float16), torch.empty(0, 128))
    return write_state(folder, coded.packed(LINEAR))


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_codebook_is_told_from_ten_million_codes(name: str, tmp_path: Path) -> None:
    source = HlwqSource(gaussian_state(tmp_path, name, 78_125))
    assert source.table_origin == f"{name}, detected"
    assert source.table(5).numpy() == pytest.approx(table(name), abs=6e-7)


def test_too_few_codes_tell_no_codebook(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*9999872 codes are too few .* give --codebook A, B or C"):
        HlwqSource(gaussian_state(tmp_path, "A", 78_124))


def test_codes_that_fit_no_codebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fit no single one of A, B and C .*0\.062\d+.* give --codebook"):
        HlwqSource(gaussian_state(tmp_path, None, 78_125))


def test_a_codebook_given_for_a_file_that_stores_one_is_refused(complete: Path) -> None:
    with pytest.raises(CheckpointError, match="stores its own codebook; leave --codebook B out"):
        HlwqSource(complete, codebook_name="B")


# The specification's block, byte by byte, and the older forms


def worked_tensors(form: str) -> Tensors:
    """The worked block, as the bytes that the specification prints, twice: two rows."""
    codes = np.array([WORKED, WORKED], dtype=np.uint8)
    norms = torch.tensor([[WORKED_NORM]] * 2, dtype=torch.int16).view(torch.float16)
    printed = {"msb": WORKED_MSB, "lsb": WORKED_LSB, "nibbles": WORKED_NIBBLES}
    if form in printed:
        row = torch.tensor(list(bytes.fromhex(printed[form])), dtype=torch.uint8)
    if form == "msb":
        meta = torch.tensor([2, 1, 128, 256, 128])
        return {f"{LINEAR}__packed": row.repeat(2), f"{LINEAR}__norms": norms, f"{LINEAR}__meta": meta}
    stored = torch.from_numpy(codes).to(torch.int8) if form == "codes" else row.repeat(2, 1)
    levels = torch.from_numpy(table("A", 4 if form == "nibbles" else 5)).float()
    return {f"{LINEAR}.codes": stored, f"{LINEAR}.norms": norms, f"{LINEAR}.ct": levels}


DECODED_A = [0.193381, 0.399463, 0.783837, 0.989884]
DECODED_B = [0.195968, 0.400387, 0.768413, 0.972806]


@pytest.fixture
def worked_base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", {f"{LINEAR}.weight": torch.zeros(2, 128, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("form", "name", "decoded"),
    [("msb", "A", DECODED_A), ("msb", "B", DECODED_B), ("codes", None, DECODED_A), ("lsb", None, DECODED_A)],
)
def test_the_worked_block(form: str, name: str, decoded: list[float], worked_base: Path, tmp_path: Path) -> None:
    source = HlwqSource(write_state(tmp_path, worked_tensors(form)), worked_base, name)
    row = source.rows(f"{LINEAR}.weight", 1, 2)[0, :4]
    assert row.tolist() == torch.tensor(decoded).bfloat16().tolist()


def test_the_worked_block_in_nibbles(worked_base: Path, tmp_path: Path) -> None:
    """Its four-bit codes, read off the printed bytes here, by the definition."""
    halves = np.frombuffer(bytes.fromhex(WORKED_NIBBLES), dtype=np.uint8)
    codes = np.concatenate([halves & 15, halves >> 4]).reshape(1, 1, 128)
    norms = np.array([[WORKED_NORM]], dtype=np.int16).view(np.float16)
    source = HlwqSource(write_state(tmp_path, worked_tensors("nibbles")), worked_base)
    found = source.rows(f"{LINEAR}.weight", 0, 2)
    for row in found:
        assert_decoded(row.unsqueeze(0), decode(codes, norms, table("A", 4), 128))


@pytest.mark.parametrize("packed", ["00443214c7", "f83e0f83e0", "0888887eaa", "ad6b5ad6b5"])
def test_packing_vectors_through_whole_files(packed: str, tmp_path: Path) -> None:
    """Each vector fills a block; its codes are told apart by a table of one-hot rotations: the block decodes to H c."""
    expected = {"00443214c7": range(8), "f83e0f83e0": [31, 0] * 4, "0888887eaa": [1, 2, 4, 8, 16, 31, 21, 10],
                "ad6b5ad6b5": [21] * 8}[packed]  # fmt: skip
    codes = np.tile(np.array(list(expected), dtype=np.uint8), 16).reshape(1, 1, 128)
    stored = Coded(codes, np.ones((1, 1), np.float16), decode(codes, np.ones((1, 1)), table("C"), 128))
    tensors = stored.packed(LINEAR) | {
        f"{LINEAR}__packed": torch.tensor(list(bytes.fromhex(packed * 16)), dtype=torch.uint8)
    }
    source = HlwqSource(write_state(tmp_path, tensors), codebook_name="C")
    assert_decoded(source.rows(f"{LINEAR}.weight", 0, 1), stored.exact)


def legacy(weight: torch.Tensor, bits: int, form: str, scaled: bool, block_size: int) -> tuple[Tensors, torch.Tensor]:
    levels = table("B", bits)
    coded = Coded.of(weight, levels, block_size)
    rows = len(weight)
    if form == "int8":
        codes = torch.from_numpy(coded.codes).view(rows, -1).to(torch.int8)
    elif form == "lsb":
        codes = pack_lsb(coded.codes, bits).view(rows, -1)
    else:
        low, high = np.split(coded.codes, 2, axis=-1)
        codes = torch.from_numpy(high << 4 | low).view(rows, -1)
    stored = torch.from_numpy(levels / math.sqrt(block_size) if scaled else levels).float()
    return {
        f"{LINEAR}.codes": codes.contiguous(),
        f"{LINEAR}.norms": torch.from_numpy(coded.norms),
        f"{LINEAR}.{'ct_scaled' if scaled else 'ct'}": stored,
    }, coded.exact


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("bits", "form"), [(2, "int8"), (3, "int8"), (5, "int8"), (6, "int8"), (3, "nibbles"),
                                            (4, "nibbles"), (5, "lsb")])  # fmt: skip
def test_older_files(bits: int, form: str, scaled: bool, block_size: int, tmp_path: Path) -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(bits)).bfloat16()
    stored, exact = legacy(weight, bits, form, scaled, block_size)
    base = write_base(tmp_path / "base", {f"{LINEAR}.weight": weight})
    write_json(
        tmp_path / "polar_config.json",
        {"format": "polar_engine_v5", "block_size": block_size, "bit_assignment": {LINEAR: bits}, "layers": [LINEAR]},
    )
    source = HlwqSource(write_state(tmp_path, stored), base)
    assert source.table_origin == "stored"
    assert_decoded(source.rows(f"{LINEAR}.weight", 0, 5), exact)


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
    file: str, content: dict[str, object], model: Tensors, base: Path, tmp_path: Path
) -> None:
    stored, exact = polar_state(model)
    write_json(tmp_path / file, content)
    source = HlwqSource(write_state(tmp_path, stored), base, "A")
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


def test_empty_and_scalar_tensors_are_kept(base: Path, model: Tensors, tmp_path: Path) -> None:
    stored, _ = polar_state(model, names=(Q_PROJ,))
    stored |= {"layer.scalar": torch.tensor(2.5), "layer.none": torch.empty(0), "layer.flat": torch.empty(0, 4)}
    source = HlwqSource(write_state(tmp_path, stored), base, "A")
    found = read_all(source)
    assert found["layer.scalar"].item() == 2.5
    assert found["layer.none"].shape == (0,)
    assert found["layer.flat"].shape == (0, 4)


def test_msb_and_lsb_are_the_printed_ones() -> None:
    """The oracle of these tests against the specification."""
    codes = np.array(WORKED, dtype=np.uint8)
    assert bytes(pack_msb(codes, 5).tolist()).hex() == WORKED_MSB
    assert bytes(pack_lsb(codes, 5).tolist()).hex() == WORKED_LSB
