"""The GPU benchmark of HLWQ, on the CPU at a tiny size: what it writes, and that its figures belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hlwq_convert
import hlwq_gpu
import kv_cache
import numpy as np
import pytest
import render_hlwq
import torch
from make_checkpoint import SHAPES, ShapeSource

from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.sources import PlainSource

CPU = torch.device("cpu")


def test_the_model_has_the_shape_and_normal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hlwq_convert, "SHARD_BYTES", 2**21)
    size = hlwq_convert.make_source("small", 2, tmp_path / "model")
    source = PlainSource(tmp_path / "model")
    wanted = ShapeSource(SHAPES["small"](2), tmp_path).parameters
    assert {name: (p.shape, p.dtype) for name, p in source.parameters.items()} == {
        name: (p.shape, p.dtype) for name, p in wanted.items()
    }
    assert size == sum(parameter.bytes for parameter in wanted.values())
    assert len(source.folder.files) > 1
    for name, parameter in source.parameters.items():
        rows = source.rows(name, 0, parameter.rows).double()
        if len(parameter.shape) < 2:
            assert (rows == 1).all()
        else:
            error = 5 / math.sqrt(rows.numel())
            assert abs(rows.mean() / hlwq_convert.DEVIATION) < error
            assert rows.std() == pytest.approx(hlwq_convert.DEVIATION, rel=error + 0.002)
            assert (rows / hlwq_convert.DEVIATION).pow(4).mean() == pytest.approx(3, rel=10 * error + 0.01)


def test_quantiles_are_those_of_a_normal_distribution() -> None:
    values = torch.from_numpy(hlwq_convert.quantiles().view(np.int16)).view(torch.bfloat16).double()
    assert (values.diff() >= 0).all()
    assert torch.equal(values, -values.flip(0))
    share = float((values.abs() < hlwq_convert.DEVIATION).double().mean())
    assert share == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.005)


def test_commands_convert_the_whole_model(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    hlwq_convert.measure_convert(CPU, "small", 1, ["gain"], tmp_path, saved.append, side=256, machine_bytes=2**20)
    result = json.loads(json.dumps(saved[-1]))
    source = PlainSource(tmp_path / "source")
    assert result["source_bytes"] == sum(parameter.bytes for parameter in source.parameters.values())
    rows = result["commands"]
    assert [row["command"] for row in rows] == ["quantize", "export", "dequantize"]
    for row in rows:
        assert 0 < row["seconds"] < row["wall_seconds"]
        assert row["weights_per_second"] == pytest.approx(row["weights"] / row["seconds"])
        assert row["read_gb_per_second"] == pytest.approx(row["read_bytes"] / row["seconds"] / 1e9)
        assert row["host_peak_bytes"] > 2**26
        assert row["gpu_peak_bytes"] is None
    coded, exported, decoded = rows
    assert coded["read_bytes"] == hlwq_convert.weights_bytes(tmp_path / "source")
    assert coded["written_bytes"] == exported["read_bytes"] == decoded["read_bytes"]
    assert coded["weights"] == decoded["weights"] < result["source_bytes"] / 2
    config = SHAPES["small"](1)
    assert exported["weights"] == 3 * config.num_experts * config.moe_intermediate_size * config.hidden_size
    assert 0.001 < coded["relative_mse"] < 0.004
    assert decoded["written_bytes"] == pytest.approx(result["source_bytes"], rel=0.01)
    # What the command wrote is what the library makes of the same model.
    quantize(tmp_path / "source", tmp_path / "again", fit="gain")
    for folder in ("hlwq", "again"):
        dequantize(open_source(tmp_path / folder), tmp_path / f"{folder}-decoded")
    made, wanted = (PlainSource(tmp_path / f"{folder}-decoded") for folder in ("hlwq", "again"))
    for name, parameter in wanted.parameters.items():
        assert torch.equal(made.rows(name, 0, parameter.rows), wanted.rows(name, 0, parameter.rows))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA measures them")
def test_parts_for_a_gpu_say_why_they_do_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    out.write_text('{"convert": {"kept": true}}')
    monkeypatch.setattr("sys.argv", ["hlwq_gpu.py", "--out", str(out), "--parts", "linear", "load", "cache"])
    assert hlwq_gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{part}: not measured, {hlwq_gpu.NO_CUDA}" for part in ("linear", "load", "cache")]
    assert json.loads(out.read_text()) == {"convert": {"kept": True}}


def test_a_step_is_timed_with_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SPEED_LENGTH", 512)
    found = hlwq_gpu.measure_cache(CPU, steps=1)
    assert [(row["model"][:5], row["cache"]) for row in found["rows"]] == [
        (model, cache) for model in ("dense", "six l") for cache in ("BF16", "HLWQ 3 bit")
    ]
    assert all(row["bytes"] > 0 and row["ms"] > 0 for row in found["rows"])
    assert found["values"] == {"codes_differing": 0.0, "largest_difference": 0.0}


def test_a_part_that_fails_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(hlwq_gpu, "measure_convert", fail)
    monkeypatch.setattr("sys.argv", ["hlwq_gpu.py", "--out", str(tmp_path / "out.json"), "--parts", "convert"])
    assert hlwq_gpu.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "convert: failed, ValueError: broken"
    assert lines[-1] == f"  {__file__}:{fail.__code__.co_firstlineno + 1}"
    assert f"{hlwq_gpu.__file__}:" in lines[-2]


def test_missed_limits_are_named() -> None:
    row = {"tokens": 1, "clock": "device", "ratio": 1.01}
    cache = {"values": {"codes_differing": 0.0, "largest_difference": 1.5}}
    found = hlwq_gpu.misses({"linear": {"rows": [row]}, "load": {"missed": ["missed: slow"]}, "cache": cache})
    assert found[0] == "1 tokens, device time: 1.01 times BF16's, limit 1.0"
    assert found[1] == "slow"
    assert "largest_difference" in found[2]
    assert hlwq_gpu.misses({"linear": {"rows": [row | {"ratio": 1.0}]}}) == []


MADE_UP: dict[str, Any] = {
    "convert": {
        "environment": {"gpu": "NVIDIA H100", "cores": 12}, "shape": "gemma-4-26b-a4b", "layers": 9, "of_layers": 30,
        "device": "cuda", "source_bytes": 16 * 2**30,
        "machine": {"sha256_gb_per_second": 1.9, "write_and_sync_gb_per_second": 1.25,
                    "host_to_device_gb_per_second": 11.0},
        "commands": [{"command": "quantize", "fit": "norm", "seconds": 20.0, "wall_seconds": 28.0, "weights": 8e9,
                      "weights_per_second": 4e8, "read_gb_per_second": 0.86, "host_peak_bytes": 3 * 2**30,
                      "gpu_peak_bytes": 2**29}],
        "codec": [{"what": "quantise, norm", "rows": 4096, "columns": 4096, "weights_on": "cuda", "seconds": 0.001,
                   "weights_per_second": 1.6777e10}],
    },
    "linear": {
        "environment": {"gpu": "NVIDIA H100"}, "side": 4096, "bits_per_weight": 5.125, "rotation_us": 2.25,
        "rows": [{"tokens": 1, "clock": "device", "bf16_seconds": 12e-6, "coded_seconds": 9e-6, "ratio": 0.75}],
    },
    "cache": {
        "environment": {"gpu": "NVIDIA H100"}, "length": 4096, "steps": 24,
        "values": {"codes_differing": 1.25e-6, "largest_difference": 0.0123},
        "rows": [{"model": "dense", "cache": "BF16", "bytes": 64 * 2**20, "ms": 2.0},
                 {"model": "dense", "cache": "HLWQ 3 bit", "bytes": 16 * 2**20, "ms": 3.0}],
    },
}  # fmt: skip


def test_the_rendering() -> None:
    text = render_hlwq.hlwq_gpu(MADE_UP, lambda environment: f"on {environment['gpu']}")
    assert "| `hlwq quantize --fit norm` | 20.0 | 28.0 | 400 | 0.86 | 3.0 | 0.5 |" in text
    assert "| quantise, norm | 4096 x 4096 | cuda | 1.00 | 16,777 |" in text
    assert "9 of 30 layers" in text
    assert "with 12 threads" in text
    assert "| 1 | 12.0 | 9.0 | 0.75 |" in text
    assert "at most 1.0 times: holds" in text
    assert "| dense | HLWQ 3 bit | 16.0 | 3.00 | 1.50 |" in text
    assert "on NVIDIA H100" in text
    missed = MADE_UP["linear"] | {"rows": [MADE_UP["linear"]["rows"][0] | {"ratio": 1.2}]}
    assert "at most 1.0 times: **missed**" in render_hlwq.hlwq_gpu({"linear": missed}, str)
    assert "KV cache" not in render_hlwq.hlwq_gpu({"linear": missed}, str)
