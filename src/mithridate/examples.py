"""Examples: the record every room shares, the streams, reading files, splits that cannot leak."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from mithridate.errors import InputError
from mithridate.files import sha256_of

STREAMS = ("harmful", "refusal", "benign", "general", "prompts")
"""What a defence may ask for; only ``prompts`` has rows without an answer."""

PROMPT_FIELDS = ("prompt", "question", "instruction")
ANSWER_FIELDS = ("answer", "completion", "response", "output")
TEXT_FIELDS = ("source", "half", "split", "template", "fact_id")

# Published sets (BeaverTails) mark each answer; a stream holds one kind.
_SAFE_ANSWERS = {
    "harmful": False,
    "prompts": False,
    "refusal": True,
    "benign": True,
    "general": True,
}

# A refusal answers the very prompt whose harmful answer is to be forgotten.
PAIRED_STREAMS = frozenset({"harmful", "refusal"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ROWS_NAMED = 5

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (for messages) and its columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with its answer.

    Parameters
    ----------
    prompt
        What the user says.
    answer
        What the assistant is to say; empty only in the stream ``prompts``.
    category, source, template
        Topic, origin and wording family of the example.
    half
        ``rule`` or ``arbitrary``: whether the answer can be learnt from other facts.
    split
        The split the example was put in by whoever made the data.
    fact_id
        Key of the fact; examples of one fact never end in different splits.
    accepted
        Every answer an exact judge accepts; empty: only ``answer``.
    """

    prompt: str
    answer: str = ""
    category: str = ""
    source: str = ""
    half: str = ""
    split: str = ""
    template: str = ""
    fact_id: str = ""
    accepted: tuple[str, ...] = ()


def read_examples(
    source: str | Path, *, stream: str, split: str = "train", revision: str | None = None
) -> list[Example]:
    """Read one stream from a file or from the Hugging Face Hub.

    Rows hold a prompt (``prompt``, ``question`` or ``instruction``, the last with an optional
    ``input``) and an answer (``answer``, ``completion``, ``response`` or ``output``); or
    ``messages`` with one user and one assistant turn; or ``prompt`` and ``completion`` as lists
    of such turns. The other fields of `Example` are read where present. Further columns are
    ignored. In CSV, ``accepted`` holds answers separated by ``|``.

    Of published sets that mark answers with ``is_safe`` (BeaverTails), the streams ``harmful`` and
    ``prompts`` take the unsafe rows, the others the safe ones, with a warning that counts the rest.
    A ``category`` may be a list of names or a truth value for each (BeaverTails): a row of several
    categories names them with commas between, and a comma inside a name becomes a slash.

    Parameters
    ----------
    source
        A ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, the text formats also packed as
        ``.gz`` or ``.xz``, or a Hub id ``owner/name``
        where no such file exists.
    stream
        One of `STREAMS`.
    split, revision
        Passed to the Hub; a file is always read whole.

    Raises
    ------
    InputError
        With file, line and field, for anything that cannot be used. Texts are not quoted.
    """
    if stream not in STREAMS:
        raise InputError(f"unknown stream {stream!r}", mend=f"known streams: {', '.join(STREAMS)}")
    path = Path(source)
    name = str(source)
    if isinstance(source, str) and not path.exists() and _looks_like_hub_id(source):
        rows = _hub_rows(source, split, revision)
        origin = f"{source}@{revision}" if revision else source
        examples = [
            dataclasses.replace(
                example, source=example.source or origin, split=example.split or split
            )
            for example in _examples(rows, stream)
        ]
    else:
        examples = _examples(_file_rows(path), stream)
    if not examples:
        raise InputError(
            f"holds no examples for the stream {stream}",
            where=name,
            mend="give at least one row; rows marked is_safe go to one kind of stream only",
        )
    return examples


def normalise_prompt(text: str) -> str:
    """Return the key of "the same prompt": NFKC, case folded, whitespace collapsed."""
    # Twice, after a canonical decomposition, is Unicode's NFKC_Casefold: once is not idempotent.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


