"""What a model takes on a GPU that need not be there: the arithmetic of ``auto``, out of headers and assumptions.

Served as by ``vllm serve`` on one GPU, without encoders of images and sound; HLWQ checkpoints stand for their INT4
export.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .bank_sizes import BankSizes, streamed_bytes
from .checkpoint_sizes import ModelSizes, UnknownSizes, model_sizes
from .config_facts import ConfiguredModel, configured_model
from .errors import CheckpointError
from .gpus import GPUS, Gpu
from .options import KV_FLOOR_SEQS
from .served_checkpoint import served_checkpoint
from .sizing import HIT_RATES, DenseModel, DeviceEstimate, Step, expected_hits, graphs_captured, kv_floor_elements

OVERLAPPING_STEPS = 2
"""Steps under way at once with vLLM's default, asynchronous scheduling."""
SYSTEM_BYTES = 6 * 2**30
"""Of host memory, for vLLM's processes and the system beside the experts."""
ASSUMED_HITS = tuple(hits for _, hits in reversed(HIT_RATES[1:-1]))
"""Of 1000; what others report with 50, 25 and 12.5 % of Gemma-4-26B-A4B's experts resident."""
LOWER = "lower --max-num-seqs, --max-num-batched-tokens, --context or --kv-floor-seqs"


@dataclass(frozen=True)
class Settings:
    """How the model would be served; defaults are vLLM 0.32's for GPUs below 70 GiB.

    context: ``--max-model-len``; None for the model's own.
    kv_floor_seqs: sequences of that length for which there must be room.
    max_num_seqs, max_num_batched_tokens, utilization_permille: of vLLM, ``--gpu-memory-utilization`` in parts
        of 1000.
    ram: bytes of host memory, None if it is not to be judged.
    slots: experts per layer; None for as many as fit.
    staging_size: experts of a staging bank; None for the default.
    hits_permille: hits of 1000, for which a bound is given.
    reference: whether the experts run on the reference backend, as on a CPU.
    """

    context: int | None = None
    kv_floor_seqs: int = KV_FLOOR_SEQS
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    utilization_permille: int = 920
    ram: int | None = None
    slots: int | None = None
    staging_size: int | None = None
    hits_permille: tuple[int, ...] = ASSUMED_HITS
    reference: bool = False


def mebibytes(size: int) -> str:
    """Bytes as messages give them."""
    return f"{size / 2**20:,.0f} MiB"


