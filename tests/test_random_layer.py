"""The layer without an engine is the layer that vLLM's loader makes, in configuration, record and buffers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from engines import LoadedModel
from make_checkpoint import SHAPES as REAL_SHAPES
from make_checkpoint import make_checkpoint, plan_checkpoint
from vllm.model_executor.layers.fused_moe.utils import _resize_cache

from vllm_hlwq import device_backend, expert_formats, marlin_moe
from vllm_hlwq.bench.moe_shapes import SHAPES, MoeShape
from vllm_hlwq.bench.random_layer import ACTIVATION_SETTINGS, SMALLEST_SCALE, marlin_backend, moe_config, random_experts
from vllm_hlwq.checkpoint.export import export_int4

SMALL = MoeShape(hidden=256, width=192, experts=16, top_k=4, group_size=64, activation="gelu_tanh")
QWEN = MoeShape(hidden=128, width=128, experts=16, top_k=4, group_size=128, activation="silu")


@pytest.fixture(scope="module", params=["gemma4", "qwen3_moe"])
def shape_and_layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MoeShape, Any]:
    """A shape, and a layer of it that vLLM has loaded."""
    out = tmp_path_factory.mktemp("layer") / "model"
    if request.param == "gemma4":
        make_checkpoint("small", out, layers=2)
    else:
        bf16 = checkpoints.write(checkpoints.qwen3_moe_config(), out.with_name("bf16"))
        export_int4(bf16, out, group_size=QWEN.group_size)
    layer = LoadedModel(out, 3).runners[0].routed_experts
    return (SMALL if request.param == "gemma4" else QWEN), layer


def read_of_the_configuration() -> set[str]:
    """Attributes of a layer's configuration that the backend's sources name, and vLLM for the activation."""
    sources = (inspect.getsource(module) for module in (marlin_moe, device_backend, expert_formats))
    return set(ACTIVATION_SETTINGS) | {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("moe_config", "self.moe_config")
    }


def test_the_configuration_is_that_of_a_loaded_layer(shape_and_layer: tuple[MoeShape, Any]) -> None:
    shape, layer = shape_and_layer
    config = moe_config(shape)
    names = read_of_the_configuration()
    assert names >= {"hidden_dim", "activation", "num_experts"}
    assert {name: getattr(config, name) for name in names} == {name: getattr(layer.moe_config, name) for name in names}
    weights = ("num_bits", "type", "symmetric", "strategy", "group_size")
    ours, loaded = marlin_backend(shape).expert_format.weight_quant, layer.quant_method.weight_quant
    assert [getattr(ours, name) for name in weights] == [getattr(loaded, name) for name in weights]
    assert shape.top_k == layer.top_k


def test_the_record_is_that_of_a_loaded_layer(shape_and_layer: tuple[MoeShape, Any]) -> None:
    shape, layer = shape_and_layer
    experts, loaded = random_experts(shape), layer.expert_cache.store
    assert (experts.num_experts, experts.layout.key()) == (loaded.num_experts, loaded.layout.key())


def test_the_experts_are_random_and_the_seed_decides_them() -> None:
    one, again, other = random_experts(SMALL, 1), random_experts(SMALL, 1), random_experts(SMALL, 2)
    for name in one.layout:
        assert torch.equal(one.field(name), again.field(name))
        assert not torch.equal(one.field(name), other.field(name))
    codes = one.field("w2_weight_packed")
    assert abs(float((codes >> 28).float().mean()) + 0.5) < 0.05, "the last code of a word, -8 to 7"
    scales = one.field("w13_weight_scale").float()
    assert float(scales.min()) >= SMALLEST_SCALE
    assert float(scales.max()) <= 2 * SMALLEST_SCALE
    assert float(scales.std()) > SMALLEST_SCALE / 5


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_those_of_the_checkpoints(name: str, tmp_path: Path) -> None:
    shape, config = SHAPES[name], REAL_SHAPES[name](1)
    groups, _, settings = plan_checkpoint(config, tmp_path)
    planned = {tensor.name: tensor for group in groups for tensor in group.tensors}
    width, words = next(t.shape for n, t in planned.items() if n.endswith(".0.gate_proj.weight_packed"))
    assert (shape.hidden, shape.width) == (8 * words, width)
    top_k = config.top_k_experts if name.startswith("gemma") else config.num_experts_per_tok
    assert (shape.experts, shape.top_k) == (config.num_experts, top_k)
    (group,) = settings["quantization_config"]["config_groups"].values()
    assert shape.group_size == group["weights"]["group_size"]
    activation = settings.get("hidden_activation") or settings["hidden_act"]
    assert moe_config(shape).activation == type(moe_config(shape).activation).from_str(activation)
    one = [t for n, t in planned.items() if ".experts.3." in n and not n.endswith("_shape")]
    assert shape.checkpoint_layout().record_bytes == shape.marlin_layout().record_bytes == sum(t.bytes for t in one)


@pytest.mark.parametrize("shape", [*SHAPES.values(), SMALL, QWEN], ids=[*SHAPES, "small", "qwen"])
def test_buffers_hold_what_vllm_makes_views_of(shape: MoeShape) -> None:
    """Also where the hidden size exceeds gate and up together, as in real models."""
    backend, tokens, room = marlin_backend(shape), 3, 5
    rows = tokens * shape.top_k
    sizes = backend.workspace_shapes(room, shape.hidden, shape.top_k)
    workspaces = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    buffers = backend.buffers(*workspaces, rows)
    gate_up = _resize_cache(buffers.gate_up, (rows, 2 * shape.width))
    _resize_cache(buffers.gate_up, (rows, shape.hidden))
    activated = _resize_cache(buffers.activated, (rows, shape.width))
    assert buffers.out_rows.shape == (rows, shape.hidden)
    for number, part in enumerate((gate_up, activated, buffers.out_rows), 1):
        part.fill_(number)
    assert [part.unique().tolist() for part in (gate_up, activated, buffers.out_rows)] == [[1.0], [2.0], [3.0]]


def test_making_a_backend_imports_what_notes_vllms_current_stream() -> None:
    """Else vLLM would not know of the stream that a benchmark chooses, and put another in the middle of a step."""
    code = (
        "import sys\n"
        "from vllm_hlwq.bench.moe_shapes import SHAPES\n"
        "from vllm_hlwq.bench.random_layer import marlin_backend\n"
        "assert 'vllm' not in sys.modules\n"
        "marlin_backend(SHAPES['gemma-4-26b-a4b'])\n"
        "import torch\n"
        "assert torch.cuda.set_stream is sys.modules['vllm.utils.torch_utils']._patched_set_stream\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
