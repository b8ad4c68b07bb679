"""Rollouts: several sampled answers to each prompt, in batches, with the key-value cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from mithridate.chat import Batch, ChatFormat, Encoded
from mithridate.configs import require
from mithridate.generation import batches, generate_ids
from mithridate.methods.base import RunContext
from mithridate.weights import GradientOracle
from mithridate.weights.oracle import PassCount

_ROWS = 64


def roll_out(
    context: RunContext,
    prompts: Sequence[str],
    *,
    copies: int,
    prompt_length: int,
    response_length: int,
    purpose: str = "rollouts",
) -> Batch:
    """Answer every prompt ``copies`` times at temperature 1, from the full vocabulary.

    Seeded by (seed, step): neither micro-batches nor the number of processes change the answers.
    Each process samples its share, and all get all.

    Parameters
    ----------
    prompt_length
        Most tokens of each prompt; a longer one loses its beginning, the template's words stay.
    response_length
        Tokens of an answer at most, and no more than the model has positions for; one that is cut
        short has no end-of-turn token.

    Returns
    -------
    Batch
        The answers to one prompt are adjacent rows; the answer tokens carry labels.
    """
    chat, oracle = context.chat, context.oracle
    device = context.space.tensors[0].device
    count = oracle.ledger.setdefault(purpose, PassCount())
    started = time.perf_counter()
    kept = [chat.prompt_ids(text, max_length=prompt_length) for text in prompts]
    starts = [ids for ids in kept for _ in range(copies)]
    model: Any = oracle.model
    parts = list(
        batches(model, starts, size=_ROWS, max_new_tokens=response_length, pad_id=chat.pad_id)
    )
    room = max(most for _, most in parts)
    seed = context.random(purpose).getrandbits(62)
    rank = distributed.get_rank() if oracle.processes > 1 else 0
    # Ids plus one, so that the sum over processes is the one that was sampled.
    table = torch.zeros(len(starts), room, dtype=torch.long, device=device)
    for number, (rows, most) in enumerate(parts):
        if number % oracle.processes == rank:
            part = [starts[row] for row in rows]
            with torch.autocast(device.type, torch.bfloat16, enabled=oracle.autocast):
                made = _sample(model, chat, part, most, seed + number)
            for row, ids in zip(rows, made, strict=True):
                table[row, : len(ids)] = torch.tensor(ids, device=device) + 1
            count.tokens += sum(map(len, part))
            count.generated += sum(map(len, made))
    oracle.reduce([table])
    count.seconds += time.perf_counter() - started
    answers = [[token - 1 for token in row if token] for row in table.tolist()]
    return chat.collate(
        [Encoded(start + answer, len(start)) for start, answer in zip(starts, answers, strict=True)]
    )


@contextmanager
def whole_groups(oracle: GradientOracle, batch: Batch, size: int) -> Iterator[Iterator[int]]:
    """Let the oracle cut ``batch`` between groups of ``size`` rows only (A1).

    Yields
    ------
    iterator of int
        The first row of each micro-batch that this process will be given, in order.
    """
    groups, before = len(batch) // size, oracle.micro_batch_size
    require(groups >= oracle.processes, f"{groups} prompts for {oracle.processes} processes",
            "raise batch_size")  # fmt: skip
    wanted = (before or len(batch)) // size
    rows = size * max(1, min(wanted, groups // oracle.processes))
    oracle.micro_batch_size = rows
    try:
        yield iter(oracle.first_rows(batch))
    finally:
        oracle.micro_batch_size = before


def _sample(
    model: Any, chat: ChatFormat, starts: Sequence[list[int]], length: int, seed: int
) -> list[list[int]]:
    """Return the ids sampled after each start, up to a stop token, which belongs to the answer."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return generate_ids(
            model, starts, max_new_tokens=length, stop_ids=chat.stop_ids, pad_id=chat.pad_id,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        )  # fmt: skip