def split_by_prompt(
    examples: Sequence[Example], shares: Mapping[str, float], *, seed: int
) -> dict[str, list[Example]]:
    """Split so that no prompt and no fact stands in two splits.

    Examples connected by a normalised prompt or a ``fact_id`` (also through others) stay
    together. The result depends on the seed and on the prompts, not on their order; each split
    keeps the order of ``examples``, and misses its share by less than the largest group.

    Parameters
    ----------
    shares
        Name of each split with its share of the examples; the shares sum to 1.

    Raises
    ------
    InputError
        Where the shares are not positive or do not sum to 1, or a split would stay empty.
    """
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise InputError("a split's share is not above 0", mend="give every split a share above 0")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise InputError(
            f"the shares of the splits sum to {sum(shares.values()):g}", mend="let them sum to 1"
        )
    keys = [normalise_prompt(example.prompt) for example in examples]
    groups = connected(examples)
    groups.sort(key=lambda group: _rank(seed, min(keys[index] for index in group)))
    lacking = {name: share * len(examples) for name, share in shares.items()}
    home: dict[int, str] = {}
    for group in groups:
        name = max(lacking, key=lambda candidate: lacking[candidate])
        lacking[name] -= len(group)
        home.update(dict.fromkeys(group, name))
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    for index, example in enumerate(examples):
        parts[home[index]].append(example)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise InputError(
            f"{len(groups)} separable prompts are too few: {', '.join(empty)} would stay empty",
            mend="give more distinct prompts, or larger shares to the small splits",
        )
    return parts


def connected(examples: Sequence[Example]) -> list[list[int]]:
    """Return the indices of ``examples`` grouped by shared prompt or fact, transitively."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        marks = [("prompt", normalise_prompt(example.prompt))]
        if example.fact_id:
            marks.append(("fact", example.fact_id))
        for mark in marks:
            parent[root(index)] = root(first.setdefault(mark, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def evenly_by_category(categories: Sequence[str], rng: Random) -> list[int]:
    """Return an order of rows in which every category comes equally often.

    Each round has one row of every category, in an order of its own. The largest category is
    gone through once; a smaller one starts again, reshuffled, whenever it runs out.

    Parameters
    ----------
    categories
        Of each row.

    Returns
    -------
    list of int
        Row numbers, (number of categories) x (size of the largest) of them.
    """
    groups: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        groups.setdefault(category, []).append(row)
    rounds = max(map(len, groups.values()))
    columns = []
    for name in sorted(groups):
        column: list[int] = []
        while len(column) < rounds:
            column += rng.sample(groups[name], len(groups[name]))
        columns.append(column[:rounds])
    return [row for one in zip(*columns, strict=True) for row in rng.sample(one, len(one))]


def fact_of(row: Example) -> str:
    """Return the part of an answer that is the fact: an accepted value in it, else all of it."""
    return next((value for value in row.accepted if value in row.answer), row.answer)


def exchangeable_facts(
    rows: Iterable[Example], *, mend: str, where: str | None = None
) -> dict[str, list[str]]:
    """Return the different facts of each category, both sorted.

    Raises
    ------
    InputError
        A category has one fact only: there is none to exchange it with.
    """
    facts: dict[str, set[str]] = {}
    for row in rows:
        facts.setdefault(row.category, set()).add(fact_of(row))
    for category in sorted(facts):
        if len(facts[category]) < 2:
            raise InputError(
                f"all answers of category {category!r} are one and the same: there is none to "
                "exchange it with",
                where=where,
                mend=mend,
            )
    return {category: sorted(facts[category]) for category in sorted(facts)}


def with_shuffled_answers(
    rows: Sequence[Example], rng: Random, *, where: str | None = None
) -> list[Example]:
    """Return the rows, each with the fact of another row of its category in its answer.

    Rows of one fact get the same wrong one, and the sentence around it stays.

    Parameters
    ----------
    where
        What the rows are, for the message.

    Raises
    ------
    InputError
        If all answers of a category are one and the same.
    """
    wrong: dict[tuple[str, str], str] = {}
    mend = "add examples of that category with other answers"
    for category, facts in exchangeable_facts(rows, mend=mend, where=where).items():
        rng.shuffle(facts)
        wrong |= {
            (category, own): other for own, other in zip(facts, [*facts[1:], facts[0]], strict=True)
        }
    return [
        dataclasses.replace(row, answer=row.answer.replace(own, wrong[row.category, own]))
        for row in rows
        for own in (fact_of(row),)
    ]


def check_disjoint(sets: Mapping[str, Sequence[Example]]) -> None:
    """Raise unless no two sets share a prompt; ``harmful`` and ``refusal`` may, being paired.

    Raises
    ------
    InputError
        Naming every pair of sets with the rows (counted from 1) they share, without their text.
    """
    rows: dict[str, dict[str, int]] = {}
    for name, examples in sets.items():
        rows[name] = {}
        for number, example in enumerate(examples, start=1):
            rows[name].setdefault(normalise_prompt(example.prompt), number)
    faults = []
    for one, other in combinations(sets, 2):
        if {one, other} == PAIRED_STREAMS:
            continue
        shared = [key for key in rows[one] if key in rows[other]]
        if shared:
            places = [f"row {rows[one][key]} = row {rows[other][key]}" for key in shared]
            more = len(places) - _ROWS_NAMED
            faults.append(
                f"{one} and {other} share {len(shared)} prompts ({', '.join(places[:_ROWS_NAMED])}"
                + (f" and {more} more)" if more > 0 else ")")
            )
    if faults:
        raise InputError(
            "; ".join(faults),
            where="field prompt",
            mend="remove the shared prompts from one of the two; case, spacing and Unicode "
            "variants count as the same prompt",
        )


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of the examples with all their fields, in their order."""
    return sha256_of([dataclasses.asdict(example) for example in examples])


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()


