"""User options of the expert cache: their names, types, defaults and help texts, declared once.

Every option ``--moe-expert-x-y`` is the key ``moe_expert_x_y`` in vLLM's ``additional_config`` and the field ``x_y``
here. The values travel in ``additional_config`` because vLLM hands it to every worker and hashes it through JSON,
so they are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ExpertCacheError

CONFIG_PREFIX = "moe_expert_"
AUTO: Literal["auto"] = "auto"
KV_FLOOR_SEQS = 2
"""Sequences of full length for which ``auto`` leaves room by default."""


class ExpertCacheOptions(BaseModel):
    """Options of one engine. ``cache_size`` 0 means that the expert cache is off."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cache_size: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default=0,
        description="Experts that each mixture-of-experts layer keeps on the device, least recently used out first; "
        "the rest wait in host memory. 1 to the number of experts; 0 turns the expert cache off; auto fills what "
        "--gpu-memory-utilization grants.",
    )

    staging_size: int | None = Field(
        default=None,
        ge=1,
        description="Experts without a slot that are computed together, in a bank that all layers share. By default on "
        "CUDA all that can be without one, as far as a sixteenth of the GPU's memory goes; on the reference backend "
        "twice the experts of a token.",
    )

    kv_floor_seqs: int | None = Field(
        default=None,
        ge=1,
        description="Sequences of --max-model-len tokens for whose KV cache a cache size of auto leaves room "
        f"({KV_FLOOR_SEQS} by default).",
    )

    metrics_per_layer: bool = Field(
        default=False,
        description="Give the expert cache's metrics on /metrics a label for the layer, instead of sums over layers.",
    )

    trace: str | None = Field(
        default=None,
        min_length=1,
        description="File to record expert routing to, for `hlwq simulate`; it must not exist yet. Saved while it "
        "grows and at shutdown.",
        json_schema_extra={"metavar": "FILE"},
    )

    profile: str | None = Field(
        default=None,
        min_length=1,
        description="File that says which experts the slots held: they are filled from it at start-up, if it is there, "
        "and it is saved while the server runs and at shutdown.",
        json_schema_extra={"metavar": "FILE"},
    )

    store_cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for converted experts: the next start with the same checkpoint, vLLM and layout reads them "
        "and converts nothing.",
        json_schema_extra={"metavar": "DIR"},
    )

    @property
    def slots(self) -> int:
        """The cache size where it is known to be a number: in a worker, before its model is built, and from then on.

        Raises:
            ExpertCacheError: it is still ``auto``.
        """
        if self.cache_size == AUTO:
            raise ExpertCacheError(f"{flag('cache_size')} {AUTO} has not been settled before the model was built")
        return self.cache_size

    @property
    def without_meaning(self) -> str | None:
        """Say which option has no effect beside the cache size, None if all have."""
        for name, value in self.model_dump(exclude_defaults=True).items():
            if self.cache_size == 0:
                given = flag(name) if value is True else f"{flag(name)} {value}"
                return f"{given} has no meaning without {flag('cache_size')}; give a cache size, or remove it"
        if self.cache_size != AUTO and self.kv_floor_seqs is not None:
            return (
                f"{flag('kv_floor_seqs')} {self.kv_floor_seqs} has no meaning without {flag('cache_size')} {AUTO}; "
                "give that, or remove it"
            )
        return None

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> ExpertCacheOptions:
        """Read the options out of vLLM's ``additional_config``; other keys there belong to others and are left alone.

        Raises:
            ExpertCacheError: a value is unusable, or a key has our prefix but is no option of ours.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        given = {
            key.removeprefix(CONFIG_PREFIX): value
            for key, value in additional_config.items()
            if isinstance(key, str) and key.startswith(CONFIG_PREFIX)
        }
        try:
            return cls(**given)
        except ValidationError as error:
            raise ExpertCacheError(_first_problem(error)) from None


def config_key(field: str) -> str:
    """``additional_config`` key of an option: ``cache_size`` -> ``moe_expert_cache_size``."""
    return CONFIG_PREFIX + field


def flag(field: str) -> str:
    """Command-line flag of an option: ``cache_size`` -> ``--moe-expert-cache-size``."""
    return "--" + config_key(field).replace("_", "-")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = str(problem["loc"][0])
    name, value = config_key(field), problem["input"]
    if problem["type"] == "extra_forbidden":
        known = ", ".join(config_key(option) for option in ExpertCacheOptions.model_fields)
        return f"{name} is no option of the expert cache; known options: {known}"
    if problem["type"] == "bool_type":
        return f"{name}={value!r}: must be true or false"
    if field in ("trace", "profile", "store_cache"):
        return f"{name}={value!r}: must be the path of a {'folder' if field == 'store_cache' else 'file'}"
    return f"{name}={value!r}: must be {domain(field)}"


def domain(field: str) -> str:
    """What values an option takes, in words."""
    if field == "cache_size":
        return f"a whole number of experts, 0 (off) or more, or {AUTO}"
    return f"a whole number of {'sequences' if field == 'kv_floor_seqs' else 'experts'}, 1 or more"
