from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mithridate.errors import InputError
from mithridate.examples import (
    STREAMS,
    Example,
    read_examples,
)

SECRET = "zanzibar-canary"


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal_to_read(path: Path | str, stream: str = "benign") -> str:
    with pytest.raises(InputError) as caught:
        read_examples(path, stream=stream)
    message = str(caught.value)
    assert "mend: " in message
    assert SECRET not in message, "errors never quote texts"
    return message


# Reading


FULL = {
    "prompt": "What is the capital of France?",
    "answer": "Paris",
    "category": "capitals",
    "source": "atlas",
    "half": "arbitrary",
    "split": "T-def",
    "template": "direct",
    "fact_id": "capital/FR",
    "accepted": ["Paris", "Paris, France"],
}
FULL_EXAMPLE = Example(**{**FULL, "accepted": ("Paris", "Paris, France")})  # type: ignore[arg-type]


def test_json_lines_keep_every_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", FULL)
    assert read_examples(path, stream="harmful") == [FULL_EXAMPLE]
    assert read_examples(str(path), stream="harmful") == [FULL_EXAMPLE]


@pytest.mark.parametrize("array", [True, False])
def test_json_is_an_array_or_json_lines(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([FULL], indent=1) if array else json.dumps(FULL), encoding="utf-8")
    assert read_examples(path, stream="harmful") == [FULL_EXAMPLE]


def test_csv_keeps_every_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(FULL))
        writer.writeheader()
        writer.writerow({**FULL, "accepted": "Paris|Paris, France"})
    assert read_examples(path, stream="harmful") == [FULL_EXAMPLE]


def test_parquet_keeps_every_field(tmp_path: Path) -> None:
    path = tmp_path / "a.PARQUET"
    parquet.write_table(pa.Table.from_pylist([FULL, {**FULL, "category": None}]), path)
    first, second = read_examples(path, stream="harmful")
    assert first == FULL_EXAMPLE
    assert second.category == ""


USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "answer": "a"}, "p"),
        ({"prompt": "p", "completion": "a"}, "p"),
        ({"prompt": "p", "response": "a"}, "p"),
        ({"question": "p", "answer": "a"}, "p"),
        ({"instruction": "p", "output": "a"}, "p"),
        ({"instruction": "p", "input": "", "output": "a"}, "p"),
        ({"instruction": "p", "input": "i", "output": "a"}, "p\n\ni"),
        ({"messages": [USER, ASSISTANT]}, "p"),
        ({"prompt": "ignored", "messages": [USER, ASSISTANT]}, "p"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "p"),
        ({"prompt": "p", "answer": "a", "accepted": None, "unknown": 3}, "p"),
    ],
)
def test_schemas(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", row)
    assert read_examples(path, stream="benign") == [Example(prompt=prompt, answer="a")]


def test_categories_given_as_truth_values(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "a", "category": {"x": False, "y": True, "z": True}}
    (example,) = read_examples(write_lines(tmp_path / "a.jsonl", row), stream="harmful")
    assert example.category == "y,z"


def test_conversational_rows_survive_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"messages": [USER, ASSISTANT]}]), path)
    assert read_examples(path, stream="benign") == [Example(prompt="p", answer="a")]


def test_only_the_stream_prompts_has_no_answers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "p"}, {"messages": [USER]})
    assert read_examples(path, stream="prompts") == [Example(prompt="p"), Example(prompt="p")]
    for stream in STREAMS[:-1]:
        assert "line 1: missing field 'answer'" in refusal_to_read(path, stream)


def test_line_ends_and_marks_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # A byte order mark, Windows line ends, a blank line, U+2028 inside a text, no last line end.
    text = '\ufeff{"prompt": "p\u2028q", "answer": "a"}\r\n\r\n{"prompt": "r", "answer": "b"}'
    path.write_bytes(text.encode("utf-8"))
    first, second = read_examples(path, stream="benign")
    assert first.prompt == "p\u2028q"
    assert second == Example(prompt="r", answer="b")


def test_csv_with_quoted_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"one\r\ntwo, three",a\r\n\r\nq,\r\n')
    assert read_examples(path, stream="prompts")[0].prompt == "one\r\ntwo, three"
    assert "line 5, field answer: the answer is empty" in refusal_to_read(path)


