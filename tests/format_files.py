"""Small checkpoints whose experts are random in the tensors of a quantised format.

Everything but the experts is a 16-bit model of ``checkpoints``, as in checkpoints that leave attention unquantised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Draw = Callable[[int, int], State]
"""Random tensors of one matrix ``[out, in]`` by their names in the format."""

EXPERT_WEIGHT = re.compile(r"(?P<stem>.*\.experts\.\d+\.\w+\.)weight")


def write(base: Path, out: Path, draw: Draw, quantization: dict[str, Any]) -> Path:
    """Copy a model, with every expert matrix drawn anew and the quantisation in its configuration."""
    state: State = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        match = EXPERT_WEIGHT.fullmatch(name)
        if match is None:
            state[name] = tensor
            continue
        for part, drawn in draw(*tensor.shape).items():
            state[match["stem"] + part] = drawn
    return save(base, out, state, quantization)


def save(base: Path, out: Path, state: State, quantization: dict[str, Any]) -> Path:
    out.mkdir(exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return out


def words(*shape: int) -> torch.Tensor:
    """Random bits in int32."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def scales(*shape: int) -> torch.Tensor:
    """Positive, such that codes of up to 15 steps become weights of about 0.1."""
    return (0.005 + 0.01 * torch.rand(shape)).bfloat16()


def awq(base: Path, out: Path, group_size: int = 64, **changes: Any) -> Path:
    """AWQ: inputs first, eight outputs in a word."""

    def draw(outputs: int, inputs: int) -> State:
        groups = inputs // group_size
        return {
            "qweight": words(inputs, outputs // 8),
            "qzeros": words(groups, outputs // 8),
            "scales": scales(groups, outputs),
        }

    torch.manual_seed(0)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    kept = {"modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"]}
    return write(base, out, draw, settings | kept | changes)


def gptq(base: Path, out: Path, group_size: int = 64, biases: bool = False, **changes: Any) -> Path:
    """GPTQ: inputs first, eight inputs in a word, with the indices that need no reordering."""

    def draw(outputs: int, inputs: int) -> State:
        size = inputs if group_size == -1 else group_size
        state = {
            "qweight": words(inputs // 8, outputs),
            "qzeros": torch.full((inputs // size, outputs // 8), 0x77777777, dtype=torch.int32),
            "scales": scales(inputs // size, outputs),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // size,
        }
        return state | ({"bias": torch.randn(outputs).bfloat16()} if biases else {})

    torch.manual_seed(0)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    return write(base, out, draw, settings | changes)


def fp8(base: Path, out: Path, block: int | None = None, static: bool = False, **changes: Any) -> Path:
    """FP8 as vLLM and DeepSeek have it: a scale a tensor, or a block."""

    def draw(outputs: int, inputs: int) -> State:
        weight = fp8_codes(outputs, inputs)
        if block is not None:
            return {"weight": weight, "weight_scale_inv": fp8_scales(-(-outputs // block), -(-inputs // block))}
        state = {"weight": weight, "weight_scale": fp8_scales()}
        return state | ({"input_scale": torch.tensor(0.5)} if static else {})

    torch.manual_seed(0)
    kept = [name.removesuffix(".weight") for name in load_file(base / "model.safetensors") if ".experts." not in name]
    settings = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "ignored_layers": kept}
    blocks = {} if block is None else {"weight_block_size": [block, block]}
    return write(base, out, draw, settings | blocks | changes)


def compressed_fp8(base: Path, out: Path, strategy: str, static: bool = False) -> Path:
    """FP8 of compressed-tensors: a scale a tensor, an output channel or a block of 128 by 128."""

    def draw(outputs: int, inputs: int) -> State:
        shape = {"tensor": (1,), "channel": (outputs, 1), "block": (-(-outputs // 128), -(-inputs // 128))}[strategy]
        state = {"weight": fp8_codes(outputs, inputs), "weight_scale": fp8_scales(*shape)}
        return state | ({"input_scale": torch.tensor([0.5])} if static else {})

    torch.manual_seed(0)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": not static}
    inputs |= {"tensor": {"strategy": "tensor"}, "channel": {"strategy": "token"}}.get(
        strategy, {"strategy": "group", "group_size": 128}
    )
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "float-quantized"}
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
    }  # fmt: skip
    return write(base, out, draw, settings)


def fp8_codes(*shape: int) -> torch.Tensor:
    return (16 * torch.randn(shape)).to(torch.float8_e4m3fn)


def fp8_scales(*shape: int) -> torch.Tensor:
    """Positive and float32; an element of a tensor's two scales may be twice the other."""
    return 0.005 + 0.005 * torch.rand(shape)


def gpt_oss_mxfp4(base: Path, out: Path) -> Path:
    """gpt-oss as published: stacks of FP4 codes, two in a byte, with an exponent for every 32 of them."""
    torch.manual_seed(0)
    state: State = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if re.search(r"\.experts\.\w+_bias$", name):
            state[name] = torch.randn(tensor.shape).bfloat16()
        elif ".experts." in name:
            experts, inputs, outputs = tensor.shape  # the 16-bit stack has its inputs first
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            # Exponents of about 2^-6: FP4 goes up to 6.
            exponents = torch.randint(119, 123, (experts, outputs, inputs // 32), dtype=torch.uint8)
            state |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        else:
            state[name] = tensor
    return save(base, out, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def expert_tensors(folder: Path) -> Iterator[tuple[str, int, str, str, torch.Tensor]]:
    """Layer, expert, projection, tensor's name and tensor of everything a checkpoint says of its experts."""
    for name, tensor in load_file(folder / "model.safetensors").items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.(\w+)", name)
        if match is not None:
            yield int(match[1]), int(match[2]), match[3], match[4], tensor
