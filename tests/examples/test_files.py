"""Files of every form: by content, within bounds, and never a traceback."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from mithridate.errors import InputError
from mithridate.examples import Example, files, read_examples

ROWS = [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": "b"}]
WANTED = [Example(prompt="p", answer="a"), Example(prompt="q", answer="b")]
LINES = "\n".join(map(json.dumps, ROWS))


def refusal_to_read(source: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read_examples(source, stream="benign")
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        json.dumps({"prompt": ["p", "q"], "answer": ["a", "b"]}),
        json.dumps({"data": ROWS, "version": "1"}, indent=1),
        json.dumps({"train": ROWS}),
        json.dumps({"prompt": {"0": "p", "1": "q"}, "answer": {"0": "a", "1": "b"}}),
        json.dumps({"0": ROWS[0], "1": ROWS[1]}),
    ],
)
def test_the_content_of_json_decides_not_the_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_examples(tmp_path / name, stream="benign") == WANTED


def test_one_row_alone_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    for row in ({"messages": messages}, {"prompt": messages[:1], "completion": messages[1:]},
                {"prompt": "p", "answer": "a", "tags": ["x", "y"]}):  # fmt: skip
        path.write_text(json.dumps(row))
        assert read_examples(path, stream="benign") == WANTED[:1]


def test_columns_of_conversations_and_of_labels(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": [turns]}))
    assert read_examples(path, stream="benign") == WANTED[:1]
    path.write_text(json.dumps({"prompt": ["p"], "answer": ["a"], "category": [{"x": True}]}))
    assert read_examples(path, stream="benign")[0].category == "x"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_marked_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    text = "prompt,answer\ncafé,ü\n" if name.endswith("csv") else '{"prompt":"café","answer":"ü"}'
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_examples(tmp_path / name, stream="benign") == [Example(prompt="café", answer="ü")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    row = [f"one{delimiter} two", "x" * 200_000]
    for name in ("a.csv", "a.tsv") if delimiter == "\t" else ("a.csv",):
        with (tmp_path / name).open("w", newline="") as handle:
            csv.writer(handle, delimiter=delimiter).writerows([("prompt", "answer"), row])
        (example,) = read_examples(tmp_path / name, stream="benign")
        assert [example.prompt, example.answer] == row
    assert csv.field_size_limit() == 131_072


def test_tables_with_maps_structs_and_turns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "messages": [[{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]],
            "category": pa.array([[("x", True), ("y", False)]], pa.map_(pa.string(), pa.bool_())),
            # Has no value in Python: nanoseconds.
            "when": pa.array([1], pa.timestamp("ns")),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = read_examples(tmp_path / "a.parquet", stream="benign")
    assert (example, example.category) == (Example(prompt="p", answer="a", category="x"), "x")
    assert example.place == f"{tmp_path / 'a.parquet'}, row 1"


def test_arrow_files_of_either_form(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for make in (ipc.new_file, ipc.new_stream):
        with make(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        assert read_examples(tmp_path / "a.arrow", stream="benign") == WANTED


def test_saved_data_sets(tmp_path: Path) -> None:
    one, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[1:])
    one.save_to_disk(tmp_path / "one", num_shards=2)
    assert read_examples(str(tmp_path / "one"), stream="benign") == WANTED
    shard = tmp_path / "one" / "data-00001-of-00002.arrow"
    assert read_examples(shard, stream="benign") == WANTED[1:]
    datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    message = refusal_to_read(tmp_path / "both")
    assert "holds the splits train, test" in message
    assert f"as in {tmp_path / 'both'}@train" in message
    assert read_examples(f"{tmp_path / 'both'}@test", stream="benign") == WANTED[1:]
    assert "none of them 'dev'" in refusal_to_read(f"{tmp_path / 'both'}@dev")
    datasets.DatasetDict(test=other).save_to_disk(tmp_path / "single")
    assert read_examples(tmp_path / "single", stream="benign") == WANTED[1:]


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}',
              '{"_data_files": [{"filename": "../a.arrow"}]}', "[" * 100_000, "\0\xff"],
)  # fmt: skip
def test_saved_data_sets_that_are_none(tmp_path: Path, state: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a.arrow").write_bytes(b"")
    (tmp_path / "d" / "state.json").write_bytes(state.encode("latin-1"))
    assert str(tmp_path / "d") in refusal_to_read(tmp_path / "d")


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"")
    assert "name a file in it: data/train.parquet" in refusal_to_read(tmp_path)


def test_parts_of_a_json_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[1:]}))
    assert f"as in {path}@train" in refusal_to_read(path)
    assert read_examples(f"{path}@test", stream="benign") == WANTED[1:]
    (tmp_path / "b.jsonl").write_text(LINES)
    assert "has no parts" in refusal_to_read(f"{tmp_path / 'b.jsonl'}@test")


def test_configuration_and_split_of_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(*arguments: str, **keywords: Any) -> datasets.Dataset:
        calls.append((arguments, keywords["split"]))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("o/n", "o/n:main", "o/n@test", "o/n:main@train[:10%]"):
        (example,) = read_examples(source, stream="benign")
        assert example.source == "o/n"
    assert calls == [(("o/n",), "train"), (("o/n", "main"), "train"), (("o/n",), "test"),
                     (("o/n", "main"), "train[:10%]")]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"prompt": "p", "prompt": "q", "answer": "a"}', "the key 'prompt' is given twice"),
        ('{"prompt": NaN, "answer": "a"}', "missing field 'prompt'"),
        ('{"prompt": "p", "answer": 1e400}', "is float, not text"),
        ("3", "holds int, not rows"),
        ('"text"', "holds str, not rows"),
        ("null", "holds NoneType, not rows"),
        ("[[[" * 50 + "]]]" * 50, "is list, not an object"),
        ('{"a":' * 50_000, "JSON that cannot be read"),
        ("\0\0\0", "invalid JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "JSON that cannot be read"),
    ],
)
def test_odd_json(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "a.json").write_text(text)
    message = refusal_to_read(tmp_path / "a.json")
    assert cause in message
    assert len(message) < 1000


def test_more_than_the_bound_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    bomb = b" " * (4 << 20) + LINES.encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bomb))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(bomb))
    (tmp_path / "a.jsonl").write_bytes(bomb)
    table = pa.table({"prompt": ["p" * 1000] * 5000, "answer": ["a"] * 5000})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl", "a.parquet"):
        assert "holds more than 1 MiB" in refusal_to_read(tmp_path / name)


def test_damaged_packing(tmp_path: Path) -> None:
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)):
        whole = pack(LINES.encode())
        for data in (whole[:-9], b"no " + whole, whole[:20] + b"\0\0\0" + whole[23:]):
            (tmp_path / name).write_bytes(data)
            assert str(tmp_path / name) in refusal_to_read(tmp_path / name)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is no regular file" in refusal_to_read(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "no such file" in refusal_to_read(tmp_path / "loop.jsonl")
    assert "no such file" in refusal_to_read(f"{tmp_path}/{'x' * 5000}.jsonl")
    assert "no such file" in refusal_to_read("a\0b.jsonl")


def test_columns_of_one_name_in_a_table(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["p"]), pa.array(["q"])], ["prompt", "prompt"])
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert "two columns have the same name" in refusal_to_read(tmp_path / "a.arrow")
