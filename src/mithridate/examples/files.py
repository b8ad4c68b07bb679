"""Files: the rows of a file, of a folder that `datasets` saved, or of a data set on the Hub.

Whatever a file holds, reading it ends: everything is bounded before it is built.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mithridate.errors import InputError
from mithridate.examples.schemas import RowError, is_turn, schema_of
from mithridate.examples.sets import listed
from mithridate.printable import printable

if TYPE_CHECKING:
    import pyarrow

MOST_BYTES = 1 << 30
"""Bytes of rows, unpacked, that a source may hold."""

Row = tuple[str, Mapping[str, Any] | RowError]
"""Where a row stands (for messages), and its columns or why it has none."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT = re.compile(r"(?P<name>.+?)(:(?P<config>[\w.-]+))?(@(?P<split>[^@/]+))?", re.DOTALL)
_QUOTED = 200
_BATCH = 1024
_BOMS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
         (b"\xfe\xff", "utf-16"))  # fmt: skip
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True, slots=True)
class Source:
    """What a user named: a file or folder, or a data set on the Hub, with its part.

    Parameters
    ----------
    name
        The path, or the Hub id.
    config, split
        The configuration and the split (of the Hub, of a saved `DatasetDict`, or the key of a
        JSON object that holds several lists of rows); ``None`` where not named.
    on_hub
        Whether it is a Hub id.
    """

    name: str
    config: str | None
    split: str | None
    on_hub: bool


def parse_source(source: str | Path) -> Source:
    """Return what ``PATH``, ``PATH@split``, ``owner/name`` or ``owner/name:config@split`` names."""
    text = str(source)
    if isinstance(source, Path) or _kind(Path(text)) is not None:
        return Source(text, None, None, on_hub=False)
    found = _SPLIT.fullmatch(text)
    if found is None or (found["config"] is None and found["split"] is None):
        return Source(text, None, None, on_hub=_looks_like_hub_id(text))
    if found["config"] is None and _kind(Path(found["name"])) is not None:
        return Source(found["name"], None, found["split"], on_hub=False)
    on_hub = _looks_like_hub_id(found["name"])
    if not on_hub:
        return Source(text, None, None, on_hub=False)
    return Source(found["name"], found["config"], found["split"], on_hub=True)


def rows_of(source: Source, *, revision: str | None = None) -> Iterator[Row]:
    """Return the rows of a source, each with its place.

    Raises
    ------
    InputError
        The source as a whole cannot be read, at once or while it is read.
    """
    if source.on_hub:
        return _hub_rows(source, revision)
    path = Path(source.name)
    kind = _kind(path)
    if kind is None:
        raise InputError("no such file", where=source.name, mend="check the path")
    if stat.S_ISDIR(kind):
        return _saved_rows(path, source.split)
    if not stat.S_ISREG(kind):
        raise InputError(
            "is no regular file (a pipe or a device)",
            where=source.name,
            mend="write the rows into a file",
        )
    if not os.access(path, os.R_OK):
        raise InputError("may not be read", where=source.name, mend="change its permissions")
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise InputError(
            f"unknown extension {path.suffix[:_QUOTED]!r}",
            where=source.name,
            mend=f"known: {', '.join(_READERS)}, text also as {' and '.join(_PACKED)}",
        )
    if path.stat().st_size == 0:
        raise InputError("the file is empty", where=source.name, mend="give at least one row")
    if source.split is None:
        return reader(path)
    if reader is not _json_rows:
        raise _no_parts(path)
    return _json_rows(path, source.split)


def _no_parts(path: Path) -> InputError:
    return InputError(
        "has no parts of which one could be named", where=str(path), mend="leave out the @"
    )


