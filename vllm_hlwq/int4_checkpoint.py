"""INT4 weights in the compressed-tensors ``pack-quantized`` format, and the way back to 16 bit.

``dequantize_int4`` writes the 16-bit checkpoint that an INT4 one stands for: the oracle for everything that computes
with the INT4 weights. Whole checkpoints are exported by ``checkpoint/export.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer*", "chat_template*", "special_tokens_map.json")
_FUSED = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<name>gate_up_proj|down_proj)(\.weight)?$")
_EXPERT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<expert>\d+)\.(?P<name>gate_proj|up_proj|down_proj)$")

State = dict[str, torch.Tensor]
SCALE_FRACTIONS = tuple(1 - 0.03 * step for step in range(14))
"""Of the scale that the largest weight asks for; smaller ones clip it and serve the others better."""


def int4_arguments(group_size: int | None, symmetric: bool) -> QuantizationArgs:
    """compressed-tensors arguments of INT4 weights; ``group_size`` None means one scale per output channel."""
    return QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )


def search_scale(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The best of several symmetric scales for each group, by squared error.

    Args:
        groups: weights float32 ``[out, groups, group_size]``.
        scale: ``[out, groups]`` in the dtype that is stored, from each group's largest weight.

    Returns:
        ``[out, groups]``: candidates are rounded to the stored dtype before they are judged.
    """
    best = scale
    least = torch.full(scale.shape, float("inf"), device=scale.device)
    for fraction in SCALE_FRACTIONS:
        candidate = (scale.float() * fraction).to(scale.dtype)
        wide = candidate.float().unsqueeze(-1)
        error = (groups / wide).round_().clamp_(-8, 7).mul_(wide).sub_(groups).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def quantize_weight(weight: torch.Tensor, arguments: QuantizationArgs, search: bool = False) -> State:
    """Quantise one matrix to the nearest level, with the scale as it will be stored.

    Args:
        weight: [out, in] in BF16 or FP16; ``in`` divisible by the group size and by 8.
        arguments: of ``int4_arguments``.
        search: whether symmetric scales are searched by squared error; else they follow the largest weight.

    Returns:
        ``weight_packed`` int32 [out, in / 8], ``weight_scale`` [out, groups] in the weight's dtype, ``weight_shape``,
        and for asymmetric arguments ``weight_zero_point`` int32 [out / 8, groups].
    """
    size = arguments.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise ValueError(f"group size {size} does not divide {weight.shape[1]} input features")
    groups = weight.float().view(weight.shape[0], -1, size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    # An all-zero group has scale 0; any positive scale stores its zeros exactly.
    scale = torch.where(scale == 0, 1.0, scale).to(weight.dtype)
    if search and arguments.symmetric:
        scale = search_scale(groups, scale)
    state = {
        "weight": weight.float(),
        "weight_scale": scale,
        "weight_zero_point": zero_point.round().to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=[], weights=arguments))
    return {name: tensor.contiguous().cpu() for name, tensor in packed.items()}


def dequantize_weight(state: State, arguments: QuantizationArgs) -> torch.Tensor:
    """The matrix ``[out, in]`` that ``quantize_weight``'s result stands for, in the scale's dtype."""
    state = {**state, "weight_shape": torch.Size(state["weight_shape"].tolist())}  # type: ignore[dict-item]
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(
        state, QuantizationScheme(targets=[], weights=arguments)
    )["weight"]
    return weight


def split_experts(state: State) -> State:
    """Un-fuse 3-D expert tensors ``experts.gate_up_proj [E, 2I, H]`` into ``experts.N.gate_proj.weight`` and so on."""
    split: State = {}
    for name, tensor in state.items():
        match = _FUSED.match(name)
        if match is None or tensor.ndim != 3:
            split[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = {"down_proj": weight} if match["name"] == "down_proj" else None
            for part, matrix in (parts or dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))).items():
                split[f"{match['prefix']}.{expert}.{part}.weight"] = matrix
    return split


def fuse_experts(state: State) -> State:
    """Inverse of ``split_experts``."""
    fused: State = {}
    experts: dict[str, dict[int, State]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in state.items():
        match = _EXPERT.match(name.removesuffix(".weight"))
        if match is None:
            fused[name] = tensor
        else:
            experts[match["prefix"]][int(match["expert"])][match["name"]] = tensor
    for prefix, by_expert in experts.items():
        ordered = [by_expert[expert] for expert in range(len(by_expert))]
        fused[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered])
        fused[f"{prefix}.down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return fused


def dequantize_int4(source: Path, out: Path, fused: bool = True) -> None:
    """Write the 16-bit checkpoint that an INT4 one stands for.

    Args:
        source: folder written by ``export_int4``.
        out: folder to write; made if absent.
        fused: whether experts are written as 3-D tensors, as transformers does, or one by one.
    """
    quantization = json.loads((source / "config.json").read_text())["quantization_config"]
    arguments = QuantizationArgs.model_validate(quantization["config_groups"]["group_0"]["weights"])
    packed: dict[str, State] = defaultdict(dict)
    state: State = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        module, _, key = name.rpartition(".")
        if _EXPERT.match(module):
            packed[module][key] = tensor
        else:
            state[name] = tensor
    state.update({f"{module}.weight": dequantize_weight(parts, arguments) for module, parts in packed.items()})
    _write(source, out, fuse_experts(state) if fused else state, None)


def _write(source: Path, out: Path, state: State, quantization: dict[str, Any] | None) -> None:
    """Write weights, the source's side files and its ``config.json`` with or without a quantisation."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / WEIGHTS, metadata={"format": "pt"})
