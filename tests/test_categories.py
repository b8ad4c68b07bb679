"""A published multi-label set, read as it is, and categories held out without a leak."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.categories import categories_of, category_groups, split_by_category
from mithridate.errors import InputError
from mithridate.examples import Example, normalise_prompt, read_examples

NAMES = ("animal_abuse", "drug_abuse,weapons,banned_substance", "self_harm", "privacy_violation")


def row(prompt: str, response: str, *flags: int) -> dict[str, Any]:
    """Return a row in BeaverTails' own form."""
    return {
        "prompt": prompt,
        "response": response,
        "category": {name: index in flags for index, name in enumerate(NAMES)},
        "is_safe": not flags,
    }


ROWS = [
    row("first", "unsafe one", 0, 1),
    row("first", "safe one"),
    row("second", "unsafe two", 2),
    row("third", "unsafe three", 3),
    row("second", "unsafe four", 1),
]


def write(path: Path) -> Path:
    text = "".join(json.dumps(one) + "\n" for one in ROWS)
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix)
    path.write_bytes(text.encode() if packed is None else packed(text.encode()))
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.jsonl.xz", "train.json"])
def test_streams_take_the_answers_of_their_kind(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    with pytest.warns(UserWarning, match="leaves out 1 rows that are marked safe and takes 4"):
        harmful = read_examples(path, stream="harmful")
    assert [one.answer for one in harmful] == [
        "unsafe one", "unsafe two", "unsafe three", "unsafe four",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="leaves out 4 rows that are marked unsafe and takes 1"):
        benign = read_examples(path, stream="benign")
    assert [one.answer for one in benign] == ["safe one"]
    with pytest.warns(UserWarning, match="marked safe"):
        prompts = read_examples(path, stream="prompts")
    assert len(prompts) == 4


@pytest.mark.filterwarnings("ignore:the stream")
def test_names_with_commas_stay_one_category(tmp_path: Path) -> None:
    first = read_examples(write(tmp_path / "rows.jsonl"), stream="harmful")[0]
    assert categories_of(first) == ("animal_abuse", "drug_abuse/weapons/banned_substance")


def test_lists_of_names_are_categories_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "category": ["x", "y, z"]}) + "\n")
    assert categories_of(read_examples(path, stream="harmful")[0]) == ("x", "y/ z")


@pytest.mark.parametrize(
    ("value", "safe"), [("True", True), ("false", False), ("1", True), ("0", False)]
)
def test_safety_may_be_written_as_text(tmp_path: Path, value: str, safe: bool) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,response,is_safe\np,a,{value}\n")
    assert read_examples(path, stream="benign" if safe else "harmful")
    with (
        pytest.raises(InputError, match="holds no examples for the stream"),
        pytest.warns(UserWarning, match="leaves out 1"),
    ):
        read_examples(path, stream="harmful" if safe else "benign")


def test_bad_files_of_a_published_set_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "a", "is_safe": "maybe"}\n')
    with pytest.raises(InputError, match="line 1, field is_safe"):
        read_examples(path, stream="harmful")
    for name in ("rows.jsonl.gz", "rows.jsonl.xz"):
        (tmp_path / name).write_bytes(b"not packed at all")
        with pytest.raises(InputError, match="cannot be unpacked"):
            read_examples(tmp_path / name, stream="harmful")


@pytest.mark.filterwarnings("ignore:the stream")
def test_a_row_of_two_labels_is_never_filed_under_one(tmp_path: Path) -> None:
    harmful = read_examples(write(tmp_path / "rows.jsonl"), stream="harmful")
    harmful.append(Example(prompt="fourth", answer="unsafe five", category="self_harm"))
    split = split_by_category(harmful, ["self_harm"])
    # The second prompt has two answers with different labels: both sides would learn from it.
    assert [one.answer for one in split.dropped] == ["unsafe two", "unsafe four"]
    assert [one.answer for one in split.held_out] == ["unsafe five"]
    assert [one.answer for one in split.kept] == ["unsafe one", "unsafe three"]
    assert split.bridges == {("self_harm", "drug_abuse/weapons/banned_substance"): 1}


@pytest.mark.filterwarnings("ignore:the stream")
def test_groups_are_what_can_be_held_out_whole(tmp_path: Path) -> None:
    harmful = read_examples(write(tmp_path / "rows.jsonl"), stream="harmful")
    assert category_groups(harmful) == [
        ["animal_abuse", "drug_abuse/weapons/banned_substance", "self_harm"],
        ["privacy_violation"],
    ]
    for group in category_groups(harmful):
        assert not split_by_category(harmful, group).dropped
    with pytest.raises(InputError, match=r"leaves 2 rows, and 0 held out \(2 belong to both"):
        split_by_category(harmful, ["self_harm"])


_EXAMPLES = st.lists(
    st.builds(
        Example,
        prompt=st.sampled_from(["p", "P ", "q", "r", "s", "t"]),
        answer=st.just("a"),
        category=st.lists(st.sampled_from("abcd"), min_size=1, unique=True).map(",".join),
        fact_id=st.sampled_from(["", "f", "g"]),
    ),
    min_size=1,
    max_size=12,
)


@given(_EXAMPLES, st.sets(st.sampled_from("abcd"), min_size=1))
def test_no_category_prompt_or_fact_is_on_both_sides(
    examples: list[Example], held_out: set[str]
) -> None:
    try:
        split = split_by_category(examples, held_out)
    except InputError:
        return
    assert len(split.kept) + len(split.held_out) + len(split.dropped) == len(examples)
    left, right = (
        {("category", name) for one in part for name in categories_of(one)}
        | {("prompt", normalise_prompt(one.prompt)) for one in part}
        | {("fact", one.fact_id) for one in part if one.fact_id}
        for part in (split.kept, split.held_out)
    )
    assert not left & right
    assert {name for kind, name in right if kind == "category"} <= held_out


@given(_EXAMPLES)
def test_groups_share_no_prompt_and_hold_every_category(examples: list[Example]) -> None:
    groups = category_groups(examples)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted({name for one in examples for name in categories_of(one)})
    if len(groups) > 1:
        for group in groups:
            assert not split_by_category(examples, group).dropped


def test_what_fits_neither_side_is_an_error() -> None:
    rows = [Example(prompt="p", category="a"), Example(prompt="q", category="b")]
    with pytest.raises(InputError, match="no row has the category c"):
        split_by_category(rows, ["c"])
    with pytest.raises(InputError, match="nothing is held out"):
        split_by_category(rows, [])
    with pytest.raises(InputError, match="1 of 3 rows have no category"):
        split_by_category([*rows, Example(prompt="r")], ["a"])
