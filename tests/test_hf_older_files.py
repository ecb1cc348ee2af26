"""The files of earlier tools in transformers: only what is coded, the rest from the base model; two modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import Folders, load, logits, stored
from hlwq_files import STATE, Tensors, polar_state, slice_inside, slice_suffix, underscored, underscored_bare
from safetensors.torch import save_file
from test_hlwq_older_files import LINEAR, legacy

from vllm_hlwq import HLWQConfig
from vllm_hlwq.checkpoint.dequantize import dequantize, open_source
from vllm_hlwq.errors import CheckpointError


def coded_names(model: Tensors) -> tuple[str, ...]:
    return tuple(name for name in model if "_proj" in name or "embed_tokens" in name)


def write(folder: Path, tensors: Tensors, base: Path, method: str | None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / STATE)
    config = json.loads((base / "config.json").read_text())
    if method is not None:
        config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check(folder: Path, base: Path, codebook: str | None, work: Path, closeness: float = 0.1) -> None:
    """Decoded, exactly what ``hlwq dequantize`` makes of it; coded, nearly."""
    dequantize(open_source(folder, base, codebook), work / "decoded")  # type: ignore[arg-type]
    wanted = logits(load(work / "decoded"))
    options: dict[str, Any] = {"base_model": str(base), "codebook": codebook}
    decoded = load(folder, quantization_config=HLWQConfig(**options))
    assert torch.equal(logits(decoded), wanted)
    assert not hasattr(decoded.config, "transformers_weights")
    coded = load(folder, quantization_config=HLWQConfig(mode="coded", **options))
    assert coded.get_memory_footprint() < 0.7 * decoded.get_memory_footprint()
    assert float((logits(coded) - wanted).norm() / wanted.norm()) < closeness
    coded.save_pretrained(work / "saved")
    assert torch.equal(logits(load(work / "saved")), logits(coded))


@pytest.mark.parametrize(
    ("codebook", "method", "spell", "slices"),
    [("A", "polarengine", underscored, slice_suffix), ("B", "polar", underscored_bare, slice_suffix),
     ("A", None, underscored, slice_inside)],
)  # fmt: skip
def test_polar_state_with_a_base_model(
    codebook: str, method: str | None, spell: Any, slices: Any, hf_folders: dict[str, Folders], tmp_path: Path
) -> None:
    base = hf_folders["gemma4"].original
    model = stored(base)
    tensors, _ = polar_state(model, spell, slices, codebook=codebook, names=coded_names(model))
    check(write(tmp_path / "polar", tensors, base, method), base, codebook, tmp_path)


@pytest.mark.parametrize(("bits", "form"), [(5, "lsb"), (4, "nibbles"), (5, "int8")])
def test_older_forms(bits: int, form: str, hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    """Codes that are not packed MSB-first, and a table for every layer."""
    base = hf_folders["llama"].original
    model = stored(base)
    tensors: Tensors = {}
    for name in coded_names(model):
        parts, _ = legacy(model[name], bits, form, True, 128)
        tensors |= {key.replace(LINEAR, name.removesuffix(".weight")): value for key, value in parts.items()}
    check(write(tmp_path / "older", tensors, base, "polar"), base, None, tmp_path)


def test_without_the_base_model_what_is_missing_is_named(hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    base = hf_folders["gemma4"].original
    model = stored(base)
    tensors, _ = polar_state(model, names=coded_names(model))
    folder = write(tmp_path / "polar", tensors, base, "polarengine")
    with pytest.raises(CheckpointError, match=r"norm.* is missing; .*HLWQConfig\(base_model=") as caught:
        load(folder, quantization_config=HLWQConfig(codebook="A"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"give --codebook A, B or C"):
        load(folder)
