"""What the codec's benchmark stands on: a model made of holes, peaks of memory, and times taken in turn."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import codec
import pytest
import sparse_model
import torch

from vllm_hlwq.bench.memory import PeakSampler, run_and_watch
from vllm_hlwq.checkpoint.sources import PlainSource
from vllm_hlwq.codec.hadamard import sylvester

MIB = 2**20


def test_a_model_of_holes_is_whole_and_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_model, "RANDOM_BYTES", MIB)
    size = sparse_model.write_model(tmp_path / "model", 500 * MIB)
    source = PlainSource(tmp_path / "model")
    assert 500 * MIB <= size == sum(parameter.bytes for parameter in source.parameters.values())
    on_disk = sum(512 * file.stat().st_blocks for file in (tmp_path / "model").iterdir())
    assert on_disk < 50 * MIB
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj"):
        parameter = source.parameters[name]
        assert source.rows(name, 0, 1).float().std() == pytest.approx(0.02, rel=0.2)
        assert not source.rows(name, parameter.rows - 1, parameter.rows).any()


def test_the_peak_is_what_a_process_takes_for_itself(tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    with mapped.open("wb") as file:
        file.truncate(300 * MIB)
    program = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb')"
        "; m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])"
        f"; own = bytearray({100 * MIB}); time.sleep(0.3); del own; time.sleep(0.1)"
    )
    peak, seconds = run_and_watch([sys.executable, "-S", "-c", program, str(mapped)])
    assert 100 * MIB < peak < 130 * MIB
    assert seconds >= 0.4
    with pytest.raises(subprocess.CalledProcessError):
        run_and_watch([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_sampler_keeps_the_largest_figure() -> None:
    figures = iter([3, 9, 4])
    over = threading.Event()

    def sample() -> int:
        figure = next(figures)
        if figure == 4:
            over.set()
        return figure

    sampler = PeakSampler(sample, over.is_set)
    sampler.start()
    sampler.join(10)
    assert sampler.peak == 9


def test_the_unit_is_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk over all blocks, with the matrix that the codec rotates by."""
    seen: list[torch.Tensor] = []
    multiply = torch.mm
    monkeypatch.setattr(codec.torch, "mm", lambda a, b, out: seen.append(multiply(a, b, out=out[: len(a)]).clone()))
    blocks = torch.randn(1000, 128)
    codec.product(blocks, 256)()
    assert torch.allclose(torch.cat(seen), blocks @ sylvester(128, torch.device("cpu")), atol=1e-4)


def test_times_are_taken_in_turn() -> None:
    order: list[str] = []
    seconds = codec.in_turn({name: lambda name=name: order.append(name) for name in ("a", "b")})  # type: ignore[misc]
    assert order == ["a", "b"] * (codec.REPEATS + 1)
    assert [len(times) for times in seconds.values()] == [codec.REPEATS] * 2
