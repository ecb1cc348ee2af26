"""The ``hlwq`` command: what it says and where, its exit codes, and that it ignores nothing it is given."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_hlwq.cli import app

HLWQ = Path(sys.executable).parent / "hlwq"
COMMANDS = ("quantize", "export", "dequantize", "inspect", "verify")


def hlwq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    """Standard output of a command that succeeds and has nothing to add."""
    result = hlwq(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = hlwq(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("hlwq: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("hlwq: ").strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "source"
    return checkpoints.write(checkpoints.gemma4_config(num_experts=4, top_k_experts=2), out, varied=True)


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    out = source.with_name("coded")
    succeeds("quantize", source, out)
    return out


@pytest.fixture(scope="module")
def int4(coded: Path) -> Path:
    out = coded.with_name("int4")
    succeeds("export", coded, out)
    return out


@pytest.fixture(scope="module")
def bare(coded: Path) -> Path:
    """Coded tensors and the table, nothing else, as the published files: the rest is the base model's."""
    out = coded.with_name("bare")
    out.mkdir()
    state = load_file(coded / "model.safetensors")
    save_file({n: t for n, t in state.items() if "__" in n or n == "hlwq.codebook"}, out / "polar_state.safetensors")
    shutil.copyfile(coded / "config.json", out / "config.json")
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return make


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change a checkpoint's tensors and drop its list of sums, as another tool would leave it."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors")
    (folder / "hlwq_sha256.json").unlink()
    return folder


# A real process.


