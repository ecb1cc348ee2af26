"""What a layer that does not fit the GPU says, as numbers; on a GPU ``test_memory_gpu.py`` has it said."""

from __future__ import annotations

import torch

from vllm_hlwq.bank_sizes import BankSizes
from vllm_hlwq.device_loading import CHUNK_BYTES, conversion_bytes, out_of_memory
from vllm_hlwq.host_store import HostStore, RecordLayout

# 30 layers of Gemma-4-26B-A4B on 24 GiB: every staging bank holds all experts without a slot.
SIZES = BankSizes((3_159_552,) * 30, 128, 8, 24 * 2**30)


def test_slots_staging_and_conversion_are_what_must_fit() -> None:
    # 10 GB less the conversion hold 3,080: 30 N + 2 (128 - N) <= 3,080.
    available = 10_000_000_000
    assert (available - 268_435_456) // 3_159_552 == 3080
    assert (3080 - 256) // 28 == 100
    assert out_of_memory(SIZES, 120, available, 268_435_456) == (
        "--moe-expert-cache-size 120: 11374387200 bytes of 120 slots in each of 30 layers, 50552832 of staging and "
        "about 268435456 to convert a layer do not fit the device, where 10000000000 bytes are free beside the other "
        "weights; the largest number that fits, before the KV cache, is 100"
    )


def test_what_just_failed_is_not_proposed() -> None:
    message = out_of_memory(SIZES, 100, 10_000_000_000, 268_435_456)
    assert message.endswith("is 99")


def test_not_even_one() -> None:
    room_for_one = SIZES.bytes(1) + 1000
    assert out_of_memory(SIZES, 4, room_for_one, 1000).endswith("is 1")
    message = out_of_memory(SIZES, 4, room_for_one - 1, 1000)
    assert message.endswith("not even 1 fits: lower --moe-expert-staging-size or take a GPU with more memory")


def test_a_conversion_takes_four_times_a_chunk_or_a_small_layer() -> None:
    layout = RecordLayout({"codes": ((2**20,), torch.uint8)})
    assert conversion_bytes(HostStore(3, layout)) == 4 * 3 * 2**20
    assert conversion_bytes(HostStore(100, layout)) == 4 * CHUNK_BYTES
    assert conversion_bytes(HostStore(2, RecordLayout({"codes": ((2**27,), torch.uint8)}))) == 4 * 2**27