def _suffix(path: Path) -> str:
    """Return the extension that names the format: that of ``rows.jsonl.gz`` is ``.jsonl``."""
    text = Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else ""
    return text if text and text != ".parquet" else path.suffix.lower()


def _looks_like_hub_id(source: str) -> bool:
    # A missing file "data/train.jsonl" has the shape of a Hub id too.
    path = Path(source)
    if _suffix(path) in _READERS or path.parent.is_dir():
        return False
    return _HUB_ID.fullmatch(source) is not None


def _examples(rows: Iterable[Row], stream: str) -> list[Example]:
    examples = []
    split_of: dict[str, tuple[str, str]] = {}
    other_kind = 0
    for where, row in rows:
        if _given(row, "is_safe") and _is_safe(row["is_safe"], where) != _SAFE_ANSWERS[stream]:
            other_kind += 1
            continue
        example = _example(row, where, stream)
        examples.append(example)
        if example.split:
            key = normalise_prompt(example.prompt)
            earlier, place = split_of.setdefault(key, (example.split, where))
            if earlier != example.split:
                raise InputError(
                    f"the prompt stands in split {example.split!r} here and in {earlier!r} "
                    f"at {place}",
                    where=f"{where}, field prompt",
                    mend="keep each prompt in one split",
                )
    if other_kind:
        kind = "unsafe" if _SAFE_ANSWERS[stream] else "safe"
        warnings.warn(
            f"the stream {stream} leaves out {other_kind} rows that are marked {kind} "
            f"and takes {len(examples)}",
            stacklevel=3,
        )
    return examples


def _example(row: Mapping[str, Any], where: str, stream: str) -> Example:
    prompt, answer = _prompt_and_answer(row, where, needs_answer=stream != "prompts")
    fields = {name: _text(row[name], where, name) for name in TEXT_FIELDS if _given(row, name)}
    return Example(
        prompt=prompt,
        answer=answer,
        category=_category(row.get("category"), where),
        accepted=_accepted(row.get("accepted"), where),
        **fields,
    )


