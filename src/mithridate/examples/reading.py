"""Reading: from a source to the examples of one stream, with everything left out counted."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mithridate.errors import InputError
from mithridate.examples.files import parse_source, rows_of
from mithridate.examples.schemas import (
    MAPPING,
    SAFE_ANSWERS,
    TARGETS,
    Notes,
    RowError,
    examples_of,
)
from mithridate.examples.sets import STREAMS, Example, listed, normalise_prompt
from mithridate.printable import printable

_NAME_LIMIT = 40
_COLUMNS_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the sources of a command are read.

    Parameters
    ----------
    columns
        Of each stream (``""``: of all others), which column or template each part of an example
        is read from, in place of what the schemas say.
    drop_invalid
        Leave out rows that cannot be used, and count them, where they are refused otherwise.
    """

    # Configurations that hold this are keys; a dictionary cannot be hashed.
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)
    drop_invalid: bool = False

    def of(self, name: str) -> Mapping[str, str]:
        """Return the columns that a stream's sources are read from."""
        return {**self.columns.get("", {}), **self.columns.get(name, {})}


AS_PUBLISHED = Reading()
"""By the schemas alone, and every row that cannot be used is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The examples of a source, and how many of its rows were left out for which reason."""

    examples: list[Example]
    left_out: Mapping[str, int]


