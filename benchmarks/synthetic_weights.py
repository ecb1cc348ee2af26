"""Weights of known kinds, float32 ``[512, 128]`` each: as in trained layers, and such as strain a fixed table."""

from __future__ import annotations

from collections.abc import Callable

import torch

KINDS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "normal": lambda g: torch.randn(512, 128, generator=g),
    "heavy tails": lambda g: torch.randn(512, 128, generator=g) / torch.rand(512, 128, generator=g).clamp(min=1e-2),
    "block means": lambda g: torch.randn(512, 128, generator=g) + 2,
    "constant": lambda g: torch.ones(512, 128),
    "ramp": lambda g: torch.linspace(-1, 1, 128).repeat(512, 1),
    "alternating": lambda g: ((-1.0) ** torch.arange(128)).repeat(512, 1),
    "outlier column": lambda g: torch.randn(512, 128, generator=g) * (1 + 30 * (torch.arange(128) == 7)),
}