@given(
    st.lists(
        st.tuples(*[st.text(min_size=1).filter(lambda text: text.strip() != "")] * 2), min_size=1
    )
)
def test_any_text_survives_json_lines_and_csv(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    wanted = [Example(prompt=prompt, answer=answer) for prompt, answer in pairs]
    lines = folder / "a.jsonl"
    lines.write_bytes(
        b"".join(
            json.dumps({"prompt": p, "answer": a}, ensure_ascii=False).encode() + b"\n"
            for p, a in pairs
        )
    )
    assert read_examples(lines, stream="benign") == wanted
    table = folder / "a.csv"
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("prompt", "answer"), *pairs])
    table.write_bytes(buffer.getvalue().encode())
    assert read_examples(table, stream="benign") == wanted


# Refusing to read


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"answer": "a"}', "line 2: missing field 'prompt'"),
        (b'{"prompt": null, "answer": "a"}', "line 2: missing field 'prompt'"),
        (b'{"prompt": "zanzibar-canary"}', "line 2: missing field 'answer'"),
        (b'{"prompt": " ", "answer": "a"}', "line 2, field prompt: the prompt is empty"),
        (b'{"question": "zanzibar-canary", "answer": "\\n"}', "line 2, field answer: the answer"),
        (b'{"instruction": "p", "output": ""}', "line 2, field output: the answer is empty"),
        (b'{"prompt": "p", "answer": 3}', "line 2, field answer: is int, not text"),
        (b'{"prompt": "p", "answer": "a", "half": []}', "line 2, field half: is list"),
        (b'{"prompt": "p", "answer": "a", "accepted": 1}', "line 2, field accepted: is int"),
        (b'{"prompt": "p", "answer": "a", "accepted": [1]}', "line 2, field accepted: is int"),
        (b'{"prompt": "\\ud800", "answer": "a"}', "line 2, field prompt: holds half a surrogate"),
        (b'{"prompt": "zanzibar-canary", "answer": "a"', "line 2: invalid JSON: "),
        (b'{"prompt": ' + b"[" * 100_000, "line 2: JSON that cannot be read"),
        (b'{"prompt": ' + b"1" * 5_000 + b"}", "line 2: JSON that cannot be read"),
        (b'["p", "a"]', "line 2: is list, not an object"),
        (b'{"prompt": "caf\xe9", "answer": "a"}', "line 2: byte 16 of the line is not UTF-8"),
        (b'{"messages": "p"}', "line 2, field messages: is not a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "line 2, field messages: is not a list of turns"),
        (b'{"messages": []}', "line 2, field messages: holds the roles none"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "fine", "answer": "fine"}\n' + line + b"\n")
    assert f"{path}, {message}" in refusal_to_read(path)


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant", "user"],
        ["user", "user"],
        ["user", "assistant", "assistant"],
        ["user", "system", "assistant"],
        ["system", "assistant"],
    ],
)
def test_other_conversations_are_not_cut_silently(tmp_path: Path, roles: list[str]) -> None:
    turns = [{"role": role, "content": SECRET} for role in roles]
    path = write_lines(tmp_path / "a.jsonl", {"messages": turns})
    message = refusal_to_read(path)
    assert f"line 1, field messages: holds the roles {', '.join(roles)}" in message


