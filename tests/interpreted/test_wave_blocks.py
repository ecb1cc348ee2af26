"""Blocks of waves in Triton's interpreter, against a loop over blocks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hlwq.wave_blocks import Alignment, blocks_of_waves


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Alignment, torch.Tensor, int]:
    """An alignment of used blocks, -1 after them and a last block cut short; bank rows by wave and expert."""
    experts = draw(st.integers(1, 40))
    waves = draw(st.integers(1, 4))
    size = draw(st.sampled_from([8, 16, 48, 64, 128, 200]))
    used = sorted(draw(st.lists(st.integers(0, experts - 1), max_size=200)))
    blocks = len(used) + draw(st.integers(1, 80))
    wave_of = [draw(st.integers(0, waves - 1)) for _ in range(experts)]
    wave_rows = torch.full((waves, experts), -1, dtype=torch.int32)
    for expert, wave in enumerate(wave_of):
        wave_rows[wave, expert] = draw(st.integers(0, 99))
    places = blocks * size - draw(st.integers(0, size - 1))
    sorted_rows = torch.randint(0, 10**6, (places,), dtype=torch.int32)
    block_rows = int32(used + [-1] * (blocks - len(used)))
    return Alignment(sorted_rows, block_rows, int32([len(used) * size]), size), wave_rows, len(used)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_each_wave_has_its_blocks_in_order(case: tuple[Alignment, torch.Tensor, int]) -> None:
    alignment, wave_rows, used = case
    size = alignment.block_size
    found = blocks_of_waves(alignment, wave_rows)
    assert len(found) == len(wave_rows)
    for rows, wave in zip(wave_rows.tolist(), found, strict=True):
        experts = alignment.block_rows[:used].tolist()
        mine = [block for block, expert in enumerate(experts) if rows[expert] >= 0]
        assert wave.block_size == size
        assert all(part.data_ptr() % 16 == 0 for part in (wave.sorted_rows, wave.block_rows, wave.padded_rows))
        assert wave.padded_rows.tolist() == [len(mine) * size]
        assert wave.block_rows[: len(mine)].tolist() == [rows[experts[block]] for block in mine]
        wanted = [alignment.sorted_rows[block * size : (block + 1) * size] for block in mine]
        assert torch.equal(wave.sorted_rows[: len(mine) * size], torch.cat(wanted) if wanted else int32([]))
