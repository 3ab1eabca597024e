"""Writes behind torch's back to memory on a GPU: noticed without waiting, soon, and for good."""

from __future__ import annotations

import pytest
import torch

from convmixer_fast.modules import watch
from convmixer_fast.modules.watch import CADENCE, Watch, sample


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [
        torch.randn(8, 1, 3, 3, requires_grad=True),
        torch.randn(5).bfloat16(),
        torch.zeros(3),
        torch.tensor([float("nan")] * 40, dtype=torch.float16),
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_dense_write_changes_the_sample(tensors, which):
    before = sample(tensors)
    assert torch.equal(sample(tensors), before)
    tensors[which].data.copy_(torch.randn(tensors[which].shape))
    assert not torch.equal(sample(tensors), before)
    assert before.numel() == sum(t.numel() for t in tensors)
    assert not before.requires_grad


def test_every_element_of_a_vector_and_every_row_and_column_of_a_matrix_is_sampled():
    vector, matrix = torch.zeros(12345), torch.zeros(120, 100, 1, 1)
    assert sample([vector]).numel() == 12345
    before = sample([matrix])
    assert before.numel() == 120
    for line in (*matrix.unbind(0), *matrix.unbind(1)):
        line += 1
        assert not torch.equal(sample([matrix]), before)
        line -= 1


def test_nothing_is_compared_more_often_than_the_cadence(tensors, monkeypatch):
    clock, samples = Clock(), []
    seen = Watch(tensors, clock)
    monkeypatch.setattr(watch, "sample", lambda t: samples.append(1) or sample(t))
    for _ in range(40):
        clock.now += CADENCE / 10
        assert not seen.changed()
    assert 3 <= len(samples) <= 4


class Slow:
    """An answer that takes a while, as a GPU's does."""

    there = False
    waits = 0

    def __init__(self, value: torch.Tensor) -> None:
        self.value = bool(value)

    def is_there(self) -> bool:
        return Slow.there

    def wait(self) -> bool:
        Slow.waits += 1
        return self.value


def test_between_close_calls_the_answer_is_read_when_it_is_there(tensors, monkeypatch):
    monkeypatch.setattr(watch, "_Answer", Slow)
    monkeypatch.setattr(Slow, "there", False)
    monkeypatch.setattr(Slow, "waits", 0)
    clock = Clock()
    seen = Watch(tensors, clock)
    tensors[0].data.mul_(1.5)
    results = []
    for step in range(15):
        clock.now += CADENCE / 10
        Slow.there = step >= 13
        results.append(seen.changed())
    assert results == [False] * 13 + [True, True]
    assert Slow.waits == 1  # only for an answer that was there
    tensors[0].data.div_(1.5)
    assert seen.changed()  # what is stale stays so


def test_after_a_pause_the_first_call_waits_and_knows(tensors, monkeypatch):
    monkeypatch.setattr(watch, "_Answer", Slow)
    monkeypatch.setattr(Slow, "there", False)
    clock = Clock()
    seen = Watch(tensors, clock)
    clock.now += 2 * CADENCE
    assert not seen.changed()
    tensors[1].data.add_(1)
    clock.now += 2 * CADENCE
    assert seen.changed()


def test_an_answer_under_way_is_not_forgotten_over_a_pause(tensors, monkeypatch):
    monkeypatch.setattr(watch, "_Answer", Slow)
    monkeypatch.setattr(Slow, "there", False)
    clock = Clock()
    seen = Watch(tensors, clock)
    for _ in range(11):
        clock.now += CADENCE / 10
        assert not seen.changed()  # the last of these asks
    tensors[2].data.add_(1)  # after the question
    clock.now += 3 * CADENCE
    assert seen.changed()


def test_tensors_are_not_kept_alive(tensors):
    clock = Clock()
    seen = Watch(tensors, clock)
    tensors.pop()
    clock.now += CADENCE
    assert seen.changed()