class Plan:
    """A model on any GPU.

    Args:
        path: the model's folder: ``config.json``, and tensor headers or none at all.
        settings: how it would be served.

    Raises:
        CheckpointError: the folder is damaged, or the model's sizes are not known.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.served = served_checkpoint(path)
        self.model: ConfiguredModel = configured_model(path, settings.context or 1)
        try:
            self.sizes: ModelSizes = model_sizes(self.served.tensors, self.model.facts)
        except UnknownSizes as reason:
            raise CheckpointError(f"{path}: {reason}") from None
        if len(self.sizes.kv_layers) != self.model.facts.kv_layers:
            raise CheckpointError(f"{path}: what the KV cache takes of this kind of attention is not known")
        if settings.slots is not None and not 1 <= settings.slots <= self.model.facts.num_experts:
            raise CheckpointError(
                f"--slots {settings.slots}: the model has {self.model.facts.num_experts} experts per layer; give a "
                "number from 1 to that"
            )

    @property
    def backend(self) -> str:
        """What computes the experts."""
        if self.settings.reference:
            return "reference"
        return "marlin" if self.sizes.experts[0].packed else "triton"

    @property
    def context(self) -> int:
        return self.settings.context or self.model.longest

    @cached_property
    def step(self) -> Step:
        tokens = self.settings.max_num_batched_tokens
        sequences = min(self.settings.max_num_seqs, tokens)
        graphs = 0 if self.settings.reference else graphs_captured(sequences, tokens)
        return Step(tokens, sequences, graphs)

    def banks(self, device_bytes: int) -> BankSizes:
        return BankSizes(
            tuple(s.stored_bytes if self.settings.reference else s.record_bytes for s in self.sizes.experts),
            self.model.facts.num_experts,
            self.model.top_k,
            device_bytes,
            self.settings.staging_size,
            reference=self.settings.reference,
        )

    @cached_property
    def kv_floor(self) -> int:
        in_flight = OVERLAPPING_STEPS * self.step.tokens
        elements = kv_floor_elements(self.sizes.kv_layers, self.context, in_flight)
        return elements * self.model.facts.float_bytes * self.settings.kv_floor_seqs

    def estimate(self, device_bytes: int) -> DeviceEstimate:
        facts, sizes = self.model.facts, self.sizes
        dense = DenseModel(
            sizes.dense_bytes, sizes.dense_bytes, facts.hidden, sizes.row_elements, facts.vocabulary,
            facts.rotary_elements,
        )  # fmt: skip
        return DeviceEstimate.of(dense, sizes.experts, self.step, self.kv_floor, self.banks(device_bytes))

    def on(self, gpu: Gpu) -> dict[str, Any]:
        """Slots, bytes and bounds on a GPU, as JSON values; bytes unless the name says otherwise."""
        estimate = self.estimate(gpu.usable)
        granted = gpu.usable * self.settings.utilization_permille // 1000
        slots = self.settings.slots or estimate.most_slots(granted)
        found: dict[str, Any] = {
            "gpu": gpu.name,
            "memory": gpu.nominal,
            "usable": gpu.usable,
            "granted": granted,
            "link": gpu.link_name,
            "link_bytes_per_s": gpu.link,
            "slots": slots,
            "fits": bool(slots) and estimate.bytes(slots) <= granted,
            "beside_experts": {name: size for name, size in asdict(estimate).items() if isinstance(size, int)},
        }
        if not slots:
            return found | {"problems": [self._shortage(estimate, granted)]}
        banks = estimate.banks
        return found | {
            "slot_bytes": banks.slot_bytes(slots),
            "staging_bytes": banks.staging_bytes(slots),
            "vram_bytes": estimate.bytes(slots),
            "host_bytes": banks.host_bytes(slots),
            "problems": list(self._problems(estimate, granted, slots)),
            "bounds": [self._bound(banks, gpu.link, hits) for hits in self.settings.hits_permille],
            "expected": self._bound(banks, gpu.link, expected_hits(slots, banks.num_experts)),
        }

    def _shortage(self, estimate: DeviceEstimate, granted: int) -> str:
        return f"not even 1 slot fits: {mebibytes(estimate.bytes(1))} are needed, {mebibytes(granted)} granted; {LOWER}"

    def _problems(self, estimate: DeviceEstimate, granted: int, slots: int) -> Iterator[str]:
        if estimate.bytes(slots) > granted:
            most = estimate.most_slots(granted)
            rest = f"the largest number that fits is {most}" if most else f"not even 1 slot fits; {LOWER}"
            yield (
                f"{slots} slots need {mebibytes(estimate.bytes(slots))} of GPU memory, {mebibytes(granted)} are "
                f"granted; {rest}"
            )
        ram, host = self.settings.ram, estimate.banks.host_bytes(slots)
        if ram is not None and host + SYSTEM_BYTES > ram:
            yield (
                f"{mebibytes(host)} of page-locked experts and {mebibytes(SYSTEM_BYTES)} for everything else exceed "
                f"--ram, {mebibytes(ram)}; all experts must be in host memory, so it takes more of that or an export "
                "with fewer bits a weight"
            )

    def _bound(self, banks: BankSizes, link: int, hit_permille: int) -> dict[str, Any]:
        """What the link allows a single sequence, with the rest of the step taking no time."""
        streamed = streamed_bytes(banks, hit_permille)
        return {
            "hit_rate": hit_permille / 1000,
            "bytes_per_token": streamed,
            "ms_per_token": round(1000 * streamed / link, 3),
        }

    def report(self, gpu: Gpu | None = None) -> dict[str, Any]:
        """Everything that ``hlwq plan`` prints, as JSON values; on ``gpu`` too if there is one."""
        facts, banks = self.model.facts, self.banks(0)
        return {
            "model": self.path.name,
            "format": self.served.format,
            "group_size": self.sizes.experts[0].group_size,
            "backend": self.backend,
            "layers": len(banks.records),
            "experts": facts.num_experts,
            "top_k": self.model.top_k,
            "expert_bytes": max(banks.records),
            "slot_bytes": sum(banks.records),
            "all_experts_bytes": sum(banks.records) * facts.num_experts,
            "dense_bytes": self.sizes.dense_bytes,
            "kv_floor_bytes": self.kv_floor,
            "context": self.context,
            "longest": self.model.longest,
            "settings": asdict(self.settings),
            "target": None if gpu is None else self.on(gpu),
            "gpus": [self.on(known) for known in GPUS],
        }
