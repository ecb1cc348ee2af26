"""Weights in host memory behind tensors of the device, with the CPU in the place of the device."""

from __future__ import annotations

import gc

import pytest
import torch
from test_pinned_memory import MemoryLock

from vllm_hlwq.bench import host_mapped
from vllm_hlwq.bench.host_mapped import HostMappedBank

CPU = torch.device("cpu")
FIELDS = {
    "w13_weight": torch.randint(-(2**31), 2**31, (5, 4, 12), dtype=torch.int32),
    "w13_scale": torch.randn(5, 2, 24).bfloat16(),
}


class SameAddress(MemoryLock):
    def device_address(self, address: int) -> int:
        return address


def test_fields_are_contiguous_and_page_locked_as_long_as_the_bank_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_mapped, "borrow", lambda _: lambda tensor: tensor)
    runtime = SameAddress()
    bank = HostMappedBank(FIELDS, CPU, runtime)
    assert (bank.rows, list(bank.fields)) == (5, list(FIELDS))
    for name, field in bank.fields.items():
        assert torch.equal(field, FIELDS[name])
        assert field.is_contiguous()
        assert runtime.sizes[field.data_ptr()] == field.nbytes
    assert not runtime.released
    del bank, field
    gc.collect()
    assert sorted(runtime.released) == sorted(runtime.sizes)


def test_a_copy_is_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_mapped, "borrow", lambda _: torch.clone)
    with pytest.raises(RuntimeError, match="view of w13_weight is not of the page-locked memory"):
        HostMappedBank(FIELDS, CPU, SameAddress())
