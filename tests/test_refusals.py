"""What cannot be honoured is refused in one line that names thing, value and remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import LoadedModel, engine_config
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.offloader.prefetch import _CpuParamOffloader

from vllm_hlwq.bench.server import ENVIRONMENT, VLLM
from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checks import check_engine_config
from vllm_hlwq.errors import ExpertCacheError
from vllm_hlwq.expert_formats import SIXTEEN_BIT
from vllm_hlwq.marlin_moe import device_obstacle
from vllm_hlwq.options import ExpertCacheOptions


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(ExpertCacheError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Before any weight is loaded: the finished configuration.


def test_more_slots_than_experts(qwen3_moe_bf16: Path) -> None:
    message = refusal(lambda: engine_config(qwen3_moe_bf16, 17))
    assert message == (
        "--moe-expert-cache-size 17 is more than the model's 16 experts per layer; give a number from 1 to 16"
    )


@pytest.mark.parametrize("value", [-1, "4", 1.5])
def test_no_count(qwen3_moe_bf16: Path, value: object) -> None:
    arguments = EngineArgs(model=str(qwen3_moe_bf16), additional_config={"moe_expert_cache_size": value})
    assert f"moe_expert_cache_size={value!r}" in refusal(arguments.create_engine_config)


def test_a_model_without_experts(dense_bf16: Path) -> None:
    message = refusal(lambda: engine_config(dense_bf16, 4))
    assert message.startswith(f"{dense_bf16} has no mixture-of-experts layers")
    assert message.endswith("remove --moe-expert-cache-size")


def test_lora(qwen3_moe_bf16: Path) -> None:
    assert "remove --enable-lora" in refusal(lambda: engine_config(qwen3_moe_bf16, 4, enable_lora=True))


def test_a_moe_backend_of_vllms(qwen3_moe_bf16: Path) -> None:
    message = refusal(lambda: engine_config(qwen3_moe_bf16, 4, moe_backend="triton"))
    assert "--moe-backend triton cannot be honoured" in message


@pytest.mark.parametrize("names", [set(), {"experts"}, {"mlp.experts.w13_weight"}])
def test_offloading_that_would_take_experts(qwen3_moe_bf16: Path, names: set[str]) -> None:
    message = refusal(lambda: engine_config(qwen3_moe_bf16, 4, cpu_offload_gb=1, cpu_offload_params=names))
    assert "--cpu-offload-gb 1.0 would take experts" in message


@pytest.mark.parametrize("names", [set(), {"experts"}, {"w13_weight", "w2_weight"}])
def test_prefetching_that_would_take_experts(qwen3_moe_bf16: Path, names: set[str]) -> None:
    message = refusal(lambda: engine_config(qwen3_moe_bf16, 4, offload_group_size=2, offload_params=names))
    assert "--offload-group-size 2 would take experts" in message


@pytest.mark.parametrize("name", ["self_attn", "w2"])
def test_offloading_of_other_weights_is_allowed(qwen3_moe_bf16: Path, name: str) -> None:
    engine_config(qwen3_moe_bf16, 4, cpu_offload_gb=1, cpu_offload_params={name})


def test_sums_that_no_batch_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM reads it once; set in the environment it would stay for the tests that follow.
    monkeypatch.setattr("vllm_hlwq.marlin_moe.borrow", {"VLLM_BATCH_INVARIANT": True}.__getitem__)
    message = device_obstacle(SIXTEEN_BIT, None)
    assert message is not None
    assert message.startswith("VLLM_BATCH_INVARIANT=1 asks for")


@pytest.mark.parametrize(
    ("part", "setting", "value", "remedy"),
    [
        ("parallel_config", "enable_eplb", True, "remove --enable-eplb"),
        ("parallel_config", "enable_elastic_ep", True, "remove --enable-elastic-ep"),
        ("parallel_config", "enable_dbo", True, "remove --enable-dbo"),
        ("parallel_config", "ubatch_size", 2, "remove --enable-dbo and --ubatch-size"),
        ("parallel_config", "data_parallel_size", 2, "set --data-parallel-size 2 to 1"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size 2 gives layers more"),
        ("parallel_config", "worker_cls", "some.Worker", "--worker-cls some.Worker replaces the worker"),
        ("model_config", "enable_sleep_mode", True, "remove --enable-sleep-mode"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill gives later layers fewer tokens"),
    ],
)
def test_settings_that_vllm_itself_does_not_admit_on_a_cpu(
    qwen3_moe_bf16: Path, part: str, setting: str, value: object, remedy: str
) -> None:
    config = engine_config(qwen3_moe_bf16, 4)
    object.__setattr__(getattr(config, part), setting, value)
    assert remedy in refusal(lambda: check_engine_config(config, ExpertCacheOptions(cache_size=4)))


def test_a_mask_of_padding_that_vllm_does_not_keep(qwen3_moe_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, on_cuda = engine_config(qwen3_moe_bf16, 4), False
    platform = SimpleNamespace(is_cpu=lambda: not on_cuda, is_cuda=lambda: on_cuda, device_name="any")
    names = {"current_platform": platform, "VLLM_MOE_SKIP_PADDING": False}
    monkeypatch.setattr("vllm_hlwq.checks.borrow", names.__getitem__)
    check_engine_config(config, ExpertCacheOptions(cache_size=4))  # a CPU has no captured steps
    on_cuda = True
    message = refusal(lambda: check_engine_config(config, ExpertCacheOptions(cache_size=4)))
    assert message.startswith("VLLM_MOE_SKIP_PADDING=0 leaves")


def test_a_moe_backend_for_drafts(qwen3_moe_bf16: Path) -> None:
    drafting = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "moe_backend": "triton"}
    message = refusal(lambda: engine_config(qwen3_moe_bf16, 4, speculative_config=drafting))
    assert "--speculative-config's moe_backend triton cannot be honoured" in message


# While the model is built or loaded.


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"cpu_offload_gb": 1, "cpu_offload_params": {"self_attn", "mlp"}}, "--cpu-offload-params mlp"),
        ({"offload_group_size": 2, "offload_params": {"mlp"}}, "--offload-params mlp"),
    ],
)
def test_offloading_of_the_block_around_the_experts(
    qwen3_moe_bf16: Path, arguments: dict[str, Any], option: str
) -> None:
    """The block's name is the model's, so it is known only once that is built; vLLM copies it right afterwards."""
    message = refusal(lambda: LoadedModel(qwen3_moe_bf16, 4, **arguments))
    assert message.startswith(f"{option} would take the experts of model.layers.0.mlp.experts, which")


def test_offloading_of_a_block_beside_the_experts(qwen3_moe_bf16: Path) -> None:
    """Prefetching is not on, so what it would take does not count."""
    LoadedModel(qwen3_moe_bf16, 4, cpu_offload_gb=1, cpu_offload_params={"self_attn"}, offload_params={"mlp"})


def prefetch_offloaded(model: torch.nn.Module, name: str) -> None:
    _CpuParamOffloader(model, name)


def replaced(model: torch.nn.Module, name: str) -> None:
    layer = model.get_submodule(name.rpartition(".")[0])
    layer.w2_weight = torch.nn.Parameter(layer.w2_weight.data.clone(), requires_grad=False)


@pytest.mark.parametrize("checkpoint", ["qwen3_moe_bf16", "gpt_oss_bf16"])
@pytest.mark.parametrize(("move", "before_loading"), [(prefetch_offloaded, True), (replaced, False)])
def test_experts_that_something_else_moved_while_they_were_loaded(
    request: pytest.FixtureRequest,
    checkpoint: str,
    move: Callable[[torch.nn.Module, str], None],
    before_loading: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = DefaultModelLoader.load_weights

    def offloaded(self: DefaultModelLoader, model: torch.nn.Module, model_config: object) -> None:
        name = next(name for name, _ in model.named_parameters() if name.endswith("routed_experts.w2_weight"))
        if before_loading:
            move(model, name)
        load(self, model, model_config)
        if not before_loading:
            move(model, name)

    monkeypatch.setattr(DefaultModelLoader, "load_weights", offloaded)
    message = refusal(lambda: LoadedModel(request.getfixturevalue(checkpoint), 4))
    assert message.startswith("model.layers.0.mlp.experts: something else moved w2_weight")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))


def change_quantization(checkpoint: Path, **weights: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights)
    (checkpoint / "config.json").write_text(json.dumps(config))


def test_a_quantisation_without_a_backend_is_named(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    export_int4(qwen3_moe_bf16, tmp_path)
    change_quantization(tmp_path, num_bits=8)
    message = refusal(lambda: LoadedModel(tmp_path, 4))
    assert "experts quantised as compressed-tensors 8-bit int weights, 16-bit activations" in message


def test_projections_with_different_schemes(qwen3_moe_bf16: Path, tmp_path: Path) -> None:
    export_int4(qwen3_moe_bf16, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*experts.*down_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "one scheme for gate, up and down" in refusal(lambda: LoadedModel(tmp_path, 4))


def test_a_layer_that_is_not_ours(qwen3_moe_bf16: Path) -> None:
    message = refusal(lambda: LoadedModel(qwen3_moe_bf16, 2, load_format="dummy", model_impl="transformers"))
    assert "TransformersRoutedExperts, which the expert cache does not replace" in message


def test_an_expert_missing_from_the_checkpoint(
    qwen3_moe_bf16: Path, tmp_path: Path, copy_of: Callable[[Path], Path]
) -> None:
    export_int4(qwen3_moe_bf16, tmp_path / "int4")
    checkpoint = copy_of(tmp_path / "int4")
    state = load_file(checkpoint / "model.safetensors")
    del state["model.layers.1.mlp.experts.9.up_proj.weight_packed"]
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = refusal(lambda: LoadedModel(checkpoint, 4))
    assert (
        "model.layers.1.mlp.experts: the checkpoint lacks 1 expert tensors, first w13_weight_packed (w3) of expert 9"
        in message
    )


def test_a_tensor_of_the_wrong_shape(qwen3_moe_bf16: Path, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    export_int4(qwen3_moe_bf16, tmp_path / "int4")
    checkpoint = copy_of(tmp_path / "int4")
    state = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight_packed"
    state[name] = state[name][:, :-1].contiguous()
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = refusal(lambda: LoadedModel(checkpoint, 4))
    assert "w2_weight_packed of expert 3 has shape (128, 15), the model needs (128, 16)" in message


def test_weights_cannot_be_reloaded(qwen3_moe_bf16: Path) -> None:
    loaded = LoadedModel(qwen3_moe_bf16, 4)
    assert "restart the server" in refusal(loaded.worker.reload_weights)
    for save in (loaded.worker.save_sharded_state, loaded.worker.save_tensorized_model):
        assert "copy the checkpoint instead" in refusal(save)
    assert "restart the server" in refusal(lambda: loaded.runners[0].routed_experts.load_weights([]))


# The command line itself: one line, exit code not 0, no server.


def vllm(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.server
def test_the_command_line_refuses_in_one_line(
    qwen3_moe_bf16: Path, dense_bf16: Path, copy_of: Callable[[Path], Path]
) -> None:
    truncated = copy_of(qwen3_moe_bf16)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    flag = "--moe-expert-cache-size"
    cases = {
        (str(qwen3_moe_bf16), flag, "-1"): "argument --moe-expert-cache-size: '-1' is not a whole number of experts",
        (str(qwen3_moe_bf16), flag, "many"): "argument --moe-expert-cache-size: 'many' is not a whole number",
        (str(qwen3_moe_bf16), flag, "17"): "--moe-expert-cache-size 17 is more than the model's 16 experts per layer",
        (str(dense_bf16), flag, "4"): "has no mixture-of-experts layers",
        (str(truncated), flag, "4"): "model.safetensors: truncated: tensor",
        (str(qwen3_moe_bf16), flag, "4", "--cpu-offload-gb", "1"): "--cpu-offload-gb 1.0 would take experts",
    }
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda arguments: vllm(VLLM, "serve", *arguments), cases))
    for expected, result in zip(cases.values(), results, strict=True):
        assert result.returncode != 0
        last = result.stderr.strip().splitlines()[-1]
        assert expected in last
        assert "error:" in last
        assert "Traceback" not in result.stderr


@pytest.mark.server
def test_the_flag_is_known_wherever_engine_arguments_are(tmp_path: Path, dense_bf16: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {dense_bf16}\nmoe-expert-cache-size: 4\n")
    api_server = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    commands = {
        (VLLM, "serve", "--help=ExpertCache"): "--moe-expert-cache-size N",
        (VLLM, "bench", "throughput", "--help=ExpertCache"): "--moe-expert-cache-size N",
        (*api_server, "--model", str(dense_bf16), "--moe-expert-cache-size", "4"): "no mixture-of-experts layers",
        (VLLM, "serve", "--config", str(config)): "no mixture-of-experts layers",
    }
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda command: vllm(*command), commands))
    for expected, result in zip(commands.values(), results, strict=True):
        assert expected in result.stdout + result.stderr
