"""The KV cache against a decoder and dense attention written from the definition, over shapes, steps and batches."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hlwq_vectors import WORKED_KV, worked_block
from kv_reference import attention, dense, levels, rotation
from torch.nn.functional import scaled_dot_product_attention

from vllm_hlwq.codec import codebook
from vllm_hlwq.errors import KVCacheError
from vllm_hlwq.kv_cache.attention import MOST_ROWS
from vllm_hlwq.kv_cache.coded_vectors import VectorCoder
from vllm_hlwq.kv_cache.history import History
from vllm_hlwq.kv_cache.kernels import odd_polynomial
from vllm_hlwq.kv_cache.layer import GROUP, CodedLayer

CPU = torch.device("cpu")
SHAPES = [(1, 1, 128), (2, 8, 64), (4, 2, 256), (3, 3, 96), (1, 2, 512)]
STEPS = (150, 70, 1, 1, 5, *[1] * 40)
WINDOW = 64


def new_layer(bits: int = 3, window: int = WINDOW, attend_coded: bool = True) -> CodedLayer:
    coders: dict[int, VectorCoder] = {}
    return CodedLayer(
        lambda width, device: coders.setdefault(width, VectorCoder(width, bits, device)), window, attend_coded
    )


def states(batch: int, heads: int, tokens: int, head_dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a few large channels, as rotary embeddings leave them, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, tokens, head_dim, generator=generator)
    keys[..., ::17] *= 8
    return keys, values


def fill(layer: CodedLayer, keys: torch.Tensor, values: torch.Tensor, steps: tuple[int, ...]) -> tuple[object, object]:
    """Append all tokens in steps; what the last one returned."""
    assert sum(steps) == keys.shape[2]
    start = 0
    for step in steps:
        returned = layer.update(keys[:, :, start : start + step], values[:, :, start : start + step])
        start += step
    return returned


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("batch", "heads", "head_dim"), SHAPES)
def test_every_step_stands_for_the_same_tokens(bits: int, batch: int, heads: int, head_dim: int) -> None:
    keys, values = states(batch, heads, sum(STEPS), head_dim)
    layer = new_layer(bits)
    query = torch.randn(batch, heads * 2, 1, head_dim, generator=torch.Generator().manual_seed(1))
    done = 0
    for step in STEPS:
        before = [dense(layer, side, both[:, :, :done]) for side, both in enumerate((keys, values))]
        new = [both[:, :, done : done + step] for both in (keys, values)]
        got = layer.update(*new)
        done += step
        expected = [torch.cat([old, now.double()], dim=2) for old, now in zip(before, new, strict=True)]
        assert layer.get_seq_length() == done
        answer = scaled_dot_product_attention(query, *got, enable_gqa=True)
        assert (answer - attention(query, *expected)).abs().max() < 2e-5
    assert layer._coded[0].length == (done - WINDOW) // GROUP * GROUP
    for tensor, dense_tensor in zip(got, expected, strict=True):
        assert isinstance(tensor, History)
        plain = tensor.decode()
        coded = tensor._side.coded
        assert torch.equal(plain[:, :, coded:], dense_tensor[:, :, coded:].float())
        assert (plain - dense_tensor).norm() < 1e-5 * dense_tensor.norm()


@pytest.mark.parametrize(("bits", "least"), [(2, 0.93), (3, 0.98), (4, 0.994)])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_decoded_vectors_point_where_the_exact_ones_do(bits: int, least: float, head_dim: int) -> None:
    keys, values = states(2, 2, 256, head_dim)
    got = fill(new_layer(bits, window=0), keys, values, (255, 1))
    for exact, tensor in zip((keys, values), got, strict=True):
        assert torch.cosine_similarity(tensor.decode()[:, :, :224], exact[:, :, :224], dim=-1).mean() > least


def test_a_head_is_packed_as_the_published_vector_is() -> None:
    packed, norm = torch.empty(1, 48, dtype=torch.uint8), torch.empty(1, dtype=torch.float16)
    VectorCoder(128, 3, CPU).encode(worked_block(), packed, norm)
    assert bytes(packed.view(-1).tolist()).hex() == WORKED_KV
    z = torch.tensor(levels(3))[codes_of(packed)]
    rotated = torch.from_numpy(rotation(128)) @ worked_block()[0].double()
    factor = (rotated @ z) / (z @ z) * math.sqrt(128)  # least squares, where the published norm is 12.125
    assert abs(norm.item() - factor) < 0.01


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    number = int.from_bytes(bytes(packed.view(-1).tolist()), "big")
    return torch.tensor([number >> (3 * (127 - i)) & 7 for i in range(128)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_polynomial_goes_through_every_level(bits: int) -> None:
    half = 2 ** (bits - 1)
    x = (torch.arange(2 * half, dtype=torch.float64) + 0.5) / half - 1
    value = sum(float(c) * x ** (2 * power + 1) for power, c in enumerate(odd_polynomial(codebook("C", bits))))
    assert (value - codebook("C", bits)).abs().max() < 2e-6


@pytest.mark.parametrize("tokens", [1, 33, 255, 700, 1030])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_history_out(tokens: int, threads: int) -> None:
    keys, values = states(1, 2, tokens + 40, 64)
    layer = new_layer(window=0)
    layer.update(keys[:, :, :-40], values[:, :, :-40])
    got = layer.update(keys[:, :, -40:], values[:, :, -40:])
    query = torch.randn(1, 4, 3, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        answer = scaled_dot_product_attention(query, *got, enable_gqa=True)
    finally:
        torch.set_num_threads(before)
    plain = [tensor if not isinstance(tensor, History) else tensor.decode() for tensor in got]
    assert (answer - attention(query, *(tensor.double() for tensor in plain))).abs().max() < 1e-5


def test_a_process_that_was_forked_has_threads_of_its_own() -> None:
    code = """
