"""The ``hlwq`` command: what it says and where, its exit codes, and that it ignores nothing it is given."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import change, fails, hlwq, succeeds
from safetensors.torch import load_file

from vllm_hlwq.checkpoint.shard import TensorPlan, shard_layout

HLWQ = Path(sys.executable).parent / "hlwq"
COMMANDS = ("quantize", "export", "dequantize", "inspect", "verify")


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
    assert done.stderr == "hlwq: int4: exists and is not an empty folder; choose another\n"


def test_a_terminal_shows_progress_and_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    # A GiB of zeros in a file without blocks: nothing to write, and long enough to be interrupted in.
    head, _, size = shard_layout([TensorPlan("up_proj.weight", torch.bfloat16, (32768, 16384))])
    with (tmp_path / "model/model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(size)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # on a terminal without a width there is no bar
    child = subprocess.Popen(
        [HLWQ, "quantize", tmp_path / "model", tmp_path / "out"], stdout=subprocess.PIPE, stderr=theirs,
        # Tests that a shell runs in the background inherit that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
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
    shutil.rmtree(tmp_path / "out.partial")


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
        ("quantize {int4} {out}", "{int4}: its weights are quantised already ('compressed-tensors')"),
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
    assert "tensor hlwq.codebook is missing" in fails("dequantize", nameless, tmp_path / "out")
    config = json.loads((nameless / "config.json").read_text())
    del config["quantization_config"]["codebook"]  # as the published files, which neither hold nor promise one
    (nameless / "config.json").write_text(json.dumps(config))
    message = fails("dequantize", nameless, tmp_path / "out")
    assert "codes are too few to tell it by" in message
    assert message.endswith("give --codebook A, B or C")
    assert "(codebook C, given)" in succeeds("dequantize", nameless, tmp_path / "out", "--codebook", "C")
    succeeds("dequantize", coded, tmp_path / "stored")
    given, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "stored"))
    assert all(torch.equal(given[name], stored[name]) for name in stored)


def test_a_side_file_that_leads_out_is_refused_before_the_work(
    source: Path, coded: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    for command, model in (("quantize", source), ("export", source), ("dequantize", coded)):
        linked = copy(model)
        (linked / "vocab.txt").symlink_to("/etc/hostname")
        out = tmp_path / f"of-{command}"
        message = fails(command, linked, out)
        assert message == f"{linked}/vocab.txt: a link that leads out of its folder; copy the file there"
        assert not out.with_name(f"{out.name}.partial").exists()
        shutil.rmtree(linked)


def test_a_closed_standard_error_ends_no_conversion(source: Path, coded: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from vllm_hlwq.cli import main; main()", "quantize", source, tmp_path / "out"]
    quoted = shlex.join(map(str, command))
    done = subprocess.run(["bash", "-c", f"{quoted} 2>&-"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path}/out: ")
    assert (tmp_path / "out/hlwq_sha256.json").read_bytes() == (coded / "hlwq_sha256.json").read_bytes()
