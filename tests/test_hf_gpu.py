"""HLWQ in transformers on CUDA: the kernels against decoded weights, and whole models in both modes."""

from __future__ import annotations

import pytest
import torch
from hf_models import IDS, Folders, load

from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.hf import rotated_kernel
from vllm_hlwq.hf.coded_weight import CodeFormat, coded_linear
from vllm_hlwq.hf.rotated_kernel import FEW_TOKENS, ROTATED_BY_KERNEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, FEW_TOKENS + 1, 17, ROTATED_BY_KERNEL + 1])
@pytest.mark.parametrize(("rows", "columns", "bits"), [(4096, 4096, 5), (333, 2112, 5), (70, 704, 3), (1, 128, 8)])
def test_products(rows: int, columns: int, bits: int, tokens: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(rows)
    table = codebook("C", bits)
    coder = BlockCoder(table, 128, device)
    coded = quantize_matrix(torch.randn(rows, columns, generator=generator, device=device), coder, NORM)
    x = torch.randn(tokens, columns, generator=generator, device=device).to(dtype)
    layout = CodeFormat(table, 128, columns)
    found = coded_linear(x, coded.packed.view(rows, -1), coded.norms.view(torch.int16), layout)
    wanted = x.double() @ dequantize_matrix(coded, coder, torch.float32).double().T
    allowed = 2**-8 if dtype == torch.bfloat16 else max(1e-5, torch.finfo(dtype).eps)
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm() / wanted.norm()) < allowed


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe", "llama", "gemma4_multimodal"])
def test_models(name: str, hf_folders: dict[str, Folders]) -> None:
    folders = hf_folders[name]
    ids = IDS.cuda()
    with torch.no_grad():
        wanted, decoded, coded = (
            load(*call, dtype=torch.float32).cuda()(input_ids=ids).logits
            for call in ((folders.decoded,), (folders.coded,), (folders.coded, "coded"))
        )
        placed = load(folders.coded, device_map={"": 0}, dtype=torch.float32)(input_ids=ids).logits
    assert torch.equal(decoded, wanted)
    assert float((coded - wanted).norm() / wanted.norm()) < 0.02
    # Decoded on the GPU, where single weights may round to the other side.
    assert float((placed - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("early", [False, True])
def test_products_replay_in_a_graph(tokens: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if early and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(rotated_kernel, "LAUNCH_EARLY", early)
    device = torch.device("cuda")
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, device)
    coded = quantize_matrix(torch.randn(512, 512, device=device), coder, NORM)
    layout = CodeFormat(table, 128, 512)
    packed, norms = coded.packed.view(512, -1), coded.norms.view(torch.int16)
    x = torch.randn(tokens, 512, device=device).bfloat16()
    with torch.no_grad():
        wanted = coded_linear(x, packed, norms, layout)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = coded_linear(x, packed, norms, layout)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted) or tokens > 1
    # Of a captured product the library may choose another order of summing.
    assert float((found - wanted).float().norm() / wanted.float().norm()) < 2**-8
