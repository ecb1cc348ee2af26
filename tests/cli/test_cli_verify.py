"""``hlwq verify`` and ``hlwq inspect``: what they find, measure and say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from commands import change, fails, succeeds
from safetensors.torch import load_file, save_file


def test_verify_measures_the_error(source: Path, coded: Path, int4: Path) -> None:
    report = json.loads(succeeds("verify", coded, "--reference", source, "--json"))
    stated = json.loads((coded / "hlwq_config.json").read_text())
    assert report["format"] == "hlwq"
    assert report["hashes_checked"] is True
    assert report["relative_mse"] == pytest.approx(stated["relative_mse"], rel=0.01)
    assert report["identical"] == len(stated["kept"])
    assert report["errors"].keys() == stated["coded"].keys()
    for name, error in report["errors"].items():
        assert error == pytest.approx(stated["coded"][name]["relative_mse"], rel=0.02)
    text = succeeds("verify", coded, "--reference", source)
    assert f"relative mean squared error {report['relative_mse']:.6f} over {len(report['errors'])} param" in text
    worst = max(report["errors"], key=report["errors"].__getitem__)
    assert text.splitlines()[2] == f"  {report['errors'][worst]:.6f}  {worst}"

    report = json.loads(succeeds("verify", int4, "--reference", source, "--json"))
    assert report["format"] == "compressed-tensors"
    original, decoded = load_file(source / "model.safetensors"), int4.with_name("int4-16-bit")
    succeeds("dequantize", int4, decoded)
    restored = load_file(decoded / "model.safetensors")
    for name, error in report["errors"].items():
        difference = (restored[name].double() - original[name].double()).square().sum()
        assert error == pytest.approx(float(difference / original[name].double().square().sum()), rel=1e-9)
    plain = json.loads(succeeds("verify", decoded, "--reference", source, "--json"))
    assert plain["format"] == "16-bit"
    assert plain["errors"] == pytest.approx(report["errors"])


def test_verify_misses_the_configuration_that_was_made_with_the_weights(
    coded: Path, copy: Callable[[Path], Path]
) -> None:
    damaged = copy(coded)
    (damaged / "config.json").unlink()
    assert fails("verify", damaged).startswith(f"{damaged}/config.json: is missing, but was made with the weights; ")


@pytest.mark.parametrize("model", ["coded", "int4"])
def test_verify_finds_a_flipped_bit(model: str, request: pytest.FixtureRequest, copy: Callable[[Path], Path]) -> None:
    damaged = copy(request.getfixturevalue(model))
    file = damaged / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = fails("verify", damaged)
    assert message.startswith(f"{file}: tensor model.")
    assert "is damaged, its SHA-256 is not the listed one" in message
    for command in ("dequantize", "export") if model == "coded" else ("dequantize",):
        assert fails(command, damaged, damaged.with_name("out")) == message
        assert not damaged.with_name("out").exists()
        shutil.rmtree(damaged.with_name("out.partial"))


@pytest.mark.parametrize(
    ("model", "lost", "said"),
    [
        ("coded", "model.norm.weight", "model.norm.weight is not in it"),
        ("coded", "model.layers.0.experts.down_proj_e3__norms", "model.layers.0.experts.down_proj_e3__norms is miss"),
        ("int4", "model.layers.0.experts.3.down_proj.weight_scale", "experts.3.down_proj.weight_scale is missing"),
    ],
)
def test_verify_finds_a_missing_tensor(
    model: str, lost: str, said: str, request: pytest.FixtureRequest, copy: Callable[[Path], Path]
) -> None:
    folder = request.getfixturevalue(model)
    short = change(copy(folder), lambda state: state.pop(lost))
    assert said in fails("verify", short)
    shutil.copyfile(folder / "hlwq_sha256.json", short / "hlwq_sha256.json")
    assert f"lists tensor {lost}, which no file holds" in fails("verify", short)


def test_verify_finds_a_tensor_missing_beside_the_reference(
    source: Path, int4: Path, copy: Callable[[Path], Path]
) -> None:
    short = change(copy(int4), lambda state: state.pop("model.norm.weight"))
    said = fails("verify", short, "--reference", source)
    assert said.startswith(f"{short}: model.norm.weight of the reference {source} is missing")


@pytest.mark.parametrize("model", ["coded", "int4"])
def test_verify_finds_a_wrong_reference(
    model: str, source: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(model)
    config = checkpoints.gemma4_config(num_experts=4, top_k_experts=2)
    twin = checkpoints.write(config, tmp_path / "twin", seed=1, varied=True)
    assert fails("verify", checkpoint, "--reference", twin).endswith("; give the model it was made from")
    other = checkpoints.write(checkpoints.qwen3_moe_config(), tmp_path / "other")
    assert str(checkpoint) in fails("verify", checkpoint, "--reference", other)


def test_weights_too_small_for_a_factor_are_told_and_not_laid_to_the_reference(
    source: Path, tmp_path: Path, copy: Callable[[Path], Path]
) -> None:
    small = copy(source)
    state = load_file(small / "model.safetensors")
    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name] *= 1e-9
    save_file(state, small / "model.safetensors")
    said = succeeds("quantize", small, tmp_path / "out")
    assert f"{name} is stored as zeros" in said
    assert f"--keep '{name}'" in said
    assert f"1.000000  {name}" in succeeds("verify", tmp_path / "out", "--reference", small)
    state[name].zero_()  # what is not zero where the reference is remains a fault
    save_file(state, small / "model.safetensors")
    assert succeeds("verify", tmp_path / "out", "--reference", small)
    assert "give the model it was made from" in fails("verify", source, "--reference", small)


def test_verify_finds_that_the_reference_was_trained_further(
    source: Path, coded: Path, copy: Callable[[Path], Path]
) -> None:
    later = copy(source)
    state = load_file(later / "model.safetensors")
    state["model.norm.weight"] += 2**-6
    save_file(state, later / "model.safetensors")
    assert fails("verify", coded, "--reference", later).startswith(
        f"{coded}: model.norm.weight is not coded, but differs from the reference {later}; "
    )


def test_verify_says_when_there_are_no_sums(source: Path) -> None:
    assert succeeds("verify", source).endswith("; no list of SHA-256 sums to hold it to\n")


# inspect


def test_inspect_of_each_format(source: Path, coded: Path, int4: Path) -> None:
    found = {path: json.loads(succeeds("inspect", path, "--json")) for path in (source, coded, int4)}
    assert [report["format"] for report in found.values()] == ["16-bit", "hlwq", "compressed-tensors"]
    original = load_file(source / "model.safetensors")
    for path, report in found.items():
        assert report["bytes"] == sum(t.nbytes for t in load_file(path / "model.safetensors").values()) - (
            32 * 4 if path == coded else 0  # the table
        )
        assert report["bytes_in_16_bit"] == 2 * sum(t.numel() for t in original.values())
    rows = {path: {row["name"]: row for row in report["parameters"]} for path, report in found.items()}
    name = "model.layers.0.experts.gate_up_proj"
    assert rows[coded].keys() == rows[source].keys() == original.keys()
    assert rows[coded][name] == {
        "name": name, "shape": [4, 384, 128], "stored": "Q5", "bytes": 4 * (384 * 80 + 384 * 2 + 5 * 8)
    }  # fmt: skip
    assert rows[int4]["model.layers.0.experts.3.up_proj.weight"] == {
        "name": "model.layers.0.experts.3.up_proj.weight", "shape": [192, 128], "stored": "INT4 g64",
        "bytes": 192 * 128 // 2 + 192 * 2 * 2 + 16,
    }  # fmt: skip
    assert found[coded]["bits"] == [5]
    assert found[coded]["codebook"] == "stored"
    assert found[coded]["missing"] == []
    assert found[int4]["group_size"] == 64


def test_the_table_of_inspect(coded: Path, int4: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # so that no name is folded
    text = succeeds("inspect", coded)
    assert "bits: [5]" in text
    assert "codebook: stored" in text
    assert re.search(r"size: [\d.]+ kB, [\d.]+ MB in 16 bit, ratio [23]\.\d\d", text)
    row = next(line for line in succeeds("inspect", int4).splitlines() if "layers.0.experts.*.up_proj" in line)
    assert [cell.strip() for cell in row.split("│")[1:4]] == [
        "model.layers.0.experts.*.up_proj.weight", "4 x 192 x 128", "INT4 g64",
    ]  # fmt: skip
    said = " ".join(succeeds("inspect", bare).split())
    assert re.search(r"not in it: model\.\S+, .* \(\d+\); needs a base model", said)
