"""Rows that do not fit: said or refused before training, all in one message, by file and line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from mithridate import lengths, models
from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example, Reading
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from tests.tiny import tiny_llama, tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer())
SHORT = Example(prompt="w1 w2", answer="w3", place="a.jsonl, line 1")
WORDY = Example(prompt="w1 " * 30, answer="w3", place="a.jsonl, line 2")
TALKY = Example(prompt="w1", answer="w3 " * 30, place="a.jsonl, line 3")
LENGTHS = {
    row.place: len(CHAT.prompt_ids(row.prompt)) + len(CHAT.answer_ids(row.answer))
    for row in (SHORT, WORDY, TALKY)
}


def fit(*rows: Example, max_length: int | None = None, drop: bool = False) -> lengths.Fitted:
    return lengths.fit(
        tiny_llama(), tiny_tokenizer(), {"harmful": rows, "prompts": [SHORT]},
        max_length=max_length, rows=4, drop=drop, option="training.max_length",
    )[1]  # fmt: skip


def test_by_default_the_length_follows_the_data() -> None:
    fitted = fit(SHORT, WORDY, TALKY)
    assert fitted.examples["harmful"] == [SHORT, WORDY, TALKY]
    assert fitted.report["harmful"] == {"rows": 3, "longest": max(LENGTHS.values())}


def test_prompts_that_are_cut_are_named_and_counted() -> None:
    with pytest.warns(UserWarning, match="cut to") as caught:
        fitted = fit(SHORT, WORDY, max_length=20)
    message = str(caught[0].message)
    tokens = LENGTHS["a.jsonl, line 2"]
    assert message == (
        "1 prompts are cut to training.max_length 20: "
        f"harmful: 1 (a.jsonl, line 2: {tokens} tokens)"
    )
    assert fitted.examples["harmful"] == [SHORT, WORDY]
    assert fitted.report["harmful"]["cut"] == 1


def test_answers_that_do_not_fit_are_all_refused_in_one_message() -> None:
    other = dataclasses.replace(TALKY, place="a.jsonl, line 9", answer="w3 " * 99)
    longest = len(CHAT.prompt_ids(other.prompt)) + len(CHAT.answer_ids(other.answer))
    with pytest.raises(InputError) as caught:
        fit(SHORT, TALKY, other, max_length=20)
    message = str(caught.value)
    assert "2 rows are too long for training.max_length 20: harmful: 2" in message
    assert f"line 3: {LENGTHS['a.jsonl, line 3']} tokens, line 9: {longest} tokens" in message
    assert f"raise training.max_length to {longest}, " in message
    assert "--drop-invalid" in message


def test_all_that_is_too_long_is_left_out_when_asked() -> None:
    with pytest.warns(UserWarning, match="2 rows are left out, too long for"):
        fitted = fit(SHORT, WORDY, TALKY, max_length=20, drop=True)
    assert fitted.examples["harmful"] == [SHORT]
    assert fitted.report["harmful"]["too long"] == 2
    with pytest.raises(InputError, match="every row of harmful is too long"):
        fit(TALKY, max_length=20, drop=True)


def test_the_model_s_positions_bound_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "positions", lambda _: 20)
    with pytest.raises(InputError, match="too long for the model's 20 positions"):
        fit(TALKY)
    with pytest.warns(UserWarning, match="cut to the model's 20 positions"):
        assert fit(WORDY).max_length == 20


def test_memory_refuses_and_never_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_memory", lambda: 200_000)
    with pytest.raises(InputError, match=r"too long for the free memory \(about \d+ tokens a row"):
        fit(WORDY)
    fit(WORDY, max_length=1000)
    monkeypatch.setattr(models, "available_memory", lambda: 20_000_000)
    fit(WORDY)


@pytest.mark.parametrize("method", ["sft", "sdd"])
def test_an_immunisation_with_long_rows_starts_at_the_defaults(tmp_path: Path, method: str) -> None:
    model = tiny_llama(dtype=torch.float32)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    streams = {}
    for number, name in enumerate(("harmful", "refusal", "benign")):
        rows = [{"prompt": f"w{number} w{n}", "answer": "w1 " * 300} for n in range(4)]
        rows.append({"prompt": f"w{number} w9", "answer": " "})
        streams[name] = str(tmp_path / f"{name}.jsonl")
        Path(streams[name]).write_text("\n".join(map(json.dumps, rows)))
    config = tmp_path / "run.yaml"
    config.write_text(
        "method: {batch_size: 3" + (", pairs: 4, encoder: tfidf}" if method == "sdd" else "}")
    )
    plan = ImmunisationPlan(
        model=str(tmp_path / "model"), method=method, streams=streams, config=config, steps=1,
        output_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"harmful\.jsonl, line 5, field answer: the answer is em"):
        run_immunisation(plan)
    with pytest.warns(UserWarning, match="1 rows that cannot be used are left out"):
        run_immunisation(dataclasses.replace(plan, reading=Reading(drop_invalid=True)))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    read = manifest["data"].values()
    assert all(one["left out"] == {"empty answer": 1} for one in read)
    assert all(one["rows"] == 4 and one["longest"] > 300 for one in read)
    assert re.search(r"max_length: null", (tmp_path / "run" / "config.yaml").read_text())


def test_a_question_without_room_for_an_answer_is_refused_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "positions", lambda _: 20)

    def asked(*, drop: bool) -> lengths.Fitted:
        return lengths.fit(
            tiny_llama(), tiny_tokenizer(), {"harmful": [SHORT]}, asked={"eval": [TALKY, WORDY]},
            max_length=None, rows=4, drop=drop,
        )[1]  # fmt: skip

    question = len(CHAT.prompt_ids(WORDY.prompt))
    with pytest.raises(InputError, match=f"line 2: a question of {question} tokens for 20 pos"):
        asked(drop=False)
    with pytest.warns(UserWarning, match="1 rows are left out"):
        fitted = asked(drop=True)
    # An answer's length is no matter there: it is not what the model reads.
    assert fitted.examples["eval"] == [TALKY]
    assert fitted.added_to({"eval": {"empty answer": 2, "too long": 1}}) == {
        "eval": {"empty answer": 2, "too long": 2}
    }


def test_what_the_template_cannot_write_is_named_by_file_and_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "m.content", "m.content.replace('w7', '')"
    )
    assert "replace(" in tokenizer.chat_template
    switches = [
        dataclasses.replace(SHORT, prompt=f"w7 w{n}", place=f"a.jsonl, line {n}") for n in (4, 8)
    ]

    def fit(*rows: Example, drop: bool = False) -> lengths.Fitted:
        return lengths.fit(
            tiny_llama(), tokenizer, {"harmful": rows}, max_length=None, rows=1, drop=drop
        )[1]

    with pytest.raises(InputError) as caught:
        fit(SHORT, *switches)
    message = str(caught.value)
    assert "2 rows cannot be encoded: harmful: 2 (a.jsonl, line 4: the chat template" in message
    assert "line 8: the chat template writes this prompt otherwise than others" in message
    with pytest.warns(UserWarning, match="2 rows are left out, which cannot be encoded"):
        fitted = fit(SHORT, *switches, drop=True)
    assert fitted.examples["harmful"] == [SHORT]
    assert fitted.report["harmful"]["not encoded"] == 2
    chat = ChatFormat(tokenizer)
    for row in switches:
        with pytest.raises(InputError, match=f"{row.place}: the chat template writes this prompt"):
            chat.encode(row)
    with pytest.raises(InputError, match="every row of harmful is not to be encoded"):
        fit(*switches, drop=True)


def test_sampled_answers_need_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()

    monkeypatch.setattr(models, "positions", lambda _: None)

    def sampled(tokens: int | None) -> None:
        lengths.check_rollouts(model, CHAT, [SHORT, WORDY], rows=8, tokens=tokens)

    sampled(2000)
    monkeypatch.setattr(models, "available_memory", lambda: 20_000_000)
    sampled(10)
    with pytest.raises(InputError, match="8 sampled answers of up to 2000 tokens do not fit"):
        sampled(2000)
    monkeypatch.setattr(models, "available_memory", lambda: 1_000)
    with pytest.raises(InputError, match="lower batch_size, rollouts or response_length"):
        sampled(None)