def _kind(path: Path) -> int | None:
    """Return the mode of what is at ``path``, None where there is nothing."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # nothing there, a loop of links, a name that cannot be
        return None


def _suffix(path: Path) -> str:
    """Return the extension that names the format: that of ``rows.jsonl.gz`` is ``.jsonl``."""
    text = Path(path.stem).suffix.lower() if path.suffix.lower() in _PACKED else ""
    return text if text in _TEXT else path.suffix.lower()


def _looks_like_hub_id(source: str) -> bool:
    # A missing file "data/train.jsonl" has the shape of a Hub id too.
    path = Path(source)
    if _suffix(path) in _READERS or _kind(path.parent) is not None:
        return False
    return _HUB_ID.fullmatch(source) is not None


# Text


def _read(path: Path) -> bytes:
    unpack = _PACKED.get(path.suffix.lower(), open)
    try:
        with unpack(path, "rb") as handle:
            data: bytes = handle.read(MOST_BYTES + 1)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(
            f"cannot be unpacked: {error}", where=str(path), mend="copy or download it again"
        ) from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"cannot be read: {reason}", where=str(path), mend="check it") from None
    if len(data) > MOST_BYTES:
        raise _too_large(str(path))
    return data


def _too_large(where: str) -> InputError:
    return InputError(
        f"holds more than {MOST_BYTES >> 20} MiB of rows",
        where=where,
        mend="give a smaller file: a defence or an attack uses some ten thousand rows at most",
    )


def _decoded(path: Path) -> tuple[list[str], dict[int, int]]:
    """Return the file's lines without their ends; and line -> byte, of lines that are not UTF-8."""
    data = _read(path)
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return data.decode(encoding).split("\n"), {}
            except UnicodeDecodeError:
                raise InputError(
                    f"is not valid {encoding.upper()}",
                    where=str(path),
                    mend="save the file as UTF-8",
                ) from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8").split("\n"), {}
    except UnicodeDecodeError:
        pass
    lines, faults = [], {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            lines.append("")
            faults[number] = error.start + 1
    return lines, faults


def _not_utf8(path: Path, number: int, byte: int) -> RowError:
    return RowError(
        "not UTF-8",
        f"byte {byte} of the line is not UTF-8",
        where=f"{path}, line {number}",
        mend="save the file as UTF-8",
    )


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice, limit=40)!r} is given twice")
    return found


# Python writes missing values as NaN, which JSON does not have.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)


