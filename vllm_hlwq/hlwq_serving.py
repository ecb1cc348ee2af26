"""vLLM serves an HLWQ checkpoint: as the INT4 sibling that ``hlwq export`` would write, made while the weights load.

vLLM sees a compressed-tensors INT4 model, and every kernel and check is that model's. Nothing is written to disk, and
no more than one parameter is decoded at a time. Importing this module makes its loader known, and a worker process
imports it when it unpickles its configuration.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from tqdm import tqdm

from .checkpoint.dequantize import SixteenBitExport
from .checkpoint.export import Int4Export
from .checkpoint.export_plan import has_experts
from .checkpoint.reader import HlwqSource
from .checkpoint_sizes import is_of_experts
from .codec import CodebookName
from .codec.chunks import on_cpus
from .errors import CheckpointError
from .expert_loading import current_loading
from .hlwq_engine import QUANT_METHODS, is_unnamed_hlwq, loader_options
from .vllm_compat import borrow

LOAD_FORMAT = "hlwq"
Item = TypeVar("Item")

OPTIONS = ("base_model", "codebook")
"""Of ``--model-loader-extra-config``, as ``hlwq export`` has them."""


class HlwqConfig(borrow("CompressedTensorsConfig")):  # type: ignore[misc]
    """The INT4 sibling's configuration, which follows from the checkpoint's files."""

    def get_name(self) -> str:
        return "polarengine"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HlwqConfig:
        """A configuration that still has to be given its checkpoint; what ``config.json`` says is not needed."""
        made: HlwqConfig = super().from_config({"format": "pack-quantized", "config_groups": {}, "ignore": []})
        return made

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the checkpoint's layout; vLLM calls this with the model's name or folder."""
        layout = open_export(local_folder(model_name, revision), loader_options()).config()
        if "quantization_config" in layout:
            self.__dict__.update(super().from_config(layout["quantization_config"]).__dict__)


def local_folder(model: str, revision: str | None = None) -> Path:
    """Where a model's files are, downloaded if it is a name on the hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision))


def open_export(
    folder: Path, options: dict[str, Any], device: torch.device | None = None
) -> Int4Export | SixteenBitExport:
    """The INT4 sibling of an HLWQ checkpoint; of a model without experts, which has none, the 16-bit one.

    Args:
        folder: of the checkpoint.
        options: some of ``OPTIONS``.
        device: where it is decoded and quantised; without one only its layout is asked for.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, or an option is none of these.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise CheckpointError(
                f"--model-loader-extra-config: {name!r} is no option of HLWQ checkpoints, which have "
                f"{' and '.join(OPTIONS)}"
            )
        if name == "codebook" and value not in get_args(CodebookName):
            raise CheckpointError(
                f"--model-loader-extra-config: no codebook {value!r}; give {' or '.join(get_args(CodebookName))}"
            )
    base = options.get("base_model")
    source = HlwqSource(
        folder, Path(base) if base else None, options.get("codebook"), device, need_tables=device is not None
    )
    return Int4Export(source, device=device) if has_experts(source) else SixteenBitExport(source)


class HlwqLoader(borrow("DefaultModelLoader")):  # type: ignore[misc]
    """vLLM's loader with the tensors of the INT4 sibling in the place of files.

    An engine has one load format, so what drafts for an HLWQ model comes here too, in whatever form it is.
    """

    def __init__(self, load_config: Any) -> None:
        self.options = dict(load_config.model_loader_extra_config or {})
        super().__init__(replace(load_config, model_loader_extra_config={}))
        self.stock = borrow("DefaultModelLoader")(replace(self.load_config, load_format="auto"))

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by their names in the checkpoint, decoded where the model computes."""
        # vLLM starts this clock where it opens files; else its log gives the machine's uptime as seconds of loading.
        self.counter_before_loading_weights = time.perf_counter()
        named = model_config.quantization in QUANT_METHODS
        if not named and not is_unnamed_hlwq(model_config.model):
            yield from self.stock.get_all_weights(model_config, model)
            return
        folder = local_folder(model_config.model, model_config.revision)
        device = torch.device("cuda" if borrow("current_platform").is_cuda() else "cpu")
        with on_cpus(() if device.type == "cuda" else cpus_of_the_server()):
            yield from with_torch_defaults(self._tensors(folder, device, named))

    def _tensors(self, folder: Path, device: torch.device, named: bool) -> Iterator[tuple[str, torch.Tensor]]:
        export = open_export(folder, self.options, device)
        if not named and isinstance(export, Int4Export):  # vLLM has made a model without quantisation
            export = SixteenBitExport(HlwqSource(folder, None, None, device))
        skip_experts = current_loading().all_restored
        total = sum(group.bytes for group in export.groups)
        bar = tqdm(total=total, desc="decoding HLWQ", unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with bar:
            for group in export.groups:
                if skip_experts and all(is_of_experts(tensor.name) for tensor in group.tensors):
                    # Decoded and converted at an earlier start; as in ``kept_loader``.
                    for plan in group.tensors:
                        yield plan.name, torch.empty(plan.shape, dtype=plan.dtype, device="meta")
                else:
                    yield from export.tensors(group)
                bar.update(group.bytes)

    def download_model(self, model_config: Any) -> None:
        local_folder(model_config.model, model_config.revision)


def cpus_of_the_server() -> set[int]:
    """CPUs that the process that started this worker may use; vLLM binds a CPU worker's own thread to one."""
    return os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid())


def with_torch_defaults(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made under torch's own default dtype and device, not under those that a model loads in.

    vLLM sets the device by a mode in Python, which every call of torch would go through; without modes it is the CPU.
    """
    while True:
        outside = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch._C.DisableTorchFunction():
                item = next(items)
        except StopIteration:
            return
        finally:
            torch.set_default_dtype(outside)
        yield item


borrow("register_model_loader")(LOAD_FORMAT)(HlwqLoader)
