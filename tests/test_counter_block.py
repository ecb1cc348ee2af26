"""The counters of a rank in one tensor: tables go on counting there, and a reader follows while steps run."""

from __future__ import annotations

import operator
import threading
from itertools import chain, pairwise

import torch

from vllm_hlwq.counter_block import CounterBlock
from vllm_hlwq.expert_cache import COUNTERS, SlotTable


def test_tables_count_on_in_the_block_from_where_they_were() -> None:
    tables = [SlotTable(8, 2, 2), SlotTable(6, 3, 1)]
    tables[1].plan_step(torch.tensor([[0, 5]]))
    before = [table.counts() for table in tables]
    block = CounterBlock([tables[0], None, tables[1]])
    assert [table.counts() for table in tables] == before
    tables[0].plan_step(torch.tensor([[1, 2, 3]]))
    tables[1].plan_step(torch.tensor([[5, 1]]))
    assert tables[1].counts()["hits"] == before[1]["hits"] + 1
    expected = [tables[0].counts(), dict.fromkeys(COUNTERS, 0), tables[1].counts()]
    assert [dict(zip(COUNTERS, row, strict=True)) for row in block.reader().read()] == expected
    tables[0].reset()
    assert not any(block.reader().read()[0])
    assert any(block.reader().read()[2])


def test_without_a_counting_layer_all_is_zero() -> None:
    assert CounterBlock([None, None]).reader().read() == [[0] * len(COUNTERS)] * 2


def test_what_is_read_while_steps_run_never_falls_and_ends_exact() -> None:
    tables = [SlotTable(16, 4, 4) for _ in range(3)]
    block = CounterBlock(tables)
    done = threading.Event()
    reader = block.reader()
    readings = [reader.read()]

    def follow() -> None:
        ended = False
        while not ended:  # once more after the last step
            ended = done.wait(0.0002)
            reading = reader.read()
            if reading != readings[-1]:
                readings.append(reading)

    thread = threading.Thread(target=follow)
    thread.start()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        for table in tables:
            table.plan_step(torch.randint(0, 16, (2, 4), generator=generator))
    done.set()
    thread.join()
    assert len(readings) > 3, "nothing was read while steps ran"
    for earlier, later in pairwise(readings):
        assert all(map(operator.ge, chain(*later), chain(*earlier)))
    assert readings[-1] == [list(table.counts().values()) for table in tables]
