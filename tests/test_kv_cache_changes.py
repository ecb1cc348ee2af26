"""What happens to a KV cache between steps: cropping, choosing sequences, copying; and what its memory adds up to."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from kv_reference import dense
from test_kv_cache import WINDOW, fill, new_layer, states
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma4TextConfig, LlamaConfig

from vllm_hlwq.errors import KVCacheError
from vllm_hlwq.kv_cache import HLWQCache
from vllm_hlwq.kv_cache import cache as cache_module
from vllm_hlwq.kv_cache.history import History
from vllm_hlwq.kv_cache.layer import GROUP, CodedLayer

LENGTH = 300


def gemma(**changes: object) -> Gemma4TextConfig:
    shape = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "sliding_window": 48, "hidden_size_per_layer_input": 0, "enable_moe_block": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    return Gemma4TextConfig(**(shape | changes))


def llama(**changes: object) -> LlamaConfig:
    shape = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 8192,
    }  # fmt: skip
    return LlamaConfig(**(shape | changes))


@pytest.mark.parametrize("removed", [1, 40, 201, LENGTH])
def test_after_cropping_the_cache_goes_on_from_there(removed: int) -> None:
    keys, values = states(2, 2, LENGTH, 64)
    other = states(2, 2, 80, 64, seed=9)
    layer = new_layer()
    fill(layer, keys, values, (LENGTH - 1, 1))
    coded = layer._coded[0].length
    kept = LENGTH - removed
    before = [dense(layer, side, both)[:, :, :kept] for side, both in enumerate((keys, values))]
    layer.crop(-removed)
    assert layer.get_seq_length() == kept
    assert layer._coded[0].length == min(coded, kept)
    for step in (3, *[1] * 77):
        got = layer.update(*(both[:, :, :step] for both in other))
        other = tuple(both[:, :, step:] for both in other)
    plain = [tensor.decode() if isinstance(tensor, History) else tensor for tensor in got]
    query = torch.randn(2, 2, 1, 64)
    expected = scaled_dot_product_attention(query, *plain)
    assert torch.allclose(scaled_dot_product_attention(query, *got), expected, atol=2e-5)
    for side, (tensor, old) in enumerate(zip(plain, before, strict=True)):
        assert tensor.shape[2] == kept + 80
        assert torch.allclose(tensor[:, :, : min(coded, kept)].double(), old[:, :, :coded], atol=1e-5)
        assert torch.equal(tensor[:, :, -WINDOW:], states(2, 2, 80, 64, seed=9)[side][:, :, -WINDOW:])


def test_a_positive_number_is_the_length_to_keep_and_zero_removes_nothing() -> None:
    layer = new_layer()
    fill(layer, *states(1, 1, LENGTH, 64), (LENGTH,))
    for number, left in ((0, LENGTH), (1000, LENGTH), (250, 250), (30, 30), (-1000, 0)):
        layer.crop(number)
        assert layer.get_seq_length() == left


CHOICES = {
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    "mask": (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("length", [LENGTH, 20])
def test_sequences_are_chosen_with_their_codes(name: str, length: int) -> None:
    change, order = CHOICES[name]
    keys, values = states(3, 2, length + 1, 64)
    layer = new_layer()
    fill(layer, keys[:, :, :-1], values[:, :, :-1], (length,))
    before = [dense(layer, side, both[:, :, :-1])[order] for side, both in enumerate((keys, values))]
    change(layer)
    got = layer.update(keys[order][:, :, -1:], values[order][:, :, -1:])
    for tensor, expected in zip(got, before, strict=True):
        plain = tensor.decode() if isinstance(tensor, History) else tensor
        assert (plain[:, :, :-1] - expected).abs().max() < 1e-4
    query = torch.randn(len(order), 2, 1, 64)
    plain = [tensor.decode() if isinstance(tensor, History) else tensor for tensor in got]
    expected = scaled_dot_product_attention(query, *plain)
    assert torch.allclose(scaled_dot_product_attention(query, *got), expected, atol=2e-5)


@pytest.mark.parametrize("change", ["crop", "reorder", "reset"])
def test_an_earlier_steps_keys_are_refused_after_a_change(change: str) -> None:
    layer = new_layer()
    keys, values = fill(layer, *states(1, 1, LENGTH, 64), (LENGTH - 1, 1))
    {"crop": lambda: layer.crop(-1), "reorder": lambda: layer.reorder_cache(torch.tensor([0])), "reset": layer.reset}[
        change
    ]()
    with pytest.raises(KVCacheError, match="earlier step"):
        keys.decode()
    with pytest.raises(KVCacheError, match="earlier step"):
        scaled_dot_product_attention(torch.randn(1, 1, 1, 64), keys, values)


def test_an_earlier_steps_keys_survive_appending() -> None:
    keys, values = states(1, 1, LENGTH, 64)
    layer = new_layer()
    early, _ = fill(layer, keys[:, :, :200], values[:, :, :200], (199, 1))
    before = early.decode()
    fill(layer, keys[:, :, 200:], values[:, :, 200:], (1,) * 100)
    assert torch.equal(early.decode(), before)


def test_a_copy_goes_its_own_way() -> None:
    cache = HLWQCache(llama(), residual_window=32)
    keys, values = states(1, 2, 200, 256)
    cache.update(keys[:, :, :150], values[:, :, :150], 0)
    twin = copy.deepcopy(cache)
    _, _ = cache.update(keys[:, :, 150:], values[:, :, 150:], 0)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (200, 150)
    got, _ = twin.update(keys[:, :, 150:], values[:, :, 150:], 0)
    assert torch.equal(got.decode()[:, :, 150:], keys[:, :, 150:])


def test_steps_in_and_out_of_inference_mode() -> None:
    keys, values = states(1, 2, 200, 64)
    layer = new_layer()
    with torch.inference_mode():
        fill(layer, keys[:, :, :150], values[:, :, :150], (149, 1))
    with torch.no_grad():
        fill(layer, keys[:, :, 150:], values[:, :, 150:], (1,) * 50)
        layer.reorder_cache(torch.tensor([0, 0]))
    with torch.inference_mode():
        got, _ = layer.update(keys[:, :, :1].repeat(2, 1, 1, 1), values[:, :, :1].repeat(2, 1, 1, 1))
    assert got.shape == (2, 2, 201, 64)


def reachable_bytes(root: object) -> int:
    """Bytes of every tensor storage that can be reached from an object, found by the garbage collector."""
    seen, stack, storages = set(), [root], {}
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, type) or type(found).__name__ in ("module", "function"):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        stack += gc.get_referents(found)
    return sum(storages.values())


@pytest.mark.parametrize("config", [gemma(), llama()], ids=["sliding and full", "full"])
@pytest.mark.parametrize("length", [10, 500])
def test_all_bytes_are_counted(config: object, length: int) -> None:
    cache = HLWQCache(config)
    assert cache.nbytes() == reachable_bytes(cache)
    for index, layer_config in enumerate(config.per_layer_config):
        for step in (length, 1, 1):
            cache.update(*states(2, 2, step, layer_config.head_dim), index)
    assert cache.nbytes() == reachable_bytes(cache) == sum(cache.bytes_by_kind().values())
    cache.reset()
    assert cache.bytes_by_kind()["codes"] == 0


def test_layers_are_made_from_what_any_transformers_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 5.18 it gives options that are the same for all layers, since then each layer's."""
    types = ["sliding_attention", "full_attention"] * 2
    each = [{"sliding_window": 48} if kind == "sliding_attention" else {} for kind in types]
    for options in ({"sliding_window": 48}, each):
        monkeypatch.setattr(cache_module, "get_layer_types_and_kwargs", lambda _, options=options: (types, options))
        layers = HLWQCache(gemma()).layers
        assert [isinstance(layer, CodedLayer) for layer in layers] == [False, True] * 2
        assert {layer.sliding_window for layer in layers[::2]} == {48}


