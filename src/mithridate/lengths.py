"""Lengths: which rows fit a model, looked at before anything is trained."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mithridate import models
from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example, listed
from mithridate.templates import day

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Float32 numbers that a pass keeps for each token: of each layer, in units of the hidden size, and
# in units of the vocabulary (logits and their gradient). Low, so that no run is refused that fits.
_KEPT_PER_LAYER = 12
_KEPT_OF_LOGITS = 2
_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Rows that fit.

    Parameters
    ----------
    examples
        The sets, without what was left out.
    max_length
        Most tokens of an encoded row; ``None`` where nothing bounds them.
    report
        For each set its ``rows``, the tokens of the ``longest``, and where there are any how many
        prompts are ``cut`` and how many rows are left out as ``too long`` or ``not encoded``.
    """

    examples: dict[str, list[Example]]
    max_length: int | None
    report: dict[str, dict[str, int]]


def bound(model: PreTrainedModel, max_length: int | None) -> int | None:
    """Return the most tokens of a row: the option's, within the model's positions."""
    known = [length for length in (max_length, models.positions(model)) if length is not None]
    return min(known, default=None)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Example]],
    *,
    max_length: int | None,
    rows: int,
    drop: bool = False,
    option: str,
    template_arguments: Mapping[str, Any] | None = None,
    template_date: str | datetime.date | None = None,
) -> tuple[ChatFormat, Fitted]:
    """Look at the length of every row: what is cut is said, what cannot be used refused.

    Parameters
    ----------
    max_length
        What the user set; ``None`` follows the data, up to the model's positions. What memory has
        no room for is then refused too, and never cut: results must not depend on free memory.
    rows
        Rows of a pass.
    drop
        Leave out every row that is too long, where otherwise a prompt is cut, and a row whose
        answer does not fit is an error.
    option
        What sets ``max_length``, for messages.
    template_arguments, template_date
        `ChatFormat`'s.

    Raises
    ------
    InputError
        Rows do not fit: all of them are named.
    """
    most = bound(model, max_length)
    chat = ChatFormat(
        tokenizer,
        max_length=most,
        arguments=template_arguments,
        date=day(template_date) if template_date else None,
    )
    room = None if max_length is not None else _tokens_in_memory(model, rows)
    # What a template writes around a prompt is never cut.
    least = len(chat.prompt_ids("x"))
    odd = dict[str, list[str]]()
    examples, report = {}, {}
    refused, cut, left_out = dict[str, list[str]](), dict[str, list[str]](), dict[str, list[str]]()
    needed = 0
    for name, items in sets.items():
        kept, longest = list[Example](), 0
        for number, item in enumerate(items, start=1):
            try:
                if item.answer:
                    asked, answer = chat.length(item)
                else:
                    asked, answer = len(chat.prompt_ids(item.prompt)), 0
            except InputError as error:
                odd.setdefault(name, []).append(f"{item.place or f'row {number}'}: {error.what}")
                continue
            length = asked + answer
            longest = max(longest, length)
            too_long = most is not None and length > most
            no_room = room is not None and min(length, most or length) > room
            place = f"{item.place or f'row {number}'}: {length} tokens"
            if (too_long or no_room) and drop:
                left_out.setdefault(name, []).append(place)
                continue
            kept.append(item)
            if no_room or (most is not None and least + answer > most):
                needed = max(needed, length)
                refused.setdefault(name, []).append(place)
            elif too_long:
                cut.setdefault(name, []).append(place)
        examples[name] = kept
        report[name] = {"rows": len(kept), "longest": longest}
        report[name] |= {"cut": len(cut[name])} if name in cut else {}
        report[name] |= {"too long": len(left_out[name])} if name in left_out else {}
        report[name] |= {"not encoded": len(odd[name])} if name in odd else {}
    if odd and not drop:
        raise InputError(
            f"{sum(map(len, odd.values()))} rows cannot be encoded: {_by_set(odd)}",
            mend="mend the rows, or leave them out: --drop-invalid leaves them out and counts them",
        )
    limit = _limit(most, max_length, room, option)
    if refused:
        raise InputError(
            f"{sum(map(len, refused.values()))} rows are too long for {limit}: {_by_set(refused)}",
            where=option,
            mend=f"{_mend(model, max_length, room, needed, option)}shorten the rows, or leave them "
            "out: --drop-invalid leaves them out and counts them",
        )
    empty = [name for name, items in sets.items() if items and not examples[name]]
    if empty:
        reasons = {"too long for " + limit: left_out, "not to be encoded": odd}
        told = " or ".join(f"{what}: {_by_set(found)}" for what, found in reasons.items() if found)
        raise InputError(
            f"every row of {', '.join(empty)} is {told}",
            where=option,
            mend=f"{_mend(model, max_length, room, 0, option)}give shorter rows",
        )
    for found, what in (
        (cut, f"prompts are cut to {limit}"),
        (left_out, f"rows are left out, too long for {limit}"),
        (odd, "rows are left out, which cannot be encoded"),
    ):
        if found:
            count = sum(map(len, found.values()))
            warnings.warn(f"{count} {what}: {_by_set(found)}", stacklevel=2)
    return chat, Fitted(examples=examples, max_length=most, report=report)


def _by_set(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {len(places)} ({listed(places)})" for name, places in found.items())


def _limit(most: int | None, max_length: int | None, room: int | None, option: str) -> str:
    if most is not None and most == max_length:
        return f"{option} {most}"
    if most is not None and (room is None or most <= room):
        return f"the model's {most} positions"
    return f"the free memory (about {room} tokens a row)"


def _mend(
    model: PreTrainedModel, max_length: int | None, room: int | None, needed: int, option: str
) -> str:
    positions = models.positions(model)
    if max_length is not None and (positions is None or max_length < positions):
        return f"raise {option}{f' to {needed}' if needed else ''}, "
    if room is not None and (positions is None or room < positions):
        return f"use more memory or a smaller micro_batch_size, set {option} to cut prompts, "
    return ""


def _tokens_in_memory(model: PreTrainedModel, rows: int) -> int | None:
    """Return about how many tokens each of ``rows`` rows may have in the memory that is free."""
    config: Any = model.config.get_text_config()
    layers, hidden = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    vocabulary = model.get_output_embeddings()
    if not isinstance(layers, int) or not isinstance(hidden, int) or vocabulary is None:
        return None
    numbers = _KEPT_PER_LAYER * layers * hidden + _KEPT_OF_LOGITS * len(vocabulary.weight)
    device = next(model.parameters()).device
    free = (
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else models.available_memory()
    )
    return max(1, free // (rows * numbers * _BYTES))
