"""Rows of published sets: what becomes of every column, and what is said of what is left out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mithridate.errors import InputError
from mithridate.examples import Example, Reading, parse_columns, read_examples, read_source

SECRET = "zanzibar canary sings"


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


EXCHANGE = turns(("user", "p"), ("assistant", "a"))
HH = {
    "chosen": "\n\nHuman: p\n\nAssistant: good",
    "rejected": "\n\nHuman: p\n\nAssistant: bad",
}
SIDES = {"chosen": EXCHANGE, "rejected": turns(("user", "p"), ("assistant", "b"))}
PKU = {"prompt": "p", "response_0": "kind", "response_1": "cruel", "is_response_0_safe": True,
       "is_response_1_safe": False}  # fmt: skip
JUDGED = {"prompt": "p", "type": "homonyms", "focus": "kill", "note": ""}


def read(
    tmp_path: Path, *rows: dict[str, Any], stream: str = "benign", columns: str = "", **options: Any
) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reading = Reading(columns=parse_columns([columns] if columns else [], ["harmful", "benign"]))
    return read_source(path, stream=stream, reading=reading, **options).examples


def quietly(*arguments: Any, **options: Any) -> list[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(*arguments, **options)


def refusal_to_read(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert SECRET not in message
    return message


@pytest.mark.parametrize(
    ("row", "stream", "prompt", "answer"),
    [
        # Dolly, SQuAD, Alpaca: what the question is about stands in the prompt.
        ({"instruction": "p", "context": "c", "response": "a"}, "benign", "p\n\nc", "a"),
        ({"instruction": "p", "context": "", "response": "a"}, "benign", "p", "a"),
        ({"instruction": "p", "input": "i", "context": "c", "output": "a"}, "benign",
         "p\n\ni\n\nc", "a"),
        ({"question": "p", "passages": ["c", "d"], "answer": "a"}, "benign", "p\n\nc\n\nd", "a"),
        ({"context": "c", "question": "p", "answers": {"text": ["a", "b"]}}, "benign",
         "p\n\nc", "a"),
        ({"system_prompt": "s", "question": "p", "response": "a"}, "benign", "s\n\np", "a"),
        ({"input": "p", "target": "a"}, "benign", "p", "a"),
        ({"query": "p", "response": "a"}, "benign", "p", "a"),
        # Conversations.
        ({"messages": EXCHANGE}, "benign", "p", "a"),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
         "benign", "p", "a"),
        ({"conversation": EXCHANGE}, "benign", "p", "a"),
        ({"messages": turns(("user", [{"type": "text", "text": "p"}]), ("assistant", "a"))},
         "benign", "p", "a"),
        ({"messages": turns(("developer", "s"), ("user", "p"), ("assistant", "a"))},
         "benign", "s\n\np", "a"),
        ({"messages": turns(("system", ""), ("user", "p"), ("assistant", "a"))},
         "benign", "p", "a"),
        ({"prompt": turns(("system", "s"), ("user", "p")), "completion": turns(("assistant", "a"))},
         "benign", "s\n\np", "a"),
        # Sets of harmful requests.
        ({"Behavior": "p", "SemanticCategory": "c", "ContextString": None}, "prompts", "p", ""),
        ({"Behavior": "p", "SemanticCategory": "c", "ContextString": "x"}, "prompts",
         "p\n\nx", ""),
        ({"goal": "p", "target": "a"}, "harmful", "p", "a"),
        ({"Index": 0, "Goal": "p", "Target": "a", "Behavior": "b", "Category": "c"}, "harmful",
         "p", "a"),
        ({"category": "c", "source": "s", "forbidden_prompt": "p"}, "prompts", "p", ""),
        ({"vanilla": "v", "adversarial": "p", "completion": "a", "data_type": "adversarial_benign"},
         "benign", "p", "a"),
        ({"vanilla": "p", "adversarial": "", "completion": "a", "data_type": "vanilla_benign"},
         "benign", "p", "a"),
        ({"user_input": "p", "model_output": "a", "toxicity": 1}, "harmful", "p", "a"),
        (PKU, "harmful", "p", "cruel"),
        (PKU, "refusal", "p", "kind"),
        (PKU, "prompts", "p", "cruel"),
        ({**JUDGED, "label": "safe"}, "benign", "p", ""),
        ({**JUDGED, "label": "unsafe"}, "prompts", "p", ""),
        (HH, "prompts", "p", "good"),
        (SIDES, "prompts", "p", "a"),
        # Questions with choices.
        ({"question": "p", "choices": ["x", "y"], "answer": 1}, "harmful", "p\nA. x\nB. y", "y"),
        ({"question": "p", "choices": ["x", "y"], "answer": "A"}, "harmful", "p\nA. x\nB. y", "x"),
        ({"question_stem": "p", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
          "answerKey": "B"}, "benign", "p\nA. x\nB. y", "y"),
        ({"question": "p", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
          "answerKey": "2"}, "benign", "p\n1. x\n2. y", "y"),
        ({"goal": "p", "sol1": "x", "sol2": "y", "label": 0}, "benign", "p\nA. x\nB. y", "x"),
        ({"question": "p", "best_answer": "a", "incorrect_answers": ["b"]}, "benign", "p", "a"),
        ({"question": "p", "mc1_targets": {"choices": ["b", "a"], "labels": [0, 1]}}, "benign",
         "p", "a"),
    ],
)  # fmt: skip
def test_published_schemas(
    tmp_path: Path, row: dict[str, Any], stream: str, prompt: str, answer: str
) -> None:
    needs_answer = bool(answer) and stream != "prompts"
    (example,) = read(tmp_path, row, stream=stream, needs_answer=needs_answer)
    assert (example.prompt, example.answer) == (prompt, answer)
    assert example.place == f"{tmp_path / 'rows.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("row", "streams"),
    [
        (PKU | {"is_response_1_safe": True}, {"refusal", "benign", "general"}),
        (PKU | {"is_response_0_safe": False}, {"harmful", "prompts"}),
        ({**JUDGED, "label": "safe"}, {"benign", "general"}),
        ({**JUDGED, "label": "unsafe"}, {"harmful", "refusal", "prompts"}),
        ({"vanilla": "p", "completion": "a", "data_type": "vanilla_harmful"},
         {"harmful", "refusal", "prompts"}),
        ({"user_input": "p", "model_output": "a", "toxicity": 0}, {"benign", "general"}),
        ({"prompt": "p", "response": "a", "is_safe": False}, {"harmful", "prompts"}),
    ],
)  # fmt: skip
def test_a_stream_takes_its_own_kind_and_counts_the_rest(
    tmp_path: Path, row: dict[str, Any], streams: set[str]
) -> None:
    for stream in ("harmful", "refusal", "benign", "general", "prompts"):
        if stream in streams:
            assert quietly(tmp_path, row, stream=stream, needs_answer=False)
        else:
            with pytest.warns(UserWarning, match=f"the stream {stream} leaves out 1 rows"):
                assert "holds no examples" in refusal_to_read(
                    tmp_path, row, stream=stream, needs_answer=False
                )


def test_both_answers_of_one_kind_are_two_examples(tmp_path: Path) -> None:
    row = PKU | {"is_response_0_safe": False}
    assert [one.answer for one in read(tmp_path, row, stream="harmful")] == ["kind", "cruel"]


def test_several_right_answers_are_all_accepted(tmp_path: Path) -> None:
    (example,) = quietly(tmp_path, {"question": "p", "answer": ["a", "b", "a"]})
    assert (example.answer, example.accepted) == ("a", ("a", "b"))


# Sides of a pair


@pytest.mark.parametrize(
    ("row", "side", "answer"),
    [
        (HH, "chosen", "good"),
        (HH, "rejected", "bad"),
        (SIDES, "rejected", "b"),
        ({"prompt": "p", **SIDES}, "chosen", "a"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "rejected", "b"),
        ({"prompt": turns(("user", "p")), "chosen": turns(("assistant", "a")),
          "rejected": turns(("assistant", "b"))}, "rejected", "b"),
        ({"prompt": "p", "chosen": turns(("assistant", "a")), "rejected": []}, "chosen", "a"),
        (PKU, "response_1", "cruel"),
    ],
)  # fmt: skip
def test_a_side_is_chosen_by_its_column(
    tmp_path: Path, row: dict[str, Any], side: str, answer: str
) -> None:
    (example,) = read(tmp_path, row, columns=f"answer={side}")
    assert (example.prompt, example.answer) == ("p", answer)


def test_no_side_is_taken_unasked(tmp_path: Path) -> None:
    message = refusal_to_read(tmp_path, HH, HH)
    assert "holds two answers, chosen and rejected, and none is chosen; 2 of 2 rows" in message
    assert "--columns answer=chosen or --columns answer=rejected" in message
    unmarked = {name: PKU[name] for name in ("prompt", "response_0", "response_1")}
    assert "--columns answer=response_0" in refusal_to_read(tmp_path, unmarked)


# Conversations


def test_a_longer_conversation_stands_in_the_prompt_and_is_counted(tmp_path: Path) -> None:
    longer = turns(("system", "s"), ("user", "p"), ("assistant", "a"), ("user", "q"))
    row = {"messages": [*longer, *turns(("assistant", "b"))]}
    with pytest.warns(UserWarning, match="1 rows hold more than one exchange"):
        (example,) = read(tmp_path, row, {"messages": EXCHANGE})[:1]
    assert example.prompt == "s\n\nUser: p\n\nAssistant: a\n\nUser: q"
    assert example.answer == "b"
    transcript = HH["chosen"] + "\n\nHuman: q\n\nAssistant: b"
    with pytest.warns(UserWarning, match="more than one exchange"):
        (example,) = read(tmp_path, {**HH, "chosen": transcript}, columns="answer=chosen")
    assert (example.prompt, example.answer) == ("User: p\n\nAssistant: good\n\nUser: q", "b")


def test_a_last_turn_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    row = {"messages": [*EXCHANGE, *turns(("user", "q"))]}
    with pytest.warns(UserWarning, match="1 rows end with a user turn"):
        (example,) = read(tmp_path, row)
    assert (example.prompt, example.answer) == ("p", "a")


def test_a_system_turn_is_kept_or_left_out_as_asked_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": [*turns(("system", "s")), *EXCHANGE]}, {"messages": EXCHANGE}]
    with pytest.warns(UserWarning, match=r"1 rows have a system text: it is kept in front"):
        assert [one.prompt for one in read(tmp_path, *rows)] == ["s\n\np", "p"]
    with pytest.warns(UserWarning, match="1 rows have a system turn, which is left out as asked"):
        assert [one.prompt for one in read(tmp_path, *rows, columns="system=")] == ["p", "p"]


@pytest.mark.parametrize(
    ("turn", "cause"),
    [
        ({"role": "tool", "content": SECRET}, "holds the role 'tool'"),
        ({"from": "observation", "value": SECRET}, "holds the role 'observation'"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, "holds a tool call"),
        ({"role": "assistant", "content": None}, "one has no content"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "content that is not text"),
        ({"role": "assistant", "content": [3]}, "content that is not text"),
        ({"role": "x" * 9000, "content": SECRET}, "holds the role 'xxx"),
        (SECRET, "missing field 'prompt'"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, turn: Any, cause: str) -> None:
    row = {"messages": [*turns(("user", SECRET)), turn]}
    if isinstance(turn, str):
        row = {"conversation": None, "dialogue": [turn]}
    message = refusal_to_read(tmp_path, row)
    assert cause in message
    assert len(message) < 1000


# Columns


def test_columns_named_by_the_user(tmp_path: Path) -> None:
    row = {"q": "p", "passage": "c", "label": 3, "text": "t", "kind": "k"}
    (example,) = quietly(
        tmp_path, {**row, "text": "one"}, columns="prompt=q,answer=label,category=kind"
    )
    assert (example.prompt, example.answer, example.category) == ("p\n\nc", "3", "k")
    (example,) = quietly(tmp_path, row, columns="prompt={passage}, so {q}?,answer={label}.")
    assert (example.prompt, example.answer) == ("c, so p?", "3.")
    (example,) = quietly(tmp_path, row, columns="prompt=q,context=,answer=text")
    assert example.prompt == "p"


def test_columns_of_one_stream(tmp_path: Path) -> None:
    row = {"question": "p", "answer": "a", "other": "b"}
    for stream, answer in (("harmful", "b"), ("benign", "a")):
        (example,) = read(tmp_path, row, stream=stream, columns="harmful:answer=other")
        assert example.answer == answer


def test_unreadable_rows_show_their_columns_and_the_option(tmp_path: Path) -> None:
    message = refusal_to_read(tmp_path, {"sentence": SECRET, "label": 1, "x" * 9000: 1})
    assert "columns found: sentence, label, xxx" in message
    assert "--columns prompt=question,answer=response" in message
    assert len(message) < 1000
    message = refusal_to_read(tmp_path, {"prompt": "p", "answer": "a"}, columns="prompt=qestion")
    assert "has no column 'qestion'" in message
    assert "columns found: prompt, answer" in message


@pytest.mark.parametrize(
    "option", ["prompt", "prompts=x", "prompt=a,prompt=b", "harmfull:prompt=a", "=x", ""]
)
def test_a_mapping_that_says_nothing(option: str) -> None:
    with pytest.raises(InputError, match=r"parts: prompt, answer, .*of harmful, benign"):
        parse_columns([option], ["harmful", "benign"])


def test_columns_with_texts_are_never_left_out_silently(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "a", "hint": SECRET, "url": "https://x", "tags": ["a", "b"]}
    with pytest.warns(UserWarning, match="left out are the columns hint, which hold texts"):
        read(tmp_path, row, {**row, "hint": None})
    with pytest.warns(UserWarning, match="left out are the columns prompt"):
        read(tmp_path, {"prompt": SECRET, "messages": EXCHANGE})
    assert quietly(tmp_path, row, columns="context=hint")[0].prompt == f"p\n\n{SECRET}"


# Rows that cannot be used


FAULTY = [
    {"prompt": "p", "answer": "a"},
    {"prompt": "p", "answer": ""},
    {"prompt": SECRET},
    {"prompt": "q", "answer": " "},
    {"prompt": "r", "answer": "b"},
]


def test_all_faulty_rows_are_named_in_one_message(tmp_path: Path) -> None:
    message = refusal_to_read(tmp_path, *FAULTY)
    assert "line 2, field answer: the answer is empty; 3 of 5 rows cannot be used: " in message
    assert f"empty answer: 2 ({tmp_path / 'rows.jsonl'}, line 2, line 4); no answer: 1" in message
    assert "--drop-invalid" in message


def test_faulty_rows_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row).encode() for row in FAULTY] + [b'{"prompt": "caf\xe9"}', b"{", b"[1]"]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="6 rows that cannot be used are left out") as caught:
        found = read_source(path, stream="benign", reading=Reading(drop_invalid=True))
    assert [one.answer for one in found.examples] == ["a", "b"]
    assert found.left_out == {"empty answer": 2, "no answer": 1, "not UTF-8": 1,
                              "invalid JSON": 1, "no object": 1}  # fmt: skip
    assert len(caught) == 1
    path.write_bytes(b"{\n" * 9000 + lines[0])
    with pytest.warns(UserWarning, match="9000 rows") as caught:
        read_examples(path, stream="benign", reading=Reading(drop_invalid=True))
    assert len(str(caught[0].message)) < 1000
    path.write_bytes(b"\n".join(lines[1:4]))
    with pytest.raises(InputError, match="3 of 3 rows cannot be used"):
        read_examples(path, stream="benign", reading=Reading(drop_invalid=True))