def parse_columns(given: Sequence[str], streams: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return what ``--columns [STREAM:]prompt=question,answer=response`` says, by stream.

    Raises
    ------
    InputError
        An unknown stream or part of an example, or one named twice.
    """
    found: dict[str, dict[str, str]] = {}
    next_target = re.compile(rf",(?=(?:{'|'.join(TARGETS)})=)")
    for option in given:
        stream, text = "", option
        if (prefix := re.match(r"([\w-]+):", option)) is not None:
            stream, text = prefix[1], option[prefix.end() :]
        for pair in next_target.split(text):
            target, equals, column = pair.partition("=")
            own = found.setdefault(stream, {})
            fault = (
                f"there is no stream {stream!r} here"
                if stream and stream not in streams
                else f"{printable(pair, limit=_NAME_LIMIT)!r} names no part of an example"
                if not equals or target not in TARGETS
                else f"{target!r} is given twice"
                if target in own
                else ""
            )
            if fault:
                raise InputError(
                    fault,
                    where="--columns",
                    mend=f"write {MAPPING}; parts: {', '.join(TARGETS)}; for one stream alone "
                    f"STREAM:prompt=question, of {', '.join(streams)}",
                )
            own[target] = column
    return found


def read_examples(
    source: str | Path,
    *,
    stream: str,
    split: str | None = None,
    revision: str | None = None,
    reading: Reading = AS_PUBLISHED,
) -> list[Example]:
    """Return the examples that `read_source` finds."""
    return read_source(
        source, stream=stream, split=split, revision=revision, reading=reading
    ).examples


def read_source(
    source: str | Path,
    *,
    stream: str,
    name: str = "",
    needs_answer: bool | None = None,
    every_kind: bool = False,
    split: str | None = None,
    revision: str | None = None,
    reading: Reading = AS_PUBLISHED,
) -> Found:
    """Read one stream from a file, from a folder or from the Hugging Face Hub.

    A row holds a prompt and its answer, in columns of their own or as a conversation, in one of
    the forms of `schemas.SCHEMAS` or as ``reading`` says. What a prompt is about (``input``,
    ``context``) is put after it, a system text in front of it; of a longer conversation all
    before the last answer becomes the prompt. Warnings say how many rows that was done to, and
    which columns that hold texts are left out.

    Sets that mark their answers or requests as safe give each stream the rows of its kind, with a
    warning that counts the rest. A ``category`` may be a list of names or a truth value for each
    (BeaverTails): a row of several categories names them with commas between, and a comma inside a
    name becomes a slash. In CSV, ``accepted`` holds answers separated by ``|``.

    Parameters
    ----------
    source
        A ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file, also packed as ``.gz`` or ``.xz``; a
        ``.parquet`` or ``.arrow`` file; a folder that ``save_to_disk`` has written
        (``FOLDER@split`` of a `DatasetDict`); or, where no such file exists, a Hub id
        ``owner/name``, ``owner/name:config@split``.
    stream
        One of `STREAMS`: the kind of rows.
    name
        What the user calls it where ``stream`` is only its kind.
    needs_answer
        ``None``: every stream but ``prompts`` does.
    every_kind
        Take rows whatever they are marked as.
    split, revision
        Passed to the Hub; a split within ``source`` comes first, ``train`` last.

    Raises
    ------
    InputError
        With file, line and field of everything that cannot be used. Texts are not quoted.
    """
    if stream not in STREAMS:
        raise InputError(f"unknown stream {stream!r}", mend=f"known streams: {', '.join(STREAMS)}")
    place = parse_source(source)
    if place.on_hub and place.split is None:
        place = dataclasses.replace(place, split=split or "train")
    examples: list[Example] = []
    faults: list[RowError] = []
    other_kind = rows = 0
    notes = Notes(rows=Counter(), columns={})
    for where, row in rows_of(place, revision=revision):
        rows += 1
        if isinstance(row, RowError):
            faults.append(row)
            continue
        try:
            found = examples_of(
                row,
                where,
                stream,
                columns=reading.of(name or stream),
                needs_answer=stream != "prompts" if needs_answer is None else needs_answer,
                every_kind=every_kind,
                notes=notes,
            )
        except RowError as error:
            faults.append(error)
            continue
        other_kind += not found
        examples += found
    if faults and not (reading.drop_invalid and examples):
        raise _unusable(faults, rows, dropping=reading.drop_invalid)
    if place.on_hub:
        origin = f"{place.name}@{revision}" if revision else place.name
        examples = [
            dataclasses.replace(
                example, source=example.source or origin, split=example.split or place.split or ""
            )
            for example in examples
        ]
    _check_splits(examples)
    left_out = dict(Counter(fault.reason for fault in faults))
    kind = "unsafe" if SAFE_ANSWERS[stream] else "safe"
    if other_kind:
        left_out[f"marked {kind}"] = other_kind
    _warn(
        f"{source}, stream {name or stream}",
        f"the stream {name or stream} leaves out {other_kind} rows that are marked {kind} and "
        f"takes {len(examples)}" if other_kind else "",
        notes,
        faults,
    )  # fmt: skip
    if not examples:
        raise InputError(
            f"holds no examples for the stream {stream}",
            where=str(source),
            mend="give at least one row; rows marked is_safe go to one kind of stream only",
        )
    return Found(examples=examples, left_out=left_out)


def _unusable(faults: Sequence[RowError], rows: int, *, dropping: bool) -> InputError:
    """Return one error for all rows that cannot be used."""
    first = faults[0]
    mend = first.mend
    if not dropping:
        mend += "; --drop-invalid leaves out what cannot be used, and counts it"
    if len(faults) == 1:
        return InputError(first.what, where=first.where, mend=mend)
    return InputError(
        f"{first.what}; {len(faults)} of {rows} rows cannot be used: {_by_reason(faults)}",
        where=first.where,
        mend=mend,
    )


def _by_reason(faults: Sequence[RowError]) -> str:
    places: dict[str, list[str]] = {}
    for fault in faults:
        places.setdefault(fault.reason, []).append(fault.row)
    return "; ".join(
        f"{reason}: {len(found)} ({listed(found)})" for reason, found in places.items()
    )


def _check_splits(examples: Sequence[Example]) -> None:
    split_of: dict[str, tuple[str, str]] = {}
    for example in examples:
        if not example.split:
            continue
        key = normalise_prompt(example.prompt)
        earlier, place = split_of.setdefault(key, (example.split, example.place))
        if earlier != example.split:
            one, other = (printable(name, limit=_NAME_LIMIT) for name in (example.split, earlier))
            raise InputError(
                f"the prompt stands in split {one!r} here and in {other!r} at {place}",
                where=f"{example.place}, field prompt",
                mend="keep each prompt in one split",
            )


def _warn(where: str, other_kind: str, notes: Notes, faults: Sequence[RowError]) -> None:
    """Say once what a reader of the results should know about a source."""
    said = [other_kind] if other_kind else []
    if faults:
        said.append(f"{len(faults)} rows that cannot be used are left out: {_by_reason(faults)}")
    said += [f"{count} rows {what}" for what, count in notes.rows.items()]
    if notes.columns:
        names = [printable(name, limit=_NAME_LIMIT) for name in notes.columns]
        more = len(names) - _COLUMNS_NAMED
        said.append(
            f"left out are the columns {', '.join(names[:_COLUMNS_NAMED])}"
            + (f" and {more} more" if more > 0 else "")
            + f", which hold texts (to use one: {MAPPING.split()[0]} context=NAME)"
        )
    if said:
        warnings.warn(f"{where}: {'; '.join(said)}", stacklevel=4)