def test_the_way_of_a_model_as_a_user_goes_it(source: Path, tmp_path: Path) -> None:
    steps = [
        (("quantize", source, "q5", "--keep", "*embed_tokens*"), r"q5: 18 parameters coded at 5 bits, \d+ kept; "),
        (("verify", "q5", "--reference", source), r"q5: whole \(hlwq, \d+ tensors, .*\); SHA-256 sums agree\nagainst "),
        (("export", "q5", "int4"), r"int4: 24 matrices in INT4, group size 64; read back and verified\nServe it: vllm"),
    ]
    for arguments, said in steps:
        done = subprocess.run([HLWQ, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no progress bar where nobody sees it
        assert re.match(said, done.stdout), done.stdout
    done = subprocess.run([HLWQ, "export", "q5", "int4"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "hlwq: int4: exists and is not an empty folder; choose another or remove it\n"


def test_a_terminal_shows_progress_and_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"up_proj.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)}, tmp_path / "model/model.safetensors")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # on a terminal without a width there is no bar
    child = subprocess.Popen(
        [HLWQ, "quantize", tmp_path / "model", tmp_path / "out"], stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 120
    while b"coding at 5 bits" not in said:
        assert time.monotonic() < deadline
        said += os.read(ours, 4096)
    child.send_signal(signal.SIGINT)
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # how a terminal ends on Linux
            break
    assert child.wait() == 130
    assert b"hlwq: interrupted; the same command goes on where this one stopped" in said
    assert b"Traceback" not in said
    assert not (tmp_path / "out").exists()


# Help and usage.


def test_help_lists_the_commands_and_their_options() -> None:
    text = succeeds("--help")
    assert all(command in text for command in COMMANDS)
    options = {
        "quantize": "--bits --codebook --fit --keep --device",
        "export": "--format --group-size --scales --linears --base-model --codebook --device",
        "dequantize": "--base-model --codebook --device",
        "inspect": "--json --base-model --codebook",
        "verify": "--reference --base-model --codebook --json",
    }
    for command in COMMANDS:
        found = set(re.findall(r"--[a-z][a-z-]*", succeeds(command, "--help")))
        assert found == {"--help", *options[command].split()}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("quantise", "a", "b"),
        ("quantize", "a"),
        ("quantize", "a", "b", "--bits", "9"),
        ("quantize", "a", "b", "--codebook", "D"),
        ("quantize", "a", "b", "--base-model", "c"),
        ("export", "a", "b", "--format", "gguf"),
        ("export", "a", "b", "--group-size", "many"),
        ("verify", "a", "--jsn"),
    ],
)
def test_a_command_line_that_does_not_parse(arguments: tuple[str, ...]) -> None:
    assert hlwq(*arguments).exit_code == 2


# Options without a meaning.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("export {source} {out} --group-size 48", "--group-size 48: Marlin takes 32, 64, 128; choose one of them"),
        ("export {source} {out} --group-size 0", "--group-size 0: Marlin takes 32, 64, 128; choose one of them"),
        ("export {source} {out} --base-model {source}", "{source}: is not coded with HLWQ, so --base-model has no"),
        ("export {source} {out} --codebook A", "{source}: is not coded with HLWQ, so --codebook has no meaning"),
        ("export {int4} {out}", "{int4}: holds INT4 weights already"),
        ("dequantize {source} {out}", "{source}: is neither HLWQ nor INT4, so there is nothing to decode"),
        ("dequantize {int4} {out} --base-model {source}", "{int4}: is not coded with HLWQ, so --base-model has no"),
        ("dequantize {coded} {out} --codebook B", "{coded}: stores its own codebook; leave --codebook B out"),
        ("inspect {source} --base-model {source}", "{source}: is not coded with HLWQ, so --base-model has no meaning"),
        ("inspect {int4} --codebook C", "{int4}: is not coded with HLWQ, so --codebook has no meaning"),
        ("inspect {coded} --codebook C", "{coded}: stores its own codebook; leave --codebook C out"),
        ("verify {source} --codebook A", "{source}: is not coded with HLWQ, so --codebook has no meaning"),
        ("verify {int4} --base-model {source}", "{int4}: is not coded with HLWQ, so --base-model has no meaning"),
        ("quantize {source} {out} --keep nothing", "--keep nothing: matches no parameter of {source}"),
        ("quantize {source} {out} --device tpu", "--device tpu: no such device; use cpu or cuda"),
        ("quantize {source} {out} --device meta", "--device meta: not supported; use cpu or cuda"),
        ("quantize {source} {out} --device cuda:64", "--device cuda:64: PyTorch sees"),
        ("quantize {coded} {out}", "{coded}: is coded with HLWQ already"),
        ("quantize {int4} {out}", "{int4}: its weights are quantised already (compressed-tensors)"),
        ("quantize {out} {source}", "{out}: does not exist"),
        ("verify {source} --reference {out}", "{out}: does not exist"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(
    source: Path, coded: Path, int4: Path, tmp_path: Path, arguments: str, said: str
) -> None:
    paths = {"source": source, "coded": coded, "int4": int4, "out": tmp_path / "out"}
    assert fails(*(part.format(**paths) for part in arguments.split())).startswith(said.format(**paths))
    assert not list(tmp_path.iterdir())


# Partial checkpoints.


def test_dequantize_without_a_base_says_what_is_missing(source: Path, bare: Path, tmp_path: Path) -> None:
    result = hlwq("dequantize", bare, tmp_path / "part")
    assert result.exit_code == 0
    assert re.fullmatch(r".*/part: 19 parameters decoded \(codebook stored\); read back and verified\n", result.stdout)
    said = r"hlwq: .*/part is partial: (\S+) and (\d+) more are not in .*/bare; give --base-model for a whole model"
    missing = re.fullmatch(said, result.stderr.strip())
    assert missing is not None
    state = load_file(tmp_path / "part/model.safetensors")
    assert len(state) == 19
    whole = load_file(source / "model.safetensors")
    lacking = sorted(whole.keys() - state.keys())
    assert (missing[1], int(missing[2])) == (lacking[0], len(lacking) - 1)
    succeeds("dequantize", bare, tmp_path / "whole", "--base-model", source)
    completed = load_file(tmp_path / "whole/model.safetensors")
    assert completed.keys() == whole.keys()
    assert all(torch.equal(completed[name], state.get(name, whole[name])) for name in whole)


def test_export_and_verify_without_a_base_are_refused_by_name(source: Path, bare: Path, tmp_path: Path) -> None:
    wanted = rf"{bare}: model\.\S+ and \d+ more are not in it; give --base-model, which has what it lacks"
    assert re.fullmatch(wanted, fails("export", bare, tmp_path / "out"))
    assert re.fullmatch(wanted, fails("verify", bare))
    assert not list(tmp_path.iterdir())
    succeeds("export", bare, tmp_path / "out", "--base-model", source)
    assert "whole (hlwq, " in succeeds("verify", bare, "--base-model", source)


def test_a_table_that_cannot_be_told_must_be_given(coded: Path, tmp_path: Path, copy: Callable[[Path], Path]) -> None:
    nameless = change(copy(coded), lambda state: state.pop("hlwq.codebook"))
    message = fails("dequantize", nameless, tmp_path / "out")
    assert "codes are too few to tell it by" in message
    assert message.endswith("give --codebook A, B or C")
    assert "(codebook C, given)" in succeeds("dequantize", nameless, tmp_path / "out", "--codebook", "C")
    succeeds("dequantize", coded, tmp_path / "stored")
    given, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "stored"))
    assert all(torch.equal(given[name], stored[name]) for name in stored)


# verify


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


def test_the_table_of_inspect(coded: Path, int4: Path, bare: Path) -> None:
    text = succeeds("inspect", coded)
    assert "bits: [5]" in text
    assert "codebook: stored" in text
    assert re.search(r"size: [\d.]+ MB, [\d.]+ MB in 16 bit, ratio [23]\.\d\d", text)
    folded = re.sub(r"\s|│", "", succeeds("inspect", int4))
    assert "model.layers.0.experts.*.up_proj.weight" in folded
    assert "4x192x128INT4g64" in folded
    said = " ".join(succeeds("inspect", bare).split())
    assert re.search(r"not in it: model\.\S+, .* \(\d+\); needs a base model", said)
