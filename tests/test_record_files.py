"""Records in files: read back as they were written, or not at all; what a killed or a full disk leaves behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_hlwq import record_files
from vllm_hlwq.atomic_file import replacing
from vllm_hlwq.host_store import HostStore, RecordLayout
from vllm_hlwq.record_files import ALIGNMENT, PREFIX_BYTES, RecordFileError, read_records, write_records

LAYOUT = RecordLayout(
    {
        "w13_weight": ((5, 33), torch.int32),
        "w2_scale": ((7,), torch.float8_e8m0fnu),
        "w2_bias": ((3, 2), torch.bfloat16),
    }
)
EXPERTS = 11
KEY = {"vllm": "1.2.3", "layer": "layers.0", "ranks": {"tp": [0, 1]}, "quantization": None}


def random_store(seed: int = 0) -> HostStore:
    store = HostStore(EXPERTS, LAYOUT)
    generator = torch.Generator().manual_seed(seed)
    store.records.copy_(torch.randint(0, 256, store.records.shape, generator=generator, dtype=torch.uint8))
    return store


def quiet(_: int) -> None:
    return


@pytest.fixture(params=[700, 2**24], ids=["blocks that end within records", "one block"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of ``random_store``, in blocks of two sizes."""
    monkeypatch.setattr(record_files, "BLOCK_BYTES", request.param)
    path = tmp_path / "records"
    write_records(path, KEY, random_store(), quiet)
    return path


def read(path: Path, key: dict = KEY, experts: int = EXPERTS) -> HostStore:
    return read_records(path, key, experts, None, quiet)


def test_what_was_written_is_read(file: Path) -> None:
    written, found = random_store(), read(file)
    assert torch.equal(found.records, written.records)
    assert found.layout.key() == LAYOUT.key()
    assert found.converted
    assert not written.converted
    assert [child.name for child in file.parent.iterdir()] == ["records"]


def test_each_byte_is_written_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    steps: list[int] = []
    counted = {"preadv": 0, "pwrite": 0}
    for name in counted:
        monkeypatch.setattr(record_files.os, name, counting(counted, name, getattr(os, name)))
    read_records(file, KEY, EXPERTS, None, steps.append)
    assert counted["preadv"] == random_store().nbytes
    assert sum(steps) == file.stat().st_size
    steps.clear()
    write_records(tmp_path / "again", KEY, random_store(), steps.append)
    assert counted["pwrite"] == file.stat().st_size
    assert sum(steps) == random_store().nbytes


def test_a_disk_that_gives_a_little_at_a_time_is_read_whole(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def a_little(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffer[:301] for buffer in buffers], offset)

    preadv = os.preadv
    monkeypatch.setattr(record_files.os, "preadv", a_little)
    assert torch.equal(read(file).records, random_store().records)


def counting(counted: dict[str, int], name: str, call: Callable[..., int]) -> Callable[..., int]:
    def count(*arguments: object) -> int:
        done = call(*arguments)
        counted[name] += done
        return done

    return count


def test_every_flipped_byte_is_seen(file: Path) -> None:
    content = file.read_bytes()
    records = len(content) - random_store().nbytes
    text = int.from_bytes(content[16:24], "little")
    places = [0, 15, 16, 20, 24, 28, PREFIX_BYTES, PREFIX_BYTES + text - 1]
    places += [records, records + 701, records + LAYOUT.record_bytes * 5 + 3, len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(RecordFileError, match=r"damaged|not a file of expert records"):
            read(file)
    file.write_bytes(content)
    read(file)


@pytest.mark.parametrize("length", [0, 10, PREFIX_BYTES, 100, ALIGNMENT, ALIGNMENT + 1, -1])
def test_a_file_that_was_cut_is_refused(file: Path, length: int) -> None:
    os.truncate(file, length if length >= 0 else file.stat().st_size - 1)
    with pytest.raises(RecordFileError, match=r"cut off|damaged|not a file of expert records"):
        read(file)


def test_a_file_that_is_too_long_or_of_other_experts_is_refused(file: Path) -> None:
    with pytest.raises(RecordFileError, match="cut off or too long"):
        read(file, experts=EXPERTS + 1)
    with file.open("ab") as opened:
        opened.write(b"x")
    with pytest.raises(RecordFileError, match="cut off or too long"):
        read(file)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vllm": "1.2.4"}, "vllm '1.2.3' in place of '1.2.4'"),
        ({"ranks": {"tp": [1, 2]}}, "ranks {'tp': [0, 1]} in place of {'tp': [1, 2]}"),
        ({"new": 1}, "new None in place of 1"),
    ],
)
def test_a_file_of_something_else_says_what_differs(file: Path, changed: dict, said: str) -> None:
    with pytest.raises(RecordFileError) as caught:
        read(file, KEY | changed)
    assert str(caught.value) == f"made of something else: {said}"


def test_a_file_in_other_blocks_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = record_files.BLOCK_BYTES
    monkeypatch.setattr(record_files, "BLOCK_BYTES", 4096)
    with pytest.raises(RecordFileError, match=f"^in blocks of {written} bytes in place of 4096$"):
        read(file)


def test_no_file_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


def test_a_file_that_may_not_grow_leaves_what_was_there(file: Path) -> None:
    """RLIMIT_FSIZE ends a write as a full disk does, in the middle of the records."""
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_records(file, KEY | {"vllm": "2"}, random_store(1), quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [child.name for child in file.parent.iterdir()] == ["records"]


HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from vllm_hlwq.atomic_file import replacing
    import os
    with replacing(Path(sys.argv[1])) as file:
        os.write(file, b"half")
        print("writing", flush=True)
        time.sleep(60)
""")


def test_a_killed_writer_leaves_no_half_file_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    killed, alive = (
        subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        for process in (killed, alive):
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert path.read_bytes() == b"before"
        assert len(list(tmp_path.iterdir())) == 3
        with replacing(path) as file:
            os.write(file, b"whole")
        assert path.read_bytes() == b"whole"
        assert len(list(tmp_path.iterdir())) == 2, "the one that is alive keeps its file, the killed one's is gone"
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


RACE = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from vllm_hlwq.atomic_file import replacing
    for number in range(200):
        with replacing(Path(sys.argv[1])) as file:
            for _ in range(8):
                os.write(file, sys.argv[2].encode() * 1000)
""")


def test_writers_at_once_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", RACE, str(path), letter]) for letter in "abc"]
    seen = set()
    deadline = time.monotonic() + 120
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 8000
            assert len(set(content)) == 1
            seen.add(content[:1])
    assert [writer.wait(10) for writer in writers] == [0, 0, 0]
    assert len(seen) > 1
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_new_file_takes_no_other_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    for name, content in (("fresh", None), ("taken", b"precious")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with (
            pytest.raises(FileExistsError) if content else nullcontext(),
            replacing(path, new=True) as descriptor,
        ):
            os.write(descriptor, b"new")
        assert path.read_bytes() == (content or b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fresh", "taken"]
