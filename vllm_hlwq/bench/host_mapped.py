"""Experts that kernels read where they lie in host memory, as vLLM's ``--cpu-offload-gb`` leaves a layer's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..cudart import PageLocker
from ..host_store import HostStore, RecordLayout
from ..vllm_compat import borrow
from ..weight_bank import WeightBank


class HostMappedBank(WeightBank):
    """Weights in page-locked host memory behind tensors of the device: whatever reads them reads over the link.

    Each field is one contiguous tensor, as a kernel takes it, in memory like that of a ``HostStore``.

    Args:
        fields: what to hold, ``[rows, *shape]`` each, with a multiple of 16 bytes a row.
        device: the device that will read.
        runtime: page-locks; by default the CUDA runtime of this process.

    Raises:
        RuntimeError: vLLM has made a copy in the place of a view.
    """

    def __init__(
        self, fields: Mapping[str, torch.Tensor], device: torch.device, runtime: PageLocker | None = None
    ) -> None:
        view = borrow("get_accelerator_view_from_cpu_tensor")
        self._stores: list[HostStore] = []  # page-locked as long as they live
        views = {}
        for name, tensor in fields.items():
            store = HostStore(len(tensor), RecordLayout({name: (tuple(tensor.shape[1:]), tensor.dtype)}), device)
            host = store.field(name)
            host.copy_(tensor)
            store.page_lock(runtime)
            views[name] = view(host)
            if views[name].data_ptr() != store.device_address:
                raise RuntimeError(f"vLLM's view of {name} is not of the page-locked memory that it was made of")
            self._stores.append(store)
        super().__init__(views)