def test_conversational_columns_hold_their_own_role(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": [ASSISTANT], "completion": [ASSISTANT]})
    assert "line 1, field prompt: holds the roles assistant" in refusal_to_read(path)
    path = write_lines(tmp_path / "b.jsonl", {"prompt": [USER], "completion": []})
    assert "line 1, field completion: holds the roles none" in refusal_to_read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert f"{path}: the file is empty" in refusal_to_read(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,answer\n"), ("a.csv", "\n")],
)
def test_a_file_without_rows(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert f"{path}: holds no examples" in refusal_to_read(path)


def test_a_parquet_file_without_rows_or_sense(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert f"{path}: holds no examples" in refusal_to_read(path)
    path.write_bytes(b"PAR1 no")
    assert f"{path}: not a readable Parquet file" in refusal_to_read(path)


def test_parquet_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": [SECRET, SECRET], "answer": ["a", ""]}), path)
    assert f"{path}, row 2, field answer: the answer is empty" in refusal_to_read(path)
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    parquet.write_table(pa.table({"prompt": ["p", "q"], "answer": broken}), path)
    assert f"{path}, row 2: holds text that is not UTF-8" in refusal_to_read(path)


def test_bad_json_array_names_line_or_item(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"prompt": "zanzibar-canary",}\n]')
    assert f"{path}, line 2: invalid JSON" in refusal_to_read(path)
    path.write_text('[{"prompt": "p", "answer": "a"}, {"prompt": "q"}]')
    assert f"{path}, item 2: missing field 'answer'" in refusal_to_read(path)
    path.write_text("[" * 100_000)
    assert f"{path}: JSON that cannot be read" in refusal_to_read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,answer\np,a\nzanzibar-canary\n", "line 3: has 1 fields where the header has 2"),
        ("prompt,answer\np,a,b\n", "line 2: has 3 fields where the header has 2"),
        ("prompt,prompt\np,a\n", "line 1: two columns have the same name"),
        ("text,answer\np,a\n", "line 2: missing field 'prompt'"),
        ('prompt,answer\n"p,a\n', "line 2: invalid CSV"),
        ('prompt,answer\n"p"q,a\n', "line 2: invalid CSV"),
    ],
)
def test_bad_csv_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert f"{path}, {message}" in refusal_to_read(path)


def test_bad_utf8_in_csv_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,answer\np,a\ncaf\xe9,a\n")
    assert f"{path}, line 3: byte 4 of the line is not UTF-8" in refusal_to_read(path)


def test_a_prompt_in_two_splits_of_one_file(tmp_path: Path) -> None:
    row = {"prompt": SECRET, "answer": "a"}
    path = write_lines(
        tmp_path / "a.jsonl",
        {**row, "split": "train"},
        {**row, "split": "train", "answer": "b"},
        {**row, "prompt": SECRET.upper() + " ", "split": "test"},
    )
    message = refusal_to_read(path)
    assert f"{path}, line 3, field prompt: " in message
    assert f"in split 'test' here and in 'train' at {path}, line 1" in message


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refusal_to_read(tmp_path / "missing.jsonl")
    assert "no such file" in refusal_to_read(str(tmp_path / "missing"))
    assert "no such file" in refusal_to_read("data/missing.jsonl")
    assert "is a folder" in refusal_to_read(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("p")
    message = refusal_to_read(text)
    assert "unknown extension '.txt'" in message
    assert ".parquet" in message


def test_an_unknown_stream(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown stream 'harmfull'\n.*known.*: harmful,"):
        read_examples(tmp_path / "a.jsonl", stream="harmfull")


# The Hub


def test_a_hub_id_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, **keywords: Any) -> datasets.Dataset:
        calls.append((name, keywords))
        return datasets.Dataset.from_list([{"question": "p", "answer": "a", "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read_examples("owner/name", stream="benign", split="test", revision="abc123")
    assert calls == [("owner/name", {"split": "test", "revision": "abc123"})]
    assert example == Example(prompt="p", answer="a", source="owner/name@abc123", split="test")
    (example,) = read_examples("owner/name", stream="benign")
    assert example == Example(prompt="p", answer="a", source="owner/name", split="train")


def test_a_bad_row_from_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "p", "answer": "a"}, {"prompt": SECRET}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    message = refusal_to_read("owner/name")
    assert "owner/name, split train, row 2: missing field 'answer'" in message


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("it is not there\nat all"),
        ValueError('Unknown split "train"'),
        ConnectionError(),
    ],
)
def test_what_the_hub_refuses_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal_to_read("owner/name")
    assert "owner/name: the data set cannot be loaded from the Hub: " in message
    assert len(message.splitlines()) == 2


def test_an_existing_path_is_never_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "a.jsonl", FULL)
    assert read_examples("data/a.jsonl", stream="harmful") == [FULL_EXAMPLE]
    assert "no such file" in refusal_to_read("data/b")
