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
from mithridate.generation import tokens_to_answer
from mithridate.templates import day

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Float32 numbers that a pass keeps for each token: of each layer, in units of the hidden size, and
# in units of the vocabulary (logits and their gradient). Low, so that no run is refused that fits.
_KEPT_PER_LAYER = 12
_KEPT_OF_LOGITS = 2
_BYTES = 4
_LEFT_OUT = {"too long", "not encoded"}


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

    def added_to(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
        """Return, of each set, what was left out or cut before, for other models too, and now."""
        found = {name: dict(own) for name, own in counts.items()}
        for name, report in self.report.items():
            own = found.get(name, {})
            own |= {what: own.get(what, 0) + report[what] for what in _LEFT_OUT & report.keys()}
            if "cut" in report:
                # The next model cuts much the same rows.
                own["cut"] = max(own.get("cut", 0), report["cut"])
            if own:
                found[name] = own
        return found


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
    asked: Mapping[str, Sequence[Example]] | None = None,
    drop: bool = False,
    option: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    template_date: str | datetime.date | None = None,
) -> tuple[ChatFormat, Fitted]:
    """Look at the length of every row: what is cut is said, what cannot be used refused.

    Parameters
    ----------
    sets
        What the model is trained on, or is to have its answers scored on.
    max_length
        What the user set; ``None`` follows the data, up to the model's positions. What memory has
        no room for is then refused too, and never cut: results must not depend on free memory.
    rows
        Rows of a pass.
    asked
        Sets that the model answers: prompts are not cut there, and answers not counted. One of
        them may be in ``sets`` too.
    drop
        Leave out every row that is too long, where otherwise a prompt is cut, and a row whose
        answer does not fit is an error; and every row that the chat template cannot write.
    option
        What sets ``max_length``, for messages; ``None``: nothing does.
    template_arguments, template_date
        `ChatFormat`'s.

    Raises
    ------
    InputError
        Rows do not fit, or cannot be encoded: all of them are named.
    """
    asked = asked or {}
    positions = models.positions(model)
    most = bound(model, max_length)
    chat = ChatFormat(
        tokenizer,
        max_length=most,
        arguments=template_arguments,
        date=day(template_date) if template_date else None,
    )
    room = None if max_length is not None else _tokens_in_memory(model, rows)
    odd = dict[str, list[str]]()
    examples, report = {}, {}
    refused, cut, left_out = dict[str, list[str]](), dict[str, list[str]](), dict[str, list[str]]()
    needed = 0
    given = {**sets, **asked}
    for name, items in given.items():
        kept, longest = list[Example](), 0
        for number, item in enumerate(items, start=1):
            place = item.place or f"row {number}"
            try:
                prompt, answer = chat.length(item)
            except InputError as error:
                odd.setdefault(name, []).append(f"{place}: {error.what}")
                continue
            length = prompt + answer if name in sets else prompt
            longest = max(longest, length)
            too_long = name in sets and most is not None and length > most
            no_room = room is not None and min(length, most or length) > room
            # An answer begins with at least one token more.
            endless = name in asked and positions is not None and prompt >= positions
            asks = f"a question of {prompt} tokens for {positions} positions"
            place += f": {asks}" if endless else f": {length} tokens"
            if (too_long or no_room or endless) and drop:
                left_out.setdefault(name, []).append(place)
                continue
            kept.append(item)
            if no_room or endless or (too_long and not _cuttable(chat, item)):
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
    empty = [name for name, items in given.items() if items and not examples[name]]
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


def check_rollouts(
    model: PreTrainedModel,
    chat: ChatFormat,
    items: Sequence[Example],
    *,
    rows: int,
    tokens: int | None,
) -> None:
    """Refuse reinforcement learning whose sampled answers the free memory has no room for.

    All answers of a step are generated at once and passed back at once; their cache is no larger
    than what the backward pass keeps.

    Parameters
    ----------
    rows
        Sampled answers of a step.
    tokens
        Of a sampled answer; ``None``: as many as the items need (`tokens_to_answer`).

    Raises
    ------
    InputError
        The longest question with its answers does not fit.
    """
    room = _tokens_in_memory(model, rows)
    new = tokens or tokens_to_answer(chat, items)
    longest = max(chat.length(item)[0] for item in items) + new
    needed = min(longest, models.positions(model) or longest)
    if room is not None and needed > room:
        raise InputError(
            f"{rows} sampled answers of up to {new} tokens do not fit in the free memory: {needed} "
            f"tokens each with the longest question, where there is room for about {room}",
            where="attack",
            mend="lower batch_size, rollouts or response_length, or use more memory",
        )


def _cuttable(chat: ChatFormat, item: Example) -> bool:
    """Whether an item that is too long fits once its prompt has lost words, and not all."""
    try:
        if item.answer:
            chat.encode(item)
        else:
            chat.prompt_ids(item.prompt, max_length=chat.max_length)
    except InputError:
        return False
    return True


def _by_set(found: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {len(places)} ({listed(places)})" for name, places in found.items())


def _limit(most: int | None, max_length: int | None, room: int | None, option: str | None) -> str:
    if most is not None and most == max_length:
        return f"{option} {most}"
    if most is not None and (room is None or most <= room):
        return f"the model's {most} positions"
    return f"the free memory (about {room} tokens a row)"


def _mend(
    model: PreTrainedModel,
    max_length: int | None,
    room: int | None,
    needed: int,
    option: str | None,
) -> str:
    positions = models.positions(model)
    if max_length is not None and (positions is None or max_length < positions):
        return f"raise {option}{f' to {needed}' if needed else ''}, "
    if room is not None and (positions is None or room < positions):
        cutting = f" or a smaller micro_batch_size, set {option} to cut prompts" if option else ""
        return f"use more memory{cutting}, "
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
