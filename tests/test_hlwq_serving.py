"""vLLM on HLWQ checkpoints themselves: the weights of their exported siblings, bit for bit, without the export."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LoadedModel, engine_config
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from vllm_hlwq.checkpoint.dequantize import dequantize
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.checkpoint.reader import HlwqSource
from vllm_hlwq.errors import CheckpointError
from vllm_hlwq.hlwq_serving import HlwqLoader

CACHE_SIZE = 4


@pytest.fixture(scope="module", params=["gemma4", "qwen3_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A coded checkpoint and its INT4 sibling."""
    out = tmp_path_factory.mktemp(request.param)
    quantize(request.getfixturevalue(f"{request.param}_bf16"), out / "coded")
    export_int4(HlwqSource(out / "coded"), out / "int4")
    return out / "coded", out / "int4"


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """All parameters of the model, and all records of its experts."""
    model = loaded.worker.model_runner.model
    found = {name: parameter.data for name, parameter in model.named_parameters()}
    for number, runner in enumerate(loaded.runners):
        found[f"records {number}"] = runner.routed_experts.expert_cache.store.records
    return found


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def test_the_weights_are_those_of_the_exported_sibling(pair: tuple[Path, Path]) -> None:
    coded, sibling = pair
    direct, exported = (LoadedModel(path, CACHE_SIZE) for path in (coded, sibling))
    assert direct.config.model_config.quantization == "polarengine"
    assert direct.config.quant_config.ignore == exported.config.quant_config.ignore
    found = weights(direct)
    assert sum(name.startswith("records") for name in found) == 2
    assert_same_weights(found, weights(exported))
    hidden, logits = torch.randn(9, 128).bfloat16(), torch.randn(9, 16)
    for layer in range(2):
        assert torch.equal(direct.run(layer, hidden, logits), exported.run(layer, hidden, logits))


def test_a_dense_model_is_that_of_the_decoded_checkpoint(dense_bf16: Path, tmp_path: Path) -> None:
    quantize(dense_bf16, tmp_path / "coded")
    dequantize(HlwqSource(tmp_path / "coded"), tmp_path / "bf16")
    direct, decoded = (LoadedModel(tmp_path / name, 0) for name in ("coded", "bf16"))
    assert_same_weights(weights(direct), weights(decoded))


def test_what_drafts_for_a_coded_model_is_read_as_it_is(pair: tuple[Path, Path], dense_bf16: Path) -> None:
    drafting = {"method": "draft_model", "model": str(dense_bf16), "num_speculative_tokens": 2}
    config = engine_config(pair[0], CACHE_SIZE, speculative_config=drafting)
    assert config.load_config.load_format == "hlwq"
    loader = HlwqLoader(config.load_config)
    read = dict(loader.get_all_weights(config.speculative_config.draft_model_config, torch.nn.Module()))
    stored = load_file(dense_bf16 / "model.safetensors")
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) for name in stored)


def test_a_coded_draft_that_does_not_say_so_is_decoded(
    pair: tuple[Path, Path], dense_bf16: Path, tmp_path: Path
) -> None:
    quantize(dense_bf16, tmp_path / "coded")
    draft = copy_with(tmp_path / "coded", tmp_path / "unnamed", lambda config: config.pop("quantization_config"))
    drafting = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    config = engine_config(pair[0], CACHE_SIZE, speculative_config=drafting)
    loader = HlwqLoader(config.load_config)
    read = dict(loader.get_all_weights(config.speculative_config.draft_model_config, torch.nn.Module()))
    assert read.keys() == load_file(dense_bf16 / "model.safetensors").keys()


def test_a_coded_draft_with_experts_that_does_not_say_so_is_decoded_to_16_bit(
    pair: tuple[Path, Path], qwen3_moe_bf16: Path, tmp_path: Path
) -> None:
    """vLLM has made a model without quantisation for it."""
    quantize(qwen3_moe_bf16, tmp_path / "coded")
    dequantize(HlwqSource(tmp_path / "coded"), tmp_path / "bf16")
    draft = copy_with(tmp_path / "coded", tmp_path / "unnamed", lambda config: config.pop("quantization_config"))
    drafting = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    config = engine_config(pair[0], CACHE_SIZE, speculative_config=drafting)
    loader = HlwqLoader(config.load_config)
    read = dict(loader.get_all_weights(config.speculative_config.draft_model_config, torch.nn.Module()))
    wanted = load_file(tmp_path / "bf16" / "model.safetensors")
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)


def test_the_log_gives_the_seconds_of_loading(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = []
    load = HlwqLoader.load_weights

    def watched(self: Any, *arguments: Any) -> Any:
        loaders.append(self)
        return load(self, *arguments)

    monkeypatch.setattr(HlwqLoader, "load_weights", watched)
    start = time.perf_counter()
    LoadedModel(pair[0], CACHE_SIZE)
    (loader,) = loaders
    logged = loader.counter_after_loading_weights - loader.counter_before_loading_weights
    assert 0 < logged < time.perf_counter() - start


def copy_with(coded: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose config.json is another."""
    shutil.copytree(coded, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_older_names_and_none_are_recognised(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "polar"

    coded, sibling = pair
    wanted = weights(LoadedModel(sibling, CACHE_SIZE))
    older = copy_with(coded, tmp_path / "older", rename)
    unnamed = copy_with(coded, tmp_path / "unnamed", lambda config: config.pop("quantization_config"))
    for path in (older, unnamed):
        assert_same_weights(weights(LoadedModel(path, CACHE_SIZE)), wanted)


def test_what_the_checkpoint_lacks_comes_from_the_base_model(
    pair: tuple[Path, Path], qwen3_moe_bf16: Path, gemma4_bf16: Path, tmp_path: Path
) -> None:
    coded, sibling = pair
    base = gemma4_bf16 if "gemma4" in str(coded) else qwen3_moe_bf16
    partial = tmp_path / "partial"
    shutil.copytree(coded, partial)
    (file,) = partial.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    for sums in partial.glob("hlwq_*.json"):
        sums.unlink()
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not in it; give --base-model"):
        LoadedModel(partial, CACHE_SIZE)
    options = {"base_model": str(base)}
    loaded = LoadedModel(partial, CACHE_SIZE, model_loader_extra_config=options)
    assert_same_weights(weights(loaded), weights(LoadedModel(sibling, CACHE_SIZE)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"load_format": "sharded_state"},
            "--load-format sharded_state cannot read HLWQ checkpoints: leave it at auto",
        ),
        (
            {"model_loader_extra_config": {"base": "x"}},
            "'base' is no option of HLWQ checkpoints, which have base_model",
        ),
        ({"model_loader_extra_config": {"codebook": "Z"}}, "no codebook 'Z'; give A or B or C"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair: tuple[Path, Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        EngineArgs(model=str(pair[0]), max_model_len=64, **arguments).create_engine_config()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_refused_before_the_engine_starts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pair[0], damaged)
    (file,) = damaged.glob("*.safetensors")
    tensors = {name: t for name, t in load_file(file).items() if not ("o_proj" in name and "norms" in name)}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="o_proj"):
        EngineArgs(model=str(damaged), max_model_len=64).create_engine_config()
