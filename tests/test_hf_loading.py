"""HLWQ checkpoints that transformers decodes while it loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, IDS, Folders, assert_same_tensors, load, logits, stored
from hlwq_files import edit_json, edit_tensors
from transformers import AutoModel, AutoModelForSequenceClassification

from vllm_hlwq import HLWQConfig
from vllm_hlwq.errors import CheckpointError


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dequantised_model(name: str, hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders[name]
    model = load(folders.coded)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(load(folders.decoded)))
    assert not torch.equal(logits(model), logits(load(folders.original)))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_another_dtype_is_the_dequantised_model_in_that_dtype(name: str, hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders[name]
    found = load(folders.coded, dtype=torch.float32)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(logits(found), logits(load(folders.decoded, dtype=torch.float32)))


def test_it_is_an_ordinary_model_afterwards(hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    """Saved, it is what ``hlwq dequantize`` writes, and nothing in it speaks of HLWQ."""
    folders = hf_folders["qwen3_moe"]
    model = load(folders.coded)
    model.save_pretrained(tmp_path)
    assert_same_tensors(stored(tmp_path), stored(folders.decoded))
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert model.get_input_embeddings().weight.requires_grad


def test_an_image_is_answered(hf_folders: dict[str, Folders]) -> None:
    """The vision tower is in the file in 16 bit, and the tokens after an image depend on it."""
    folders = hf_folders["gemma4_multimodal"]
    names = [name for name in stored(folders.coded) if "vision" in name]
    assert names
    assert not [name for name in names if name.endswith("__packed")]
    grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).view(1, 36, 2)
    ids = torch.tensor([[2, 502, 500, 500, 500, 500, 503, 17, 99]])
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 36, 3 * 16**2, generator=generator) for _ in range(2)]

    def answer(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        return model.generate(
            input_ids=ids, pixel_values=image, image_position_ids=grid, mm_token_type_ids=(ids == 500).long(),
            max_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True,
        ).scores[0]  # fmt: skip

    found, wanted = load(folders.coded), load(folders.decoded)
    coded = load(folders.coded, "coded")
    for image in images:
        assert torch.equal(answer(found, image), answer(wanted, image))
        scores = answer(coded, image)
        assert float((scores - answer(wanted, image)).norm() / scores.norm()) < 0.1
    assert not torch.equal(answer(found, images[0]), answer(found, images[1]))


def test_greedy_tokens_are_the_same(hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders["llama"]
    tokens = [load(path).generate(IDS, max_new_tokens=12, do_sample=False) for path in (folders.coded, folders.decoded)]
    assert torch.equal(*tokens)


def test_without_our_list_of_parameters(hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    """What transformers downloads of a model on the hub: weights and config.json."""
    folders = hf_folders["qwen3_moe"]
    for file in (*folders.coded.glob("*.safetensors"), folders.coded / "config.json"):
        shutil.copy(file, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(load(folders.decoded)))


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def damaged(hf_folders: dict[str, Folders], tmp_path: Path) -> Path:
    """A copy without the lists that would name a change first."""
    shutil.copytree(hf_folders["qwen3_moe"].coded, tmp_path / "damaged")
    for name in ("hlwq_sha256.json", "hlwq_config.json"):
        (tmp_path / "damaged" / name).unlink()
    return tmp_path / "damaged"


NORM = "model.layers.1.input_layernorm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("mode", ["decode", "coded"])
@pytest.mark.parametrize("missing", [NORM, Q_PROJ, "lm_head.weight"])
def test_a_missing_tensor_is_named(missing: str, mode: str, damaged: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(missing)]:
            del tensors[name]

    edit_tensors(damaged / "model.safetensors", drop)
    assert missing in refusal(damaged, mode=mode)


@pytest.mark.parametrize("mode", ["decode", "coded"])
def test_a_wrong_shape_is_named(mode: str, damaged: Path) -> None:
    edit_tensors(damaged / "model.safetensors", lambda tensors: tensors.update({NORM: torch.ones(64)}))
    message = refusal(damaged, mode=mode)
    assert NORM in message
    assert "[64]" in message


@pytest.mark.parametrize("mode", ["decode", "coded"])
def test_a_missing_expert_is_named(mode: str, damaged: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("packed", "norms", "meta"):
            del tensors[f"model.layers.0.mlp.experts.3.up_proj.weight__{part}"]

    edit_tensors(damaged / "model.safetensors", drop)
    assert "experts.3.up_proj" in refusal(damaged, mode=mode)


@pytest.mark.parametrize("mode", ["decode", "coded"])
def test_a_coded_tensor_of_another_size_is_named(mode: str, damaged: Path) -> None:
    """A whole matrix of fewer rows than the model's."""

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        rows, blocks, size, _, columns = tensors[f"{Q_PROJ}__meta"].tolist()
        half = rows // 2
        tensors[f"{Q_PROJ}__packed"] = tensors[f"{Q_PROJ}__packed"].chunk(2)[0].clone()
        tensors[f"{Q_PROJ}__norms"] = tensors[f"{Q_PROJ}__norms"][:half].clone()
        tensors[f"{Q_PROJ}__meta"] = torch.tensor([half, blocks, size, half * blocks * size, columns])

    edit_tensors(damaged / "model.safetensors", shorten)
    assert "self_attn.q_proj" in refusal(damaged, mode=mode)


@pytest.mark.parametrize(
    ("setting", "value"), [("packing", "lsb"), ("rotation", "dct"), ("norm_dtype", "float8"), ("bits", 6)]
)
def test_an_unknown_format_is_named(setting: str, value: object, damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda config: config["quantization_config"].update({setting: value}))
    message = refusal(damaged)
    assert setting in message or "bits" in message


def test_the_old_name_of_the_method(damaged: Path, hf_folders: dict[str, Folders]) -> None:
    edit_json(damaged / "config.json", lambda config: config["quantization_config"].update(quant_method="polar"))
    assert torch.equal(logits(load(damaged)), logits(load(hf_folders["qwen3_moe"].decoded)))


def test_a_mode_in_the_checkpoint_holds_and_the_users_goes_before(damaged: Path) -> None:
    edit_json(damaged / "config.json", lambda config: config["quantization_config"].update(mode="coded"))
    assert load(damaged).config.quantization_config.mode == "coded"
    assert not hasattr(load(damaged, "decode").config, "quantization_config")


def test_a_head_that_no_checkpoint_has_is_not_started_at_random(hf_folders: dict[str, Folders]) -> None:
    with pytest.raises(CheckpointError, match=r"score\.weight is missing"):
        AutoModelForSequenceClassification.from_pretrained(hf_folders["llama"].coded)
    AutoModel.from_pretrained(hf_folders["llama"].coded)  # has fewer parameters than the checkpoint


@pytest.mark.parametrize(
    ("option", "value"), [("mode", "fast"), ("bits", 9), ("bits", 5.0), ("codebook", "D"), ("fit", "best")]
)
def test_options_are_checked(option: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{option} is {value!r}; give one of"):
        HLWQConfig(**{option: value})
