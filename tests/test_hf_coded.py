"""Models whose weights stay coded, and 16-bit models that are coded while they load."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, IDS, Folders, assert_same_tensors, load, logits, stored
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from vllm_hlwq import HLWQConfig
from vllm_hlwq.checkpoint.quantize import quantize
from vllm_hlwq.errors import CheckpointError
from vllm_hlwq.hf import modules
from vllm_hlwq.hf.modules import CodedExperts, CodedModule


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_near_those_of_the_dequantised_model(name: str, hf_folders: dict[str, Folders]) -> None:
    """In float32, so that the only difference is the decoded weights' rounding to BF16."""
    folders = hf_folders[name]
    coded, wanted = (load(*call, dtype=torch.float32) for call in ((folders.coded, "coded"), (folders.decoded,)))
    found = logits(coded)
    assert found.dtype == torch.float32
    assert float((found - logits(wanted)).norm() / logits(wanted).norm()) < 0.02
    original = logits(load(folders.original, dtype=torch.float32))
    assert float((original - logits(wanted)).norm() / logits(wanted).norm()) > 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_every_coded_tensor_of_the_file_is_in_memory_as_it_is(name: str, hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders[name]
    model, tensors = load(folders.coded, "coded"), stored(folders.coded)
    tied = set(model.all_tied_weights_keys)
    held = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    for part in ("__packed", "__norms"):
        wanted = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(part))
        assert sum(parameter.nbytes for name, parameter in held.items() if name.endswith(part)) == wanted
    kept = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("hlwq") and "__" not in name)
    assert sum(parameter.nbytes for name, parameter in held.items() if "__" not in name) == pytest.approx(kept, abs=64)


def test_a_weight_of_whole_blocks_takes_five_and_an_eighth_bits(hf_folders: dict[str, Folders]) -> None:
    model = load(hf_folders["qwen3_moe"].coded, "coded")
    experts = model.model.layers[0].mlp.experts
    bits = 8 * sum(part.nbytes for part in experts.codes("gate_up_proj"))
    assert bits == 5.125 * experts.gate_up_proj.numel()
    assert isinstance(model.model.embed_tokens, CodedModule)