import os, signal, torch
from vllm_hlwq.kv_cache.kernels import run_shares
torch.set_num_threads(2)
seen = []
run_shares(lambda share, start, stop: seen.append(stop - start), 2048)
child = os.fork()
if child == 0:
    signal.alarm(20)
    run_shares(lambda share, start, stop: seen.append(stop - start), 2048)
    os._exit(0 if sum(seen) == 4096 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype: torch.dtype) -> None:
    keys, values = (both.to(dtype) for both in states(2, 2, 300, 128))
    layer = new_layer()
    got = fill(layer, keys, values, (299, 1))
    query = torch.randn(2, 4, 1, 128).to(dtype)
    answer = scaled_dot_product_attention(query, *got, enable_gqa=True)
    assert answer.dtype == dtype
    expected = attention(query, *(dense(layer, side, both) for side, both in enumerate((keys, values))))
    assert (answer - expected).abs().max() < 2**-7
    assert got[0].decode().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_the_dtype_of_what_attention_gives_as_torchs_does(dtype: torch.dtype) -> None:
    """Keys in float32, as rotary embeddings leave them there, and values in autocast's dtype."""
    keys, values = states(2, 2, 300, 64)
    values = values.bfloat16()
    query, layer = torch.randn(2, 4, 1, 64).to(dtype), new_layer()
    expected = attention(query, *(tensor.decode().double() for tensor in fill(new_layer(), keys, values, (299, 1))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fill(layer, keys, values, (299, 1))
        answer = scaled_dot_product_attention(query, *got, enable_gqa=True)
        plain = scaled_dot_product_attention(query, *(tensor.decode() for tensor in got), enable_gqa=True)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16]
    assert answer.dtype == plain.dtype == torch.bfloat16
    # BF16's last place grows with the number.
    assert ((answer - expected).abs() / expected.abs().clamp(min=1)).max() < 2**-7


def visible(kind: str, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask as given to torch, and the additive one it means; the first sequence is padded on the left."""
    seen = torch.ones(2, 1, rows, tokens, dtype=torch.bool).tril(tokens - rows)
    seen[0, :, :, :30] = False
    added = torch.where(seen, 0.0, -math.inf)
    if kind == "bool":
        return seen, added
    added = added.clamp(min=-1e9) + torch.linspace(0, 1, tokens)
    return added, added


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("repeated", [False, True])
def test_masks_and_repeated_heads_are_attended_to_from_codes(
    kind: str, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = states(2, 2, 203, 64)
    layer = new_layer()
    got = fill(layer, keys, values, (200, 3))
    expected = [tensor.decode().double() for tensor in got]
    query = torch.randn(2, 6, 3, 64)
    mask, added = visible(kind, 3, 203)
    monkeypatch.setattr(History, "decode", lambda self: pytest.fail("decoded"))
    if repeated:
        got = [tensor[:, :, None, :, :].expand(2, 2, 3, 203, 64).reshape(2, 6, 203, 64) for tensor in got]
    answer = scaled_dot_product_attention(query, *got, attn_mask=mask, enable_gqa=not repeated)
    assert (answer - attention(query, *expected, added)).abs().max() < 2e-5


def test_a_row_that_sees_nothing_is_zero_as_in_torch() -> None:
    got = fill(new_layer(), *states(1, 1, 200, 64), (199, 1))
    mask = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    query = torch.randn(1, 1, 1, 64)
    plain = scaled_dot_product_attention(query, *(tensor.decode() for tensor in got), attn_mask=mask)
    assert torch.equal(scaled_dot_product_attention(query, *got, attn_mask=mask), plain)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.5}])
def test_causality_and_dropout_are_left_to_torch(options: dict[str, Any]) -> None:
    got = fill(new_layer(), *states(1, 2, 200, 64), (197, 3))
    plain = [tensor.decode() for tensor in got]
    query = torch.randn(1, 2, 3, 64)
    answers = []
    for tensors in (plain, got):
        torch.manual_seed(0)
        answers.append(scaled_dot_product_attention(query, *tensors, **options))
    assert torch.equal(*answers)


def test_one_query_for_several_sequences_is_left_to_torch() -> None:
    got = fill(new_layer(), *states(2, 2, 200, 64), (199, 1))
    query = torch.randn(1, 2, 1, 64)
    expected = scaled_dot_product_attention(query, *(tensor.decode() for tensor in got))
    assert torch.equal(scaled_dot_product_attention(query, *got), expected)


def test_any_other_operation_gets_the_decoded_tensor() -> None:
    got, _ = fill(new_layer(), *states(2, 2, 200, 64), (199, 1))
    plain = got.decode()
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    half_repeated = got[:, :, None, :, :].expand(2, 2, 3, 200, 64)
    assert torch.equal(half_repeated.sum(2), plain[:, :, None].expand(2, 2, 3, 200, 64).sum(2))
    assert torch.equal(got[:, 1], plain[:, 1])
    assert torch.equal(got[torch.tensor([1])], plain[1:])
    assert torch.equal(torch.matmul(plain, got.transpose(2, 3)), torch.matmul(plain, plain.transpose(2, 3)))
    assert torch.equal(torch.cat([got, plain]), torch.cat([plain, plain]))
    assert torch.equal(torch.cat(tensors=[got, plain], dim=1), torch.cat([plain, plain], dim=1))
    assert torch.equal(torch.repeat_interleave(input=got, repeats=2, dim=1), plain.repeat_interleave(2, dim=1))


def test_many_queries_are_answered_from_decoded_keys() -> None:
    rows = MOST_ROWS + 1
    got = fill(new_layer(), *states(1, 1, 200, 64), (200 - rows, rows))
    query = torch.randn(1, 1, rows, 64)
    expected = scaled_dot_product_attention(query, *(tensor.decode() for tensor in got))
    assert torch.equal(scaled_dot_product_attention(query, *got), expected)


def test_without_attending_to_codes_plain_tensors_are_returned() -> None:
    both = states(2, 2, 200, 64)
    plain = fill(new_layer(attend_coded=False), *both, (199, 1))
    lazy = fill(new_layer(), *both, (199, 1))
    assert not any(isinstance(tensor, History) for tensor in plain)
    assert all(torch.equal(a, b.decode()) for a, b in zip(plain, lazy, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_vectors_that_no_code_stands_for_are_refused(bad: float) -> None:
    keys, values = states(1, 1, 200, 64)
    values[0, 0, 3, 5] = bad
    with pytest.raises(KVCacheError, match=r"a key or value .*use a cache that does not code"):
        new_layer().update(keys, values)


def test_states_that_do_not_continue_the_cache_are_refused() -> None:
    layer = new_layer()
    layer.update(*states(2, 2, 10, 64))
    with pytest.raises(KVCacheError, match=r"keys \[1, 2, 1, 64\] .* batch 2, 2 heads, head_dim 64"):
        layer.update(*states(1, 2, 1, 64))
    with pytest.raises(KVCacheError, match=r"bfloat16 .* torch.float32"):
        layer.update(*(both.bfloat16() for both in states(2, 2, 1, 64)))
    keys, values = states(2, 2, 1, 64)
    with pytest.raises(KVCacheError, match="keys want gradients"):
        layer.update(keys.requires_grad_(), values)
