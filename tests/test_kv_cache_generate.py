"""transformers' ``generate`` with the KV cache: every way of decoding, and models of several structures."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_kv_cache_changes import gemma, llama
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_hlwq.kv_cache import HLWQCache
from vllm_hlwq.kv_cache.history import History

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}
MODELS = {
    "sliding and full": gemma(),
    "shared keys and values": gemma(num_kv_shared_layers=2, num_hidden_layers=6,
                                    layer_types=["sliding_attention", "full_attention"] * 3),
    "full": llama(head_dim=32),
    "odd heads": llama(head_dim=24, num_attention_heads=2, num_key_value_heads=1),
}  # fmt: skip
WINDOW = 16


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    for parameter in made.parameters():  # a fresh model repeats one token; larger weights make it look at its history
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made


def prompt(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    half = torch.randint(1, 96, (batch, length // 2), generator=generator)
    return torch.cat([half, half], dim=1)


def generated(model: Any, cache: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(tokens, past_key_values=cache, max_new_tokens=60, **options)


@pytest.mark.parametrize("way", WAYS)
def test_reading_codes_and_decoding_them_generate_the_same(model: Any, way: str) -> None:
    tokens = prompt(1, 80)
    cache = HLWQCache(model.config, bits=3, residual_window=WINDOW)
    codes = generated(model, cache, tokens, **WAYS[way])
    decoded_cache = HLWQCache(model.config, bits=3, residual_window=WINDOW, attend_coded=False)
    assert torch.equal(codes, generated(model, decoded_cache, tokens, **WAYS[way]))
    assert codes.shape[1] == 140
    # What assisted decoding threw away is not in the cache; the last token never is.
    assert cache.get_seq_length(cache.is_sliding.index(False)) == 139
    assert any(layer._coded[0].length >= 64 for layer in cache.layers if not layer.is_sliding)


@pytest.mark.parametrize("way", WAYS)
def test_within_the_window_nothing_changes(model: Any, way: str) -> None:
    tokens = prompt(1, 40)
    cache = HLWQCache(model.config, residual_window=200)
    exact = generated(model, DynamicCache(config=model.config), tokens, **WAYS[way])
    assert torch.equal(generated(model, cache, tokens, **WAYS[way]), exact)


def test_padded_batches(model: Any) -> None:
    tokens = prompt(3, 80)
    mask = torch.ones_like(tokens)
    mask[0, :25] = 0
    made = [
        generated(
            model, HLWQCache(model.config, residual_window=WINDOW, attend_coded=attend), tokens, attention_mask=mask
        )
        for attend in (True, False)
    ]
    assert torch.equal(*made)
    alone = generated(model, HLWQCache(model.config, residual_window=WINDOW), tokens[1:2])
    assert torch.equal(made[0][1:2], alone)


def test_decoding_reads_codes_only(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one new token the history is never decoded: not by repeated heads, padding, or layers that share keys."""
    tokens = prompt(2, 80)
    mask = torch.ones_like(tokens)
    mask[0, :25] = 0
    monkeypatch.setattr(History, "decode", lambda self: pytest.fail("decoded"))
    cache = HLWQCache(model.config, residual_window=WINDOW)
    generated(model, cache, tokens, attention_mask=mask)
    assert cache.layers[1]._coded[0].length > 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(model: Any, dtype: torch.dtype) -> None:
    """Rotated keys are then of float32 and values of 16 bit, and products would be rounded to 16 bit."""
    steps = {}
    for attend_coded in (True, False):
        cache = HLWQCache(model.config, bits=3, residual_window=WINDOW, attend_coded=attend_coded)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            cast = copy.deepcopy(model).to(dtype)
            cast(prompt(1, 80), past_key_values=cache)
            steps[attend_coded] = cast(torch.tensor([[5]]), past_key_values=cache).logits.float()
    assert float((steps[True] - steps[False]).norm() / steps[False].norm()) < 0.05


def test_eager_attention(model: Any) -> None:
    tokens = prompt(2, 80)
    expected = generated(model, HLWQCache(model.config, residual_window=WINDOW), tokens)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        assert torch.equal(generated(model, HLWQCache(model.config, residual_window=WINDOW), tokens), expected)
    finally:
        model.set_attn_implementation(before)


def test_a_prompt_in_chunks_costs_little_accuracy(model: Any) -> None:
    tokens = prompt(1, 200)
    with torch.no_grad():
        exact = model(tokens, past_key_values=DynamicCache(config=model.config)).logits.log_softmax(-1)
        errors = []
        for bits in (2, 3, 4):
            cache = HLWQCache(model.config, bits=bits, residual_window=WINDOW)
            logits = [model(tokens[:, start : start + 50], past_key_values=cache).logits for start in range(0, 200, 50)]
            errors.append((torch.cat(logits, dim=1).log_softmax(-1) - exact).square().mean().item())
    assert errors[0] > errors[2] > 0


def test_the_cache_imports_no_vllm_and_the_package_no_transformers() -> None:
    code = (
        "import sys, vllm_hlwq; assert not {'vllm', 'transformers', 'torch', 'numba'} & set(sys.modules); "
        "import vllm_hlwq.kv_cache; assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