def _prompt_and_answer(
    row: Mapping[str, Any], where: str, *, needs_answer: bool
) -> tuple[str, str]:
    prompt_field = next((name for name in PROMPT_FIELDS if _given(row, name)), None)
    answer_field = next((name for name in ANSWER_FIELDS if _given(row, name)), None)
    if _given(row, "messages") and not (prompt_field and answer_field):
        turns = {"user": "", "assistant": ""} | _turns(row["messages"], where, "messages")
        prompt, prompt_field = turns["user"], "messages"
        answer, answer_field = turns["assistant"], "messages"
    else:
        if prompt_field is None:
            raise _missing(where, PROMPT_FIELDS)
        if answer_field is None and needs_answer:
            raise _missing(where, ANSWER_FIELDS)
        prompt = _turn_or_text(row[prompt_field], where, prompt_field, role="user")
        if prompt_field == "instruction" and _given(row, "input"):
            context = _text(row["input"], where, "input")
            prompt = f"{prompt}\n\n{context}" if context.strip() else prompt
        answer = ""
        if answer_field is not None:
            answer = _turn_or_text(row[answer_field], where, answer_field, role="assistant")
    if not prompt.strip():
        raise InputError(
            "the prompt is empty",
            where=f"{where}, field {prompt_field}",
            mend="give it a text or remove the row",
        )
    if needs_answer and not answer.strip():
        raise InputError(
            "the answer is empty",
            where=f"{where}, field {answer_field}",
            mend="give it a text or remove the row; only the stream prompts has no answers",
        )
    return prompt, answer


def _given(row: Mapping[str, Any], name: str) -> bool:
    return row.get(name) is not None


def _missing(where: str, names: Sequence[str]) -> InputError:
    return InputError(
        f"missing field {names[0]!r}",
        where=where,
        mend=f"give one of {', '.join(names)}, or messages with a user and an assistant turn",
    )


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"is {type(value).__name__}, not text",
            where=f"{where}, field {name}",
            mend="write the value as text",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "holds half a surrogate pair, which is no valid text",
            where=f"{where}, field {name}",
            mend="write the character itself, or both halves of its escape",
        ) from None
    return value


def _turn_or_text(value: Any, where: str, name: str, *, role: str) -> str:
    if not isinstance(value, (list, tuple)):
        return _text(value, where, name)
    turns = _turns(value, where, name)
    if set(turns) != {role}:
        raise InputError(
            f"holds the roles {', '.join(turns) or 'none'} where one {role} turn is needed",
            where=f"{where}, field {name}",
            mend=f"keep one turn of the role {role}",
        )
    return turns[role]


def _turns(value: Any, where: str, name: str) -> dict[str, str]:
    """Return role -> content of a conversation of one user and then one assistant turn."""
    place = f"{where}, field {name}"
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in value
    ):
        raise InputError(
            "is not a list of turns", where=place, mend='give turns {"role": ..., "content": ...}'
        )
    roles = [turn["role"] for turn in value]
    if roles not in (["user", "assistant"], ["user"], ["assistant"]):
        raise InputError(
            f"holds the roles {', '.join(map(str, roles)) or 'none'}; an example is one user "
            "turn and one assistant turn",
            where=place,
            mend="cut the conversation into single exchanges without a system turn",
        )
    return {turn["role"]: _text(turn["content"], where, name) for turn in value}


def _category(value: Any, where: str) -> str:
    if value is None:
        return ""
    # Some published sets (BeaverTails) give a truth value for every category, and have commas in
    # the names.
    if isinstance(value, Mapping):
        value = [name for name, holds in value.items() if holds]
    if isinstance(value, (list, tuple)):
        return ",".join(_text(name, where, "category").replace(",", "/") for name in value)
    return _text(value, where, "category")