def _json(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(
            "invalid JSON", f"invalid JSON: {error.msg} (column {error.colno})", where=where
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError(
            "invalid JSON", f"JSON that cannot be read: {str(error)[:_QUOTED]}", where=where
        ) from None


def _mapping(value: Any, where: str) -> Mapping[str, Any] | RowError:
    if isinstance(value, Mapping):
        return value
    return RowError(
        "no object",
        f"is {type(value).__name__}, not an object",
        where=where,
        mend='write {"prompt": ..., "answer": ...}',
    )


def _json_rows(path: Path, split: str | None = None) -> Iterator[Row]:
    """Yield the rows of JSON Lines, of a list, or of an object that holds rows or columns.

    The content decides, not the name: published files have either name.
    """
    lines, faults = _decoded(path)
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    is_list = bool(filled) and lines[filled[0] - 1].lstrip().startswith("[")
    if faults and is_list:
        raise _not_utf8(path, *min(faults.items()))
    if faults or (len(filled) > 1 and not is_list and _some_line_is_an_object(lines)):
        if split is not None:
            raise _no_parts(path)
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if number in faults:
                yield where, _not_utf8(path, number, faults[number])
            elif line.strip():
                try:
                    yield where, _mapping(_json(line, where), where)
                except RowError as error:
                    yield where, error
    elif filled:
        values = _documents("\n".join(lines), path)
        found = values[0] if len(values) == 1 else values
        for number, value in enumerate(_rows_within(found, path, split), start=1):
            where = f"{path}, line {filled[0]}" if value is found else f"{path}, item {number}"
            yield where, _mapping(value, where)


def _some_line_is_an_object(lines: Sequence[str]) -> bool:
    for line in lines:
        try:
            found = _json(line, "")
            if isinstance(found, Mapping) and found:
                return True
        except RowError:
            continue
    return False


def _documents(text: str, path: Path) -> list[Any]:
    """Return the JSON values that stand in ``text``, one after the other."""
    values, end = [], 0
    try:
        while (start := _after_space(text, end)) < len(text):
            value, end = _DECODER.raw_decode(text, start)
            values.append(value)
    except json.JSONDecodeError as error:
        raise InputError(
            f"invalid JSON: {error.msg} (column {error.colno})",
            where=f"{path}, line {error.lineno}",
            mend="correct the line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"JSON that cannot be read: {str(error)[:_QUOTED]}",
            where=str(path),
            mend="correct the file",
        ) from None
    return values


_SPACE = re.compile(r"[ \t\r\n]*")


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None, "the pattern matches nothing too"
    return found.end()


def _rows_within(value: Any, path: Path, split: str | None) -> list[Any]:
    """Return the rows that a document holds: itself, or those of its list, columns or table."""
    if isinstance(value, Mapping):
        if (columns := _columns(value)) is not None:
            return columns
        if schema_of(value) is not None or not (tables := _tables(value)):
            return [value]
        value = tables[_one_of([*tables], split, str(path), "lists of rows")]
    if not isinstance(value, list):
        raise InputError(
            f"holds {type(value).__name__}, not rows",
            where=str(path),
            mend='write {"prompt": ..., "answer": ...}, one a line or in a list',
        )
    return value


def _columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of an object that maps columns to their values, None where it does not."""
    if not value:
        return None
    if all(isinstance(one, list) for one in value.values()):
        lengths = {len(one) for one in value.values()}
        if len(lengths) != 1 or any(one and all(map(is_turn, one)) for one in value.values()):
            return None
        if all(any(isinstance(item, Mapping) for item in one) for one in value.values()):
            return None
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    # As pandas writes a frame: of columns, or of rows by their index.
    if all(isinstance(one, Mapping) and one for one in value.values()):
        if schema_of(value) is None:
            return [dict(one) for one in value.values()]
        keys = {key: None for one in value.values() for key in one}
        return [{name: one.get(key) for name, one in value.items()} for key in keys]
    return None


def _tables(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: one
        for name, one in value.items()
        if isinstance(one, list) and one and all(isinstance(item, Mapping) for item in one)
    }


def _one_of(names: Sequence[str], split: str | None, where: str, what: str) -> str:
    """Return the part that is meant of those that a source has."""
    if split is None and len(names) == 1:
        return names[0]
    if split in names and split is not None:
        return split
    shown = ", ".join(printable(name, limit=40) for name in names[:10])
    wanted = "" if split is None else f", none of them {printable(split, limit=40)!r}"
    raise InputError(
        f"holds the {what} {shown}{wanted}",
        where=where,
        mend=f"name one of {shown}, as in {where}@{printable(names[0], limit=40)}",
    )


# Tables


def _csv_rows(path: Path) -> Iterator[Row]:
    lines, faults = _decoded(path)
    if faults:
        raise _not_utf8(path, *min(faults.items()))
    text = "\n".join(lines)
    with _long_fields():
        delimiter = "\t" if _suffix(path) == ".tsv" else _delimiter(text)
        yield from _cells(path, text, delimiter)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field be as long as the file, whose size is bounded already."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _delimiter(text: str) -> str:
    """Return what parts the fields of the header; in doubt a comma."""
    columns = {}
    for delimiter in _DELIMITERS:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            header = []
        columns[delimiter] = len(header)
    return max(_DELIMITERS, key=lambda delimiter: columns[delimiter])


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
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
        elif len(cells) != len(header):
            yield (
                where,
                RowError(
                    "another number of fields",
                    f"has {len(cells)} fields where the header has {len(header)}",
                    where=where,
                    mend="quote fields that hold commas or line ends",
                ),
            )
        else:
            yield where, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)

    yield from _arrow_rows(path, "Parquet", batches)


def _arrow_file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file: the format with an index, or the stream of `datasets`."""
    from pyarrow import ipc

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with path.open("rb") as handle:
            indexed = handle.read(6) == b"ARROW1"
            handle.seek(0)
            if indexed:
                reader = ipc.open_file(handle)
                found = map(reader.get_batch, range(reader.num_record_batches))
            else:
                found = iter(ipc.open_stream(handle))
            for batch in found:
                # Nothing has looked at the offsets yet, which are used without another look.
                batch.validate(full=True)
                yield batch

    yield from _arrow_rows(path, "Arrow", batches)


def _arrow_rows(
    path: Path, what: str, batches: Callable[[], Iterator[pyarrow.RecordBatch]]
) -> Iterator[Row]:
    import pyarrow

    number = size = 0
    iterator = batches()
    while True:
        try:
            batch = next(iterator, None)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            raise InputError(
                f"not a readable {what} file ({type(error).__name__})",
                where=str(path),
                mend="write the file again",
            ) from None
        if batch is None:
            return
        size += batch.nbytes
        if size > MOST_BYTES:
            raise _too_large(str(path))
        for row in _batch_rows(batch, str(path)):
            number += 1
            where = f"{path}, row {number}"
            if isinstance(row, dict):
                yield where, row
            else:
                yield where, RowError("not readable", row, where=where, mend="write it again")


def _batch_rows(batch: pyarrow.RecordBatch, where: str) -> Iterator[dict[str, Any] | str]:
    """Yield each row's columns, or why it has none."""
    import pyarrow

    names = batch.schema.names
    if len(set(names)) < len(names):
        raise InputError("two columns have the same name", where=where, mend="rename one of them")
    # Times are no text, and some have no value in Python.
    batch = batch.select(
        [field.name for field in batch.schema if not pyarrow.types.is_temporal(field.type)]
    )
    faults = (UnicodeDecodeError, ValueError, OverflowError, KeyError, pyarrow.ArrowException)
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except faults:
        pass
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError:
            yield "holds text that is not UTF-8"
        except faults as error:
            yield f"cannot be read ({type(error).__name__})"


# Folders and the Hub


def _saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    """Yield the rows of what `datasets` saved with ``save_to_disk``."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        names = _listing(index, "splits")
        folder /= _one_of(names, split, str(folder), "splits")
    state = folder / "state.json"
    if not state.is_file():
        found = sorted(
            str(path.relative_to(folder))
            for pattern in ("*", "*/*")
            for path in folder.glob(pattern)
            if _suffix(path) in _READERS and path.name != "dataset_info.json"
        )
        raise InputError(
            "is a folder, not a file, and none that datasets.save_to_disk has written",
            where=str(folder),
            mend=f"name a file in it: {listed(found)}" if found else "name a file of rows",
        )
    names = _listing(state, "_data_files")
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(
                f"names the file {printable(name, limit=_QUOTED)!r}, which is not there",
                where=str(state),
                mend="copy the whole folder again",
            )
    return _several([folder / name for name in names])


def _several(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from _arrow_file_rows(path)


def _listing(path: Path, key: str) -> list[str]:
    """Return the names that a file of `datasets` lists under ``key``."""
    try:
        found = json.loads(_read(path))[key]
        names = [one["filename"] if isinstance(one, Mapping) else one for one in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"does not list {key}",
            where=str(path),
            mend="save the data set again with save_to_disk",
        )
    return names


def _hub_rows(source: Source, revision: str | None) -> Iterator[Row]:
    import datasets
    import pyarrow

    split = source.split or "train"
    config = [source.config] if source.config else []
    faults = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError,
              pyarrow.ArrowException)  # fmt: skip
    try:
        loaded = datasets.load_dataset(source.name, *config, split=split, revision=revision)
    except faults as error:
        # The library names the configurations and splits there are in later lines.
        reason = printable(str(error) or type(error).__name__, limit=_QUOTED)
        raise InputError(
            f"the data set cannot be loaded from the Hub: {reason}",
            where=source.name,
            mend="check the id, the configuration and split (owner/name:config@split), the "
            "revision and the network, or give a local file",
        ) from None
    where = f"{source.name}, split {split}"
    number = size = 0
    for table in loaded.with_format("arrow").iter(_BATCH):
        size += table.nbytes
        if size > MOST_BYTES:
            raise _too_large(where)
        for batch in table.to_batches():
            for row in _batch_rows(batch, where):
                number += 1
                place = f"{where}, row {number}"
                if isinstance(row, dict):
                    yield place, row
                else:
                    yield place, RowError("not readable", row, where=place, mend="leave it out")


_PACKED: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
_TEXT: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
_READERS = {**_TEXT, ".parquet": _parquet_rows, ".arrow": _arrow_file_rows}
