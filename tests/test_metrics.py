"""What ranks report adds up, and crosses to the server in files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_hlwq import metrics_publisher
from vllm_hlwq.counter_block import CounterBlock
from vllm_hlwq.expert_cache import COUNTERS, SlotTable
from vllm_hlwq.metrics import (
    EVICTIONS,
    H2D_BYTES,
    HITS,
    METRICS,
    QUERIES,
    SLOTS,
    STAGED,
    USAGE,
    WAVES,
    Layer,
    Metric,
    Rank,
    metric_values,
)
from vllm_hlwq.metrics_files import FILE_BYTES, MetricFiles, create_folder
from vllm_hlwq.metrics_publisher import MetricsPublisher, start_publisher

ONE_RANK = Rank(counts_experts=True, replicas=1, engine_slots=8)


def counters(**values: int) -> list[int]:
    return [values.get(name, 0) for name in COUNTERS]


FIRST = counters(steps=9, queries=50, hits=20, admitted=25, evictions=22, staged=5, waves=11, copied=31)
SECOND = counters(steps=9, queries=40, hits=37, admitted=3, evictions=0, staged=0, waves=9, copied=3)
LAYERS = [Layer("a", 4, 1000, False), Layer("b", 4, 10, False)]


def test_sums_over_layers() -> None:
    assert metric_values(LAYERS, [FIRST, SECOND], ONE_RANK, per_layer=False) == {
        (QUERIES, ""): 90, (HITS, ""): 57, (EVICTIONS, ""): 22, (STAGED, ""): 5, (WAVES, ""): 20,
        (H2D_BYTES, ""): 31 * 1000 + 3 * 10, (SLOTS, ""): 8, (USAGE, ""): (3 + 3) / 8,
    }  # fmt: skip


def test_layers_apart() -> None:
    values = metric_values(LAYERS, [FIRST, SECOND], ONE_RANK, per_layer=True)
    assert len(values) == 2 * len(METRICS)
    assert (values[QUERIES, "a"], values[QUERIES, "b"]) == (50, 40)
    assert (values[H2D_BYTES, "a"], values[H2D_BYTES, "b"]) == (31000, 30)
    assert (values[SLOTS, "b"], values[USAGE, "b"]) == (4, 3 / 4)


def test_a_resident_layer_is_full_and_counts_nothing() -> None:
    values = metric_values([Layer("a", 16, 1000, True)], [counters()], Rank(True, 1, 16), per_layer=False)
    assert {metric.name: value for (metric, _), value in values.items() if value} == {SLOTS.name: 16, USAGE.name: 1}


@pytest.mark.parametrize("per_layer", [False, True])
def test_ranks_add_up(per_layer: bool) -> None:
    layer, label = [Layer("a", 4, 500, False)], "a" if per_layer else ""

    def total(*ranks: Rank) -> dict[Metric, float]:
        reports = [metric_values(layer, [FIRST], rank, per_layer) for rank in ranks]
        return {metric: sum(report.get((metric, label), 0) for report in reports) for metric in METRICS}

    # Two ranks with half of every expert each: experts are counted once, bytes twice.
    halves = total(Rank(True, 1, 4), Rank(False, 1, 4))
    assert (halves[QUERIES], halves[SLOTS], halves[USAGE], halves[H2D_BYTES]) == (50, 4, 3 / 4, 2 * 31 * 500)
    # Two ranks with half of the experts each.
    apart = total(Rank(True, 2, 8), Rank(True, 2, 8))
    assert (apart[QUERIES], apart[SLOTS], apart[USAGE], apart[H2D_BYTES]) == (100, 8, 3 / 4, 2 * 31 * 500)


def samples(folder: Path) -> dict[tuple[str, str, str], float]:
    """Samples of a folder by name, engine and layer."""
    found = {}
    for family in MultiProcessCollector(None, path=str(folder)).collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            found[sample.name, labels.pop("engine"), labels.pop("layer", "")] = sample.value
            assert not labels
    return found


def test_files_of_ranks_and_engines_are_added_up(tmp_path: Path) -> None:
    for engine, hits, slots in (("0", 5, 4), ("0", 2, 3), ("1", 8, 6)):
        report = {(HITS, ""): hits, (SLOTS, ""): slots}
        MetricFiles(tmp_path, {"model_name": "m", "engine": engine}).write(report)
    expected = {("hits_total", "0"): 7, ("hits_total", "1"): 8, ("slots", "0"): 7, ("slots", "1"): 6}
    assert samples(tmp_path) == {(f"vllm:moe_expert_cache_{n}", e, ""): v for (n, e), v in expected.items()}


def test_a_later_value_replaces_the_earlier_one_and_large_counts_are_exact(tmp_path: Path) -> None:
    files = MetricFiles(tmp_path, {"model_name": "m", "engine": "0"})
    files.write({(H2D_BYTES, f"layer.{index}"): 1 for index in range(300)})  # more than the first 64 KiB of a file
    files.write({(H2D_BYTES, f"layer.{index}"): 2**52 + index for index in range(300)})
    name = "vllm:moe_expert_cache_h2d_bytes_total"
    assert samples(tmp_path) == {(name, "0", f"layer.{index}"): 2**52 + index for index in range(300)}


def test_a_publisher_follows_the_counters_and_ends(tmp_path: Path) -> None:
    table = SlotTable(8, 2, 2)
    table.plan_step(torch.tensor([[0, 1]]))
    files = MetricFiles(tmp_path, {"model_name": "m", "engine": "0"})
    layers = [Layer("a", 2, 100, all_resident=False)]
    publisher = MetricsPublisher(CounterBlock([table]), layers, Rank(True, 1, 2), files, per_layer=False)
    for needed in (2, 5):
        deadline = time.monotonic() + 10
        key = "vllm:moe_expert_cache_queries_total", "0", ""
        while samples(tmp_path).get(key) != needed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert samples(tmp_path)[key] == needed
        table.plan_step(torch.tensor([[1, 2, 3]]))
    publisher.stop()
    assert "expert-cache-metrics" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("several_servers", [False, True])
def test_the_folder_goes_with_the_process_that_made_it(tmp_path: Path, several_servers: bool) -> None:
    (tmp_path / "vllms").mkdir()
    code = (
        "import os, types\n"
        "from vllm_hlwq.metrics_files import create_folder\n"
        "folder = create_folder(types.SimpleNamespace(instance_id='x'))\n"
        "(folder / 'counter_a.db').write_text('')\n"
        "if os.fork() == 0: raise SystemExit\n"
        "os.wait(); assert folder.is_dir(); print(folder)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    if several_servers:
        environment["PROMETHEUS_MULTIPROC_DIR"] = "vllms"  # a relative path is one from where the server was started
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == [str(tmp_path / "vllm-hlwq-metrics-x")]
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == ({"vllms", "vllms/counter_a.db"} if several_servers else {"vllms"})


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, killed = (
        subprocess.Popen(
            [
                sys.executable, "-c",
                "import sys, types\nfrom vllm_hlwq.metrics_files import create_folder\n"
                "print(create_folder(types.SimpleNamespace(instance_id=sys.argv[1])), flush=True)\nsys.stdin.read()",
                name,
            ],
            env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in ("living", "killed")
    )  # fmt: skip
    folders = [Path(process.stdout.readline().strip()) for process in (living, killed)]
    (folders[1] / "counter_a.db").write_text("")
    young, link, other = (tmp_path / f"vllm-hlwq-{name}" for name in ("metrics-young", "metrics-link", "setup-x"))
    link.symlink_to(tmp_path / "absent")
    other.mkdir()
    old = time.time() - 3600
    for path in (*folders, link, other):
        os.utime(path, (old, old), follow_symlinks=False)
    young.mkdir()
    killed.kill()
    killed.wait()
    mine = create_folder(SimpleNamespace(instance_id="mine"))
    assert set(tmp_path.iterdir()) == {folders[0], young, other, mine}
    living.communicate("")
    assert not folders[0].exists()


def test_a_folder_without_room_costs_the_metrics_and_not_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of a mapped file that the disk has no room for would end the process with SIGBUS."""
    room = [FILE_BYTES]  # for one of the two files

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.truncate(descriptor, offset + size)
        room.pop()

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr("vllm_hlwq.metrics_publisher.folder_of", lambda _: tmp_path)
    warned: list[str] = []
    monkeypatch.setattr(metrics_publisher.logger, "warning", lambda text, *values: warned.append(text % values))
    table = SlotTable(8, 2, 2)
    config = SimpleNamespace(
        instance_id="x",
        model_config=SimpleNamespace(served_model_name="m"),
        parallel_config=SimpleNamespace(
            enable_expert_parallel=False, tensor_parallel_size=1, world_size=1, data_parallel_index=0
        ),
    )
    layers = [Layer("a", 2, 100, all_resident=False)]
    assert start_publisher(config, 0, CounterBlock([table]), layers, per_layer=False) is None
    (warning,) = warned
    assert f"{tmp_path} could not be written (No space left on device)" in warning
    assert list(tmp_path.iterdir()) == []  # an empty file would make /metrics fail