def test_only_the_experts_of_the_tokens_are_decoded(
    hf_folders: dict[str, Folders], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(hf_folders["qwen3_moe"].coded, "coded")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, CodedExperts)
    seen = []

    def count(states: torch.Tensor, packed: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(packed.data_ptr())
        return coded_linear(states, packed, *rest)

    coded_linear = modules.coded_linear
    monkeypatch.setattr(modules, "coded_linear", count)
    ids = torch.tensor([[3, 9], [9, 5]])
    experts(torch.randn(2, 128, dtype=torch.bfloat16), ids, torch.full((2, 2), 0.5, dtype=torch.bfloat16))
    wanted = {
        experts.codes(name)[0][expert].data_ptr()
        for name in modules.STACKS
        if name != "up_proj"
        for expert in (3, 5, 9)
    }
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_codes_are_the_files_own(name: str, hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    folders = hf_folders[name]
    model = load(folders.coded, "coded")
    model.save_pretrained(tmp_path / "once")
    assert_same_tensors(stored(tmp_path / "once"), stored(folders.coded))
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice", max_shard_size="200kB")
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 1
    assert_same_tensors(stored(tmp_path / "twice"), stored(folders.coded))
    assert torch.equal(logits(load(tmp_path / "twice", "decode")), logits(load(folders.decoded)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_16_bit_model_is_coded_while_it_loads(name: str, hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    """As ``hlwq quantize`` codes it, to the last bit."""
    folders = hf_folders[name]
    model = AutoModelForCausalLM.from_pretrained(folders.original, quantization_config=HLWQConfig(bits=5, fit="gain"))
    assert torch.equal(logits(model), logits(load(folders.coded, "coded")))
    model.save_pretrained(tmp_path)
    assert_same_tensors(stored(tmp_path), stored(folders.coded))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["mode"]) == ("polarengine", 5, "coded")


def test_other_bits_and_exceptions(hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    source = hf_folders["llama"].original
    options = HLWQConfig(bits=3, codebook="A", fit="norm", modules_to_not_convert=["lm_head", "self_attn"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
    model.save_pretrained(tmp_path / "saved")
    quantize(source, tmp_path / "wanted", bits=3, codebook_name="A", fit="norm", keep=["lm_head*", "*self_attn*"])
    assert_same_tensors(stored(tmp_path / "saved"), stored(tmp_path / "wanted"))


def test_there_is_nothing_to_decode_in_a_16_bit_model(hf_folders: dict[str, Folders]) -> None:
    with pytest.raises(CheckpointError, match="is not coded"):
        load(hf_folders["llama"].original, "decode")


def test_options_that_a_16_bit_model_has_no_use_for_are_refused(hf_folders: dict[str, Folders]) -> None:
    source = hf_folders["llama"].original
    with pytest.raises(CheckpointError, match="lacks nothing; leave HLWQConfig's base_model out"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=HLWQConfig(base_model=str(source)))
    given = {"quant_method": "polarengine", "bits": 4, "fit": "norm", "codebook": "A"}
    with pytest.raises(CheckpointError, match="a dictionary cannot say codebook, fit; give an HLWQConfig"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=given)
    for kept in ("lm_head", [3]):
        with pytest.raises(CheckpointError, match=r"modules_to_not_convert is .*; give a list of parts of names"):
            HLWQConfig(modules_to_not_convert=kept)


def test_a_dictionary_says_bits_and_exceptions(hf_folders: dict[str, Folders]) -> None:
    given = {"quant_method": "polarengine", "bits": 4, "modules_to_not_convert": ["lm_head"]}
    model = AutoModelForCausalLM.from_pretrained(hf_folders["llama"].original, quantization_config=given)
    assert model.get_input_embeddings().layouts["weight"].bits == 4
    assert not isinstance(model.lm_head, CodedModule)


def test_weights_that_cannot_be_coded_are_named(hf_folders: dict[str, Folders], tmp_path: Path) -> None:
    model = load(hf_folders["llama"].original)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight cannot be made .*NaN"):
        load(tmp_path, "coded")


def test_gradients_reach_activations(hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders["llama"]
    grads = []
    for model in (load(folders.coded, "coded", dtype=torch.float32), load(folders.decoded, dtype=torch.float32)):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        grads.append(embedded.grad)
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.02


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_models_dtype_can_be_changed(dtype: torch.dtype, name: str, hf_folders: dict[str, Folders]) -> None:
    model, wanted = (load(hf_folders[name].coded, "coded", dtype=kind) for kind in (torch.bfloat16, dtype))
    model.to(dtype)
    assert model.get_input_embeddings().weight.dtype == dtype
    found, expected = logits(model), logits(wanted)
    assert found.dtype == dtype
    # gemma4 has buffers that BF16 has rounded.
    assert float((found - expected).float().norm() / expected.float().norm()) < 0.02


@pytest.mark.parametrize("tokens", [16, 300])
def test_inference_mode_and_what_follows_it(tokens: int, hf_folders: dict[str, Folders]) -> None:
    model = load(hf_folders["llama"].coded, "coded")
    ids, threads = torch.randint(2, 500, (1, tokens)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            found = model(ids).logits
        with torch.no_grad():
            after = model(ids).logits
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded).logits.float().sum().backward()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, after)
    assert embedded.grad.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_ids_that_embeddings_have_no_row_for(name: str, hf_folders: dict[str, Folders]) -> None:
    """As torch has it; and no ids are no rows."""
    coded, plain = (load(hf_folders[name].coded, mode).get_input_embeddings() for mode in ("coded", "decode"))
    ids = torch.tensor([[0, 511], [7, 7]], dtype=torch.int32)
    assert torch.equal(coded(ids), plain(ids))
    for wrong in (-1, -100, 512):
        for embeddings in (coded, plain):
            with pytest.raises(IndexError, match="out of range"):
                embeddings(torch.tensor([[3, wrong]]))
    for shape in ((0,), (2, 0), (0, 5)):
        assert torch.equal(coded(torch.zeros(shape, dtype=torch.long)), plain(torch.zeros(shape, dtype=torch.long)))


def test_a_copy_computes_the_same(hf_folders: dict[str, Folders]) -> None:
    model = load(hf_folders["gemma4"].coded, "coded")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_weights_can_be_tied_again(hf_folders: dict[str, Folders]) -> None:
    model = load(hf_folders["gemma4"].coded, "coded")
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert model.lm_head.weight__packed is model.get_input_embeddings().weight__packed


def test_a_model_that_asks_a_weight_for_its_device_gets_that_of_the_codes(tmp_path: Path) -> None:
    """Llama 4 moves its tokens to where its embeddings are."""
    config = Llama4TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Llama4ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    options = HLWQConfig(bits=8, fit="gain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=options)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, CodedModule)
    assert embeddings.weight.device == embeddings.weight__packed.device
    found, wanted = logits(model), logits(load(tmp_path, dtype=torch.float32))
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_weight_that_is_kept_as_codes_is_not_computed_with(hf_folders: dict[str, Folders]) -> None:
    model = load(hf_folders["llama"].coded, "coded")
    before, weight = logits(model), model.lm_head.weight
    assert (weight.shape, weight.dtype, weight.ndim) == ((512, 160), torch.bfloat16, 2)
    assert weight[3:7].T.shape == (160, 4)
    assert [part.shape[0] for part in weight.data.chunk(2)] == [256, 256]
    assert torch.empty_like(weight).shape == weight.new_zeros(weight.shape).shape == weight.shape
    assert torch.ones_like(weight, dtype=torch.float32).sum() == weight.numel()
    weight.data.normal_()
    weight.data[3].zero_()
    for compute in (
        lambda: torch.nn.functional.linear(torch.ones(1, 160, dtype=torch.bfloat16), weight),
        lambda: weight.float(),
        lambda: weight.data.copy_(torch.zeros(512, 160)),
        lambda: weight.data.mul_(2),
        lambda: torch.cat(tensors=[weight, weight]),
    ):
        with pytest.raises(CheckpointError, match=r"kept as codes; .*modules_to_not_convert=.*mode='decode'"):
            compute()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kept", [[], ["embed_tokens"], ["lm_head"]])
def test_a_coded_model_keeps_its_number_of_tokens(kept: list[str], hf_folders: dict[str, Folders]) -> None:
    options = HLWQConfig(fit="norm", modules_to_not_convert=kept)
    model = AutoModelForCausalLM.from_pretrained(hf_folders["llama"].original, quantization_config=options)
    before = logits(model)
    for owner in (model, copy.deepcopy(model)):
        for wanted in ({"mean_resizing": False}, {"pad_to_multiple_of": 64}, {}):
            with pytest.raises(CheckpointError, match=r"512 tokens cannot become 5\d\d .*mode='decode'") as caught:
                owner.resize_token_embeddings(520, **wanted)
            assert "\n" not in str(caught.value)
        owner.resize_token_embeddings(512)
        owner.resize_token_embeddings(pad_to_multiple_of=128)
        assert owner.config.vocab_size == 512
        assert torch.equal(logits(owner), before)


def test_embeddings_and_output_in_16_bit_can_be_resized(hf_folders: dict[str, Folders]) -> None:
    options = HLWQConfig(fit="norm", modules_to_not_convert=["embed_tokens", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(hf_folders["llama"].original, quantization_config=options)
    before = logits(model)
    model.resize_token_embeddings(520, mean_resizing=False)
    assert torch.equal(logits(model)[..., :512], before)
