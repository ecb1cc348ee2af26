"""``hlwq plan``: the arithmetic of ``auto`` from headers or ``config.json`` alone, held against real servers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import fails, succeeds
from engines import LoadedModel, engine_config

from vllm_hlwq.checkpoint.export import export_int4
from vllm_hlwq.checkpoint.tensor_folder import TensorFolder
from vllm_hlwq.checkpoint_sizes import model_sizes
from vllm_hlwq.config_facts import configured_model
from vllm_hlwq.engine_sizes import device_estimate, model_facts
from vllm_hlwq.gpus import GPUS, Gpu
from vllm_hlwq.options import ExpertCacheOptions
from vllm_hlwq.planning import Plan, Settings
from vllm_hlwq.served_checkpoint import model_folder
from vllm_hlwq.sizing import graphs_captured, kv_floor_elements

GIB = 2**30
SHIPPED = Path(__file__).parent.parent / "examples/tiny_moe/model"


def plan(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeeds("plan", *arguments, "--json"))
    return found


def without_weights(model: Path, out: Path) -> Path:
    """Its configuration alone."""
    out.mkdir(exist_ok=True)
    shutil.copy(model / "config.json", out)
    return out


# Against what real servers report.


@pytest.mark.parametrize("model", ["tiny_int4", "gemma4_bf16", "qwen3_moe_bf16"])
@pytest.mark.parametrize(("slots", "staging"), [(4, None), (15, None), (3, 5)])
def test_a_server_reports_what_was_planned(
    request: pytest.FixtureRequest, model: str, slots: int, staging: int | None
) -> None:
    path = request.getfixturevalue(model)
    words = ["--slots", slots, "--vram", "24GiB", "--reference"] + (["--staging-size", staging] if staging else [])
    report = plan(path, *words)
    sizes = LoadedModel(path, slots, staging_size=staging, gpu_memory_utilization=0.3).worker.expert_cache_sizes()
    target = report["target"]
    assert (report["layers"], report["experts"], target["slots"]) == (sizes["layers"], sizes["experts"], slots)
    planned = [report["expert_bytes"], *(target[f"{part}_bytes"] for part in ("slot", "staging", "host"))]
    reported = [sizes[f"{part}_bytes"] for part in ("record", "slot", "staging", "host")]
    assert all(abs(have - wanted) <= 0.03 * wanted for have, wanted in zip(planned, reported, strict=True))
    assert planned == reported


@pytest.mark.parametrize("model", ["tiny_int4", "gemma4_bf16", "qwen3_moe_bf16"])
def test_a_plan_is_what_a_worker_would_estimate(request: pytest.FixtureRequest, model: str) -> None:
    path = request.getfixturevalue(model)
    arguments = {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 8, "enforce_eager": True}
    config = engine_config(path, "auto", gpu_memory_utilization=0.3, **arguments)
    config.cache_config.kv_cache_memory_bytes = None
    estimate = device_estimate(config, ExpertCacheOptions(cache_size="auto", kv_floor_seqs=3), 20 * GIB)
    settings = Settings(context=512, max_num_batched_tokens=256, max_num_seqs=8, kv_floor_seqs=3)
    planned = Plan(path, settings).estimate(20 * GIB)
    assert planned.banks == estimate.banks
    assert (planned.dense, planned.workspace) == (estimate.dense, estimate.workspace)
    # On this machine vLLM runs its first model runner, without graphs; steps overlap on a GPU by default.
    assert planned.margin == estimate.margin
    assert planned.kv_cache >= estimate.kv_cache


@pytest.mark.parametrize("model", ["gemma4", "qwen3_moe", "glm4_moe", "mixtral", "olmoe"])
def test_a_configuration_is_read_as_vllm_reads_it(layout_models: dict[str, Path], model: str) -> None:
    path = layout_models[model]
    config = engine_config(path, 0, max_model_len=512).model_config
    read = configured_model(path, 512)
    assert read.facts == model_facts(config)
    assert read.top_k == config.get_num_experts_per_tok()


# One model in many forms.


def test_an_hlwq_checkpoint_is_planned_as_its_export(tiny_int4: Path) -> None:
    coded, exported = plan(SHIPPED), plan(tiny_int4)
    assert (coded.pop("format"), exported.pop("format")) == ("HLWQ", "INT4")
    assert (coded.pop("model"), exported.pop("model")) == ("model", tiny_int4.name)
    assert coded == exported
    assert (coded["expert_bytes"], coded["group_size"]) == (78_336, 64)


@pytest.mark.parametrize("model", ["gemma4_bf16", "qwen3_moe_bf16", "tiny_int4"])
def test_config_json_alone_is_enough(request: pytest.FixtureRequest, model: str, tmp_path: Path) -> None:
    path = request.getfixturevalue(model)
    bare = without_weights(path, tmp_path / path.name)
    assert plan(bare) == plan(path)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="vLLM's class of multimodal Gemma-4 needs torchvision, which vLLM's CPU runtime does not bring",
)
def test_a_model_with_a_vision_tower_is_planned_without_it(layout_exports: dict[str, Path]) -> None:
    path = layout_exports["gemma4_multimodal"]
    config = engine_config(path, 0, max_model_len=512).model_config
    facts = replace(model_facts(config), towers=False)
    assert plan(path)["dense_bytes"] == model_sizes(TensorFolder(path).tensors, facts).dense_bytes


def test_a_vision_tower_changes_no_slot(layout_exports: dict[str, Path], tmp_path: Path) -> None:
    path = layout_exports["gemma4_multimodal"]
    assert plan(without_weights(path, tmp_path / path.name))["slot_bytes"] == plan(path)["slot_bytes"]


def test_asymmetric_int4_from_config_json_alone(gemma4_bf16: Path, tmp_path: Path) -> None:
    export_int4(gemma4_bf16, tmp_path / "model", group_size=32, symmetric=False)
    bare = without_weights(tmp_path / "model", tmp_path / "bare")
    (whole, alone) = (plan(tmp_path / "model"), plan(bare))
    assert whole["expert_bytes"] == alone["expert_bytes"] == 3 * 192 * 128 * 37 // 64


def test_int4_outside_the_experts_is_not_guessed(gemma4_bf16: Path, tmp_path: Path) -> None:
    export_int4(gemma4_bf16, tmp_path / "model", linears=True)
    bare = without_weights(tmp_path / "model", tmp_path / "bare")
    assert "config.json does not say that" in fails("plan", bare)
    assert plan(tmp_path / "model")["expert_bytes"] == 78_336 // 2
    config = json.loads((bare / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:.*self_attn.*", "re:.*mlp.*"]
    (bare / "config.json").write_text(json.dumps(config))
    assert plan(bare)["dense_bytes"] == plan(gemma4_bf16)["dense_bytes"]


@pytest.mark.parametrize(
    ("ignore", "said"),
    [
        (["re:("], "config.json's ignore holds '(', no regular expression"),
        ([1], "config.json's ignore is [1], no list of names"),
        (-1, "config.json's ignore is -1, no list of names"),
    ],
)
def test_names_to_ignore_that_are_none(gemma4_bf16: Path, tmp_path: Path, ignore: object, said: str) -> None:
    export_int4(gemma4_bf16, tmp_path / "model")
    bare = without_weights(tmp_path / "model", tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    config["quantization_config"]["ignore"] = ignore
    (bare / "config.json").write_text(json.dumps(config))
    assert said in fails("plan", bare)


def test_groups_that_are_none_are_refused(gemma4_bf16: Path, tmp_path: Path) -> None:
    export_int4(gemma4_bf16, tmp_path / "model")
    bare = without_weights(tmp_path / "model", tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    for groups in ({"a": 1}, [1], {"a": 1} | config["quantization_config"]["config_groups"]):
        config["quantization_config"]["config_groups"] = groups
        (bare / "config.json").write_text(json.dumps(config))
        assert "is not known from config.json; download the model" in fails("plan", bare)


def test_a_name_of_the_hub_is_found_in_its_cache(
    tiny_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--tiny/snapshots/0123"
    shutil.copytree(tiny_int4, snapshot)
    (tmp_path / "models--owner--tiny/refs").mkdir()
    (tmp_path / "models--owner--tiny/refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_folder("owner/tiny", None) == snapshot
    assert model_folder("owner/tiny", "0123") == snapshot
    assert model_folder("owner/other", None) is None
    assert model_folder("no/such/name", None) is None
    assert model_folder(str(tiny_int4), None) == tiny_int4
    assert plan("owner/tiny")["expert_bytes"] == 78_336
    assert fails("plan", "owner/other") == (
        "owner/other: is no folder, and the hub's cache has no model of that name; give a downloaded model's folder"
    )


def test_an_index_of_other_weights_is_noticed(tiny_int4: Path, tmp_path: Path) -> None:
    bare = without_weights(tiny_int4, tmp_path)
    index = bare / "model.safetensors.index.json"
    # What the weights' files hold is what config.json says.
    header = sum(tensor.bytes for tensor in Plan(tiny_int4, Settings()).served.tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": header}, "weight_map": {}}))
    assert plan(bare)["expert_bytes"] == 78_336
    index.write_text(json.dumps({"metadata": {"total_size": header + 1}, "weight_map": {}}))
    assert fails("plan", bare).startswith(f"{index}: speaks of {header + 1} bytes of weights, config.json of {header}")


# By hand.


def test_numbers_of_a_gpu_by_hand(tiny_int4: Path) -> None:
    words = ["--vram", "3GiB", "--link", "10GB/s", "--slots", 4, "--hit-rate", 0.5, "--hit-rate", 1, "--ram", "7GiB"]
    target = plan(tiny_int4, *words)["target"]
    # 3 layers of 16 experts of 78,336 bytes, 4 a token; two staging banks hold the 12 that have no slot.
    assert target["slot_bytes"] == 3 * 4 * 78_336
    assert target["staging_bytes"] == 2 * 12 * 78_336
    assert target["host_bytes"] == 3 * 16 * 78_336
    assert target["usable"] == 3 * GIB * 98 // 100
    assert target["granted"] == target["usable"] * 92 // 100
    assert (
        target["vram_bytes"] == sum(target["beside_experts"].values()) + target["slot_bytes"] + target["staging_bytes"]
    )
    streamed = 3 * 4 * 78_336 // 2
    assert target["bounds"] == [
        {"hit_rate": 0.5, "bytes_per_token": streamed, "ms_per_token": round(streamed / 10**7, 3)},
        {"hit_rate": 1.0, "bytes_per_token": 0, "ms_per_token": 0.0},
    ]
    assert target["expected"]["hit_rate"] == 0.67  # a quarter of the experts
    assert target["problems"] == []


def test_all_gpus_are_in_the_table_and_the_largest_hold_all(tiny_int4: Path) -> None:
    report = plan(tiny_int4)
    assert [gpu["gpu"] for gpu in report["gpus"]] == [gpu.name for gpu in GPUS]
    assert {gpu["slots"] for gpu in report["gpus"]} == {16}
    printed = succeeds("plan", tiny_int4, "--vram", "24GiB")
    assert all(gpu.name in printed for gpu in GPUS)
    assert "16 of 16 in each layer" in printed
    assert "no promise of speed" in printed


def test_a_gpu_gets_as_many_slots_as_fit_and_not_one_more(tiny_int4: Path) -> None:
    planned = Plan(tiny_int4, Settings(staging_size=1))
    estimate = planned.estimate(0)
    wanted = estimate.bytes(9) * 1000 // 920 * 100 // 98
    # The margin grows with the device, so the size is found by trying.
    size = next(s for s in range(wanted, 2 * wanted, 10_000) if planned.on(Gpu("", s, 1, ""))["slots"] == 9)
    found = planned.on(Gpu("", size, 1, ""))
    banks = planned.estimate(Gpu("", size, 1, "").usable)
    assert banks.bytes(9) <= found["granted"] < banks.bytes(10)


def test_a_step_has_no_more_sequences_than_tokens(tiny_int4: Path) -> None:
    step = Plan(tiny_int4, Settings(max_num_seqs=256, max_num_batched_tokens=48)).step
    assert (step.tokens, step.sequences, step.graphs) == (48, 48, graphs_captured(48, 48))
    said = succeeds("plan", tiny_int4, "--max-num-batched-tokens", 48)
    assert "steps of 48 tokens, 48 sequences" in said
    assert "steps of 48 tokens, 9 sequences" in succeeds(
        "plan", tiny_int4, "--max-num-batched-tokens", 48, "--max-num-seqs", 9
    )


@pytest.mark.parametrize("tokens", [16, 48])
def test_the_kv_floor_holds_the_tokens_of_two_steps_that_overlap(tiny_int4: Path, tokens: int) -> None:
    planned = Plan(tiny_int4, Settings(max_num_batched_tokens=tokens, kv_floor_seqs=3, context=1024))
    layers = planned.sizes.kv_layers
    assert {layer.window is None for layer in layers} == {False, True}
    assert planned.kv_floor == 3 * 2 * kv_floor_elements(layers, 1024, 2 * tokens)


def test_a_context_beyond_the_model_is_said(tiny_int4: Path) -> None:
    assert "2 sequences of 2,048 tokens: at most" in succeeds("plan", tiny_int4, "--context", 2048)
    said = succeeds("plan", tiny_int4, "--context", 2049)
    assert "2 sequences of 2,049 tokens (config.json says 2,048, and vllm serve may refuse more): at most" in said


def test_what_does_not_fit_is_said(tiny_int4: Path) -> None:
    target = plan(tiny_int4, "--vram", "512MiB", "--ram", "1GiB", "--slots", 4)["target"]
    assert not target["fits"]
    remedy = "not even 1 slot fits; lower --max-num-seqs, --max-num-batched-tokens, --context or --kv-floor-seqs"
    needed = round(target["vram_bytes"] / 2**20)
    assert target["problems"][0] == f"4 slots need {needed} MiB of GPU memory, 462 MiB are granted; {remedy}"
    # 3 layers of 16 experts of 78,336 bytes.
    assert target["problems"][1].startswith(
        "4 MiB of page-locked experts and 6,144 MiB for everything else exceed --ram, 1,024 MiB; "
    )
    target = plan(tiny_int4, "--vram", "512MiB")["target"]
    assert (target["slots"], target["fits"]) == (0, False)
    assert "not even 1 slot fits" in target["problems"][0]
    assert "does not fit: not even 1 slot fits" in succeeds("plan", tiny_int4, "--vram", "512MiB")


def test_what_cannot_be_planned_is_refused(dense_bf16: Path, layout_models: dict[str, Path], tmp_path: Path) -> None:
    assert "has no mixture-of-experts layers" in fails("plan", without_weights(dense_bf16, tmp_path / "dense"))
    assert "no mixture-of-experts layers" in fails("plan", dense_bf16)
    assert f"{tmp_path / 'absent'}: is no folder" in fails("plan", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty: holds neither config.json nor a safetensors file" in fails("plan", tmp_path / "empty")
    assert "another format" in fails("plan", layout_models["gpt_oss"])
    assert "--slots 17: the model has 16 experts per layer" in fails("plan", SHIPPED, "--slots", 17)
    assert "--vram '24': not an amount of memory" in fails("plan", SHIPPED, "--vram", "24")
    assert "--link '25GB': not a rate" in fails("plan", SHIPPED, "--vram", "24GiB", "--link", "25GB")
    assert fails("plan", SHIPPED, "--link", "6GB/s") == (
        "--link 6GB/s: of the GPU of --vram, which is not given; add --vram 12GiB, say"
    )
    assert fails("plan", SHIPPED, "--ram", "6GiB") == (
        "--ram 6GiB: judged for the GPU of --vram, which is not given; add --vram 12GiB, say"
    )
    # vLLM's SchedulerConfig says the same of both.
    assert fails("plan", SHIPPED, "--max-num-seqs", 2049) == (
        "--max-num-seqs 2049: more than --max-num-batched-tokens 2048, which vllm serve refuses; lower the one or "
        "raise the other"
    )
    assert "--max-num-seqs 65: more than --max-num-batched-tokens 64" in fails(
        "plan", SHIPPED, "--max-num-seqs", 65, "--max-num-batched-tokens", 64
    )
    other = without_weights(layout_models["qwen3_moe"], tmp_path / "fp8")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "what they take in 'fp8' is not known from config.json" in fails("plan", other)
    (other / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert "transformers cannot tell their shapes from config.json" in fails("plan", other)
