"""What the model behind a coded file has: names, shapes, experts, and so what the file lacks.

Known from the base model, else from the list in our own files, else from what transformers makes of ``config.json``;
the last takes seconds and is asked only where nothing else tells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint_files import REMEDY
from ..errors import CheckpointError
from .architecture import parameter_shapes
from .metadata import HlwqConfig
from .names import canonical, unfused
from .sources import PlainSource

Known = tuple[str, tuple[int, ...] | None]
"""A parameter's name, and its shape where that is known."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TIED = ("lm_head", "embed_tokens")
SAME_STACK = {"gate_up_proj": ({"gate_proj", "up_proj"}, {"w1", "w3"}), "down_proj": ({"w2"},)}
"""Un-fused projections that together are a stack."""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class ExpectedModel:
    """The model that a coded file stands for.

    Args:
        path: of the coded file, for errors.
        config: ``config.json``, the base model's if the file has none.
        base: the base model, if there is one.
        own: our writer's list of parameters, if there is one.
    """

    def __init__(self, path: Path, config: dict[str, Any], base: PlainSource | None, own: HlwqConfig | None) -> None:
        self._path = path
        self._config = config
        text = config.get("text_config")
        self._parts = [text, config] if isinstance(text, dict) else [config]
        self._base = base
        self._own = own
        self._known: dict[str, Known] = {}
        if base is not None:
            self._known = {canonical(name): (name, parameter.shape) for name, parameter in base.parameters.items()}
        elif own is not None:
            self._known = {canonical(name): (name, None) for name in own.kept}
            self._known |= {canonical(name): (name, tuple(stats.shape)) for name, stats in own.coded.items()}

    @cached_property
    def _architecture(self) -> dict[str, Known]:
        return {canonical(name): (name, shape) for name, shape in parameter_shapes(self._config).items()}

    @property
    def stacks(self) -> list[str]:
        """Canonical names of the 3-D parameters that are known without asking transformers."""
        return [name for name, (_, shape) in self._known.items() if shape is not None and len(shape) == 3]

    def parameter(self, name: str, is_stack: bool, held: Collection[str]) -> Known:
        """What the model calls a coded parameter.

        Args:
            name: its canonical name.
            is_stack: whether it is a stack of experts.
            held: canonical names of everything in the file.

        Raises:
            CheckpointError: the base model has no such parameter.
        """
        found = self._known.get(name) or self.tied(name, held)
        if found is not None:
            return found
        if self._base is not None:
            raise CheckpointError(
                f"{self._path}: {name} is coded, but the base model {self._base.path} has no such parameter; "
                "give the base model that was coded"
            )
        return (name if is_stack else f"{name}.weight"), None

    def tied(self, name: str, held: Collection[str]) -> Known | None:
        """The embedding's name for a tied head in the file, or the other way round, where the model knows only that.

        Args:
            name: canonical name of what the file holds.
            held: canonical names of everything in it.
        """
        if _last(name) not in TIED:
            return None
        if self._known:
            return self._tied_to(name, self._known)
        # Of a tied pair transformers lists the embedding, so only a lone head has another name.
        if _last(name) == "embed_tokens" or any(_last(other) == "embed_tokens" for other in held):
            return None
        return self._tied_to(name, self._architecture)

    def _tied_to(self, name: str, known: dict[str, Known]) -> Known | None:
        stated = [part["tie_word_embeddings"] for part in reversed(self._parts) if "tie_word_embeddings" in part]
        if name in known or stated[:1] == [False]:
            return None
        (other,) = set(TIED) - {_last(name)}
        partners = [value for key, value in known.items() if _last(key) == other]
        return partners[0] if len(partners) == 1 else None

    def columns(self, name: str) -> int | None:
        """Columns of a coded parameter whose file does not state them."""
        for known in (self._known, self._architecture):
            shape = known.get(name, (name, None))[1]
            expert = unfused(name)
            if shape is None and expert is not None:
                fused = "gate_up_proj" if expert.proj in ("gate_proj", "up_proj") else expert.proj
                shape = known.get(f"{expert.prefix}.{fused}", (name, None))[1]
            if shape:
                return shape[-1]
        return None

    def check_expert_count(self, name: str, found: int, file: Path) -> None:
        """Compare a stack's experts with ``config.json``.

        Raises:
            CheckpointError: it asks for another number.
        """
        wanted = {part[key] for part in self._parts for key in EXPERT_COUNTS if type(part.get(key)) is int}
        if wanted and found not in wanted:
            count = max(wanted)
            problem = "is missing" if found < count else "is one too many"
            raise CheckpointError(
                f"{file}: {name} has {found} experts, config.json says {count}: expert {min(found, count)} {problem}; "
                f"{REMEDY}"
            )

    def check_unfused(self, names: Iterable[str], file: Path) -> None:
        """Refuse a model of one matrix an expert in which an expert lacks what its neighbours have.

        Args:
            names: of all parameters in the file.
            file: to name in errors.
        """
        experts: dict[tuple[str, str], set[int]] = defaultdict(set)
        for name in names:
            parts = unfused(canonical(name))
            if parts is not None:
                experts[parts.prefix, parts.proj].add(parts.expert)
        for (prefix, projection), found in experts.items():
            missing = next((index for index in range(max(found)) if index not in found), None)
            if missing is not None:
                raise CheckpointError(
                    f"{file}: {prefix}.{missing}.{projection} is missing although expert {max(found)} is there; "
                    f"{REMEDY}"
                )
            self.check_expert_count(f"{prefix}.*.{projection}", len(found), file)

    def missing(self, held: Collection[str]) -> list[str]:
        """Parameters that have no source; empty with a base model.

        Args:
            held: names of all parameters in the file.
        """
        if self._base is not None:
            return []
        if self._own is not None:
            return sorted(name for name in (*self._own.kept, *self._own.coded) if name not in held)
        names = {canonical(name) for name in held}
        if not self._architecture:
            return [] if any("norm" in name for name in names) else ["the norms and routers"]
        experts: dict[str, set[str]] = defaultdict(set)
        for parts in map(unfused, names):
            if parts is not None:
                experts[parts.prefix].add(parts.proj)
        return sorted(
            shown
            for name, (shown, _) in self._architecture.items()
            if name not in names and not self._is_unfused(name, experts)
        )

    @staticmethod
    def _is_unfused(name: str, experts: dict[str, set[str]]) -> bool:
        prefix, _, projection = name.rpartition(".")
        sets = ({projection}, *SAME_STACK.get(projection, ()))
        return any(parts <= experts.get(prefix, set()) for parts in sets)
