"""The memory book, against allocations whose size is known."""

from __future__ import annotations

import torch

from mithridate.measures.memory import MemoryBook, bytes_of

MIB = 1 << 20


def block(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_the_peak_is_what_was_held_at_one_time() -> None:
    book = MemoryBook()
    with book.watch():
        first = block(64)
        del first
        second, third = block(32), block(16)
        del third
    assert book.peak["cpu"] == 64 * MIB
    assert book.held["cpu"] == second.nbytes == 32 * MIB


def test_what_is_held_counts_in_the_next_watch_also_when_it_is_given_back() -> None:
    book = MemoryBook()
    kept = []
    with book.watch():
        kept.append(block(32))
    with book.watch():
        kept.append(block(8))
        kept.clear()
        extra = block(16)
    assert book.peak["cpu"] == 40 * MIB
    assert book.held["cpu"] == extra.nbytes


def test_blocks_inside_an_operation_and_its_derivative_are_seen() -> None:
    weight = torch.ones(MIB, requires_grad=True)
    book = MemoryBook()
    with book.watch():
        # exp keeps its result for the backward pass; the product's is given back at once.
        loss = (weight.exp() * 2).sum()
        loss.backward()
    assert weight.grad is not None
    assert book.held["cpu"] - weight.grad.nbytes < MIB
    assert 2 * weight.nbytes <= book.peak["cpu"] < 4 * weight.nbytes


def test_shared_storage_counts_once() -> None:
    whole = torch.zeros(100)
    assert bytes_of([whole, whole[:10], whole.view(10, 10)]) == {"cpu": 400}
    assert bytes_of([whole, torch.zeros(5)]) == {"cpu": 420}