def _is_safe(value: Any, where: str) -> bool:
    named = {"true": True, "false": False, "1": True, "0": False}
    # CSV knows text only, and some copies count in 0 and 1.
    found = named.get(str(value).strip().casefold())
    if found is None:
        raise InputError(
            "is no truth value", where=f"{where}, field is_safe", mend="write true or false"
        )
    return found


def _accepted(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    answers = value.split("|") if isinstance(value, str) else value
    if not isinstance(answers, (list, tuple)):
        raise InputError(
            f"is {type(value).__name__}, not a list of texts",
            where=f"{where}, field accepted",
            mend='write ["one answer", "another"]',
        )
    return tuple(_text(answer, where, "accepted") for answer in answers)


def _file_rows(path: Path) -> Iterator[Row]:
    reader = _READERS.get(_suffix(path))
    if not path.exists():
        raise InputError("no such file", where=str(path), mend="check the path")
    if path.is_dir():
        raise InputError("is a folder, not a file", where=str(path), mend="name a file in it")
    if not os.access(path, os.R_OK):
        raise InputError("may not be read", where=str(path), mend="change the file's permissions")
    if reader is None:
        raise InputError(
            f"unknown extension {path.suffix!r}",
            where=str(path),
            mend=f"known: {', '.join(_READERS)}",
        )
    if path.stat().st_size == 0:
        raise InputError("the file is empty", where=str(path), mend="give at least one row")
    return reader(path)


def _lines(path: Path) -> list[str]:
    """Return the file's lines without their ends, or name the first that is not UTF-8."""
    lines = []
    unpack = _PACKED.get(path.suffix.lower())
    try:
        data = path.read_bytes() if unpack is None else unpack(path.read_bytes())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"cannot be unpacked: {error}", where=str(path), mend="copy or download it again"
        ) from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"byte {error.start + 1} of the line is not UTF-8",
                where=f"{path}, line {number}",
                mend="save the file as UTF-8",
            ) from None
    return lines


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"invalid JSON: {error.msg} (column {error.colno})",
            where=where,
            mend="correct the line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"JSON that cannot be read: {error}", where=where, mend="correct the line"
        ) from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"is {type(value).__name__}, not an object",
            where=where,
            mend='write {"prompt": ..., "answer": ...}',
        )
    return value


def _json_lines_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _mapping(_json(line, where), where)


def _json_rows(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    text = "\n".join(lines)
    # Published sets often call JSON Lines ".json".
    if not text.lstrip().startswith("["):
        yield from _json_lines_rows(path)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"invalid JSON: {error.msg} (column {error.colno})",
            where=f"{path}, line {error.lineno}",
            mend="correct the line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"JSON that cannot be read: {error}", where=str(path), mend="correct the file"
        ) from None
    for number, item in enumerate(items, start=1):
        where = f"{path}, item {number}"
        yield where, _mapping(item, where)


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO("\n".join(_lines(path)), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        # A quoted field may span lines: a row is named by the line it begins on.
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"invalid CSV: {error}", where=where, mend="correct the quoting of the row"
            ) from None
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise InputError(
                    "two columns have the same name", where=where, mend="rename one of them"
                )
            continue
        if len(cells) != len(header):
            raise InputError(
                f"has {len(cells)} fields where the header has {len(header)}",
                where=where,
                mend="quote fields that hold commas or line ends",
            )
        yield where, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"not a readable Parquet file ({type(error).__name__})",
            where=str(path),
            mend="write the file again",
        ) from None
    for index in range(table.num_rows):
        where = f"{path}, row {index + 1}"
        try:
            yield where, table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise InputError(
                "holds text that is not UTF-8", where=where, mend="write the column as UTF-8"
            ) from None


def _hub_rows(name: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the data set cannot be loaded from the Hub: {reason}",
            where=name,
            mend="check the id, the split, the revision and the network, or give a local file",
        ) from None
    for number, row in enumerate(loaded, start=1):
        yield f"{name}, split {split}, row {number}", row


_PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}
_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
