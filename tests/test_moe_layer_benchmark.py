"""The layer benchmark as far as a machine without a GPU goes: its options, its record sizes, its CUDA C++ source."""

from __future__ import annotations

import shutil
from pathlib import Path

import gather_bulk
import gather_link
import moe_layer
import pytest
import torch


def test_options_name_parts_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = moe_layer.parse(["--parts", "gather", "--shape", "qwen3-30b-a3b", "--sweep"])
    assert (chosen.parts, chosen.shape, chosen.sweep, chosen.out) == (["gather"], "qwen3-30b-a3b", True, None)
    with pytest.raises(SystemExit):
        moe_layer.parse(["--parts", "router"])
    assert "gather" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert moe_layer.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", gather_link.SHAPES.values(), ids=gather_link.SHAPES)
def test_a_record_is_an_experts_codes_and_scales(shape: gather_link.MoeShape) -> None:
    weights = 3 * shape.hidden * shape.width
    assert shape.marlin_layout().record_bytes == weights // 2 + weights // shape.group_size * 2


def test_the_table_shows_rates_and_the_best_of_a_sweep() -> None:
    slow, fast = ({"programs": n, "gb_per_s": {"1": n / 2, "8": n / 4}} for n in (16, 64))
    text = gather_link.table(
        {
            "record_bytes": 3159552,
            "pcie": {"pcie.link.gen.current": "5"},
            "empty_us": 3.44,
            "rates": [{"experts": 8, "copy_gb_per_s": 55.0, "gather_gb_per_s": 49.5, "share": 0.9}],
            "sweep": [slow, fast],
        }
    )
    assert "empty gather 3.4 us" in text
    assert text.splitlines()[2].split() == ["8", "55.0", "49.5", "90%"]
    assert text.index("32.0 GB/s  {'programs': 64}") < text.index("8.0 GB/s  {'programs': 16}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_kernels_compile(tmp_path: Path) -> None:
    library = gather_bulk.build(tmp_path, (9, 0))
    assert library.gather_launch
