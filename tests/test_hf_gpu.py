"""HLWQ in transformers on CUDA: the kernels against decoded weights, and whole models in both modes."""

from __future__ import annotations

import pytest
import torch
from hf_models import IDS, Folders, load

from vllm_hlwq.codec import NORM, BlockCoder, codebook, dequantize_matrix, quantize_matrix
from vllm_hlwq.hf.coded_weight import GPU_KERNEL_ROWS, CodeFormat, coded_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 17, GPU_KERNEL_ROWS, GPU_KERNEL_ROWS + 1])
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
    # Beyond the kernel's reach weights are rounded to BF16 first.
    allowed = 2**-8 if dtype == torch.bfloat16 or tokens > GPU_KERNEL_ROWS else max(1e-5, torch.finfo(dtype).eps)
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


def test_one_token_replays_in_a_graph() -> None:
    device = torch.device("cuda")
    table = codebook("C", 5)
    coder = BlockCoder(table, 128, device)
    coded = quantize_matrix(torch.randn(512, 512, device=device), coder, NORM)
    layout = CodeFormat(table, 128, 512)
    packed, norms = coded.packed.view(512, -1), coded.norms.view(torch.int16)
    x = torch.randn(1, 512, device=device).bfloat16()
    with torch.no_grad():
        wanted = coded_linear(x, packed, norms, layout)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = coded_linear(x, packed, norms, layout)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
