"""Files that say which experts of each layer are worth a slot, for a server's next start.

JSON: ``version``, ``vllm``, ``model`` (``ModelFingerprint``) and ``layers``, by vLLM's name of the layer the ids of its
experts in the checkpoint, the most valuable first. A list may be longer than the slots that there are now, or shorter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .atomic_file import replacing
from .checkpoint_identity import checkpoint_identity
from .errors import ExpertCacheError
from .options import flag
from .served_checkpoint import model_folder

REMEDY = "move it away, or give another name"


class ModelFingerprint(BaseModel):
    """Which model a profile is of.

    Attributes:
        name: for messages; a copy under another name is the same model.
        checkpoint: digest of ``CheckpointIdentity.contents``; None if there are no safetensors files to tell it by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    architecture: str
    layers: int
    experts: int
    top_k: int
    checkpoint: str | None

    @classmethod
    def of(cls, model_config: Any) -> ModelFingerprint:
        """The fingerprint of vLLM's ``ModelConfig``."""
        folder = model_folder(model_config.model, model_config.revision)
        identity = None if folder is None else checkpoint_identity(folder)
        return cls(
            name=Path(model_config.model).name,
            architecture=", ".join(model_config.architectures),
            layers=model_config.get_total_num_hidden_layers(),
            experts=model_config.get_num_experts(),
            top_k=model_config.get_num_experts_per_tok(),
            checkpoint=None if identity is None else identity.contents,
        )

    def difference(self, other: ModelFingerprint) -> str | None:
        """The first thing in which two models differ, None if they are the same."""
        for name in ("architecture", "layers", "experts", "top_k", "checkpoint"):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                return f"{name} {mine}, this has {others}"
        return None


class Profile(BaseModel):
    """What a file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    vllm: str
    model: ModelFingerprint
    layers: dict[str, list[int]]

    def save(self, path: Path) -> None:
        """Write the file, under its name only when it is whole and on the disk.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        content = memoryview(self.model_dump_json().encode() + b"\n")
        with replacing(path) as file:
            while content:
                content = content[os.write(file, content) :]


def load_profile(path: Path, model: ModelFingerprint) -> Profile | None:
    """Read a profile; None if there is no file.

    Raises:
        ExpertCacheError: the file is no profile, or one of another model.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExpertCacheError(f"{flag('profile')} {path}: cannot be read ({error.strerror}); {REMEDY}") from None
    try:
        profile = Profile.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        reason = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise ExpertCacheError(f"{flag('profile')} {path}: not a profile of experts ({reason}); {REMEDY}") from None
    difference = profile.model.difference(model)
    if difference is not None:
        raise ExpertCacheError(
            f"{flag('profile')} {path}: is of another model, {profile.model.name} with {difference}; {REMEDY}"
        )
    for layer, experts in profile.layers.items():
        strange = next((e for e in experts if not 0 <= e < model.experts), None)
        if strange is not None or len(set(experts)) < len(experts):
            what = "an expert twice" if strange is None else f"expert {strange} of {model.experts}"
            raise ExpertCacheError(f"{flag('profile')} {path}: names {what} in {layer}; {REMEDY}")
    return profile