@pytest.mark.parametrize(("bits", "least"), [(2, 6.5), (3, 4.5), (4, 3.4)])
@pytest.mark.parametrize("steps", [(4096,), (3000, *[1] * 1096)])
def test_coded_tokens_take_a_fraction_of_16_bits_with_room_to_grow(
    bits: int, least: float, steps: tuple[int, ...]
) -> None:
    cache = HLWQCache(llama(), bits=bits)
    start = 0
    keys, values = (both.bfloat16() for both in states(1, 2, 4096, 256))
    for step in steps:
        cache.update(keys[:, :, start : start + step], values[:, :, start : start + step], 0)
        start += step
    coded = cache.layers[0]._coded[0].length
    assert 4096 - 128 - GROUP < coded <= 4096 - 128
    held = cache.bytes_by_kind()
    assert held["codes"] + held["norms"] <= coded / 4096 * (keys.nbytes + values.nbytes) / least
    assert held["window"] == 2 * 2 * (128 + GROUP) * 256 * 2


def test_sliding_layers_are_bounded_by_their_window() -> None:
    cache = HLWQCache(gemma())
    cache.update(*states(1, 2, 3000, 32), 0)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 47
    assert cache.bytes_by_kind()["other_layers"] <= 2 * 2 * 2 * 48 * 32 * 4 + 8 * len(cache)


def test_layers_follow_the_configuration() -> None:
    kinds = [type(layer).__name__ for layer in HLWQCache(gemma()).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "CodedLayer"] * 2
    assert len(HLWQCache(gemma(num_kv_shared_layers=2))) == 2
    assert [type(layer).__name__ for layer in HLWQCache(llama()).layers] == ["CodedLayer"] * 2


def test_bad_settings_are_refused() -> None:
    for bits in (5, "3", 3.0, [3]):
        with pytest.raises(KVCacheError, match=re.escape(f"bits={bits!r}: choose 2, 3 or 4")):
            HLWQCache(llama(), bits=bits)
    for window in (-1, "128", 12.5, True, None):
        with pytest.raises(KVCacheError, match=re.escape(f"residual_window={window!r}: give a number of tokens")):
            HLWQCache(llama(), residual_window=window)
    config = llama()
    config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(KVCacheError, match="layers of kind hybrid cannot be coded"):
        HLWQCache(config)
    with pytest.raises(KVCacheError, match="not offloaded"):
        new_layer().offload()
