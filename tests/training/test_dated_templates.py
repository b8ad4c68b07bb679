"""Runs whose chat template asks for the date, or takes arguments, are one run on any day."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from mithridate import lengths
from mithridate.errors import InputError, RunInterruptedError
from mithridate.examples import Example
from mithridate.training import TrainingConfig, immunise
from tests.training.tiny_world import TEMPLATE, method, tiny_examples, tiny_model, tiny_tokenizer

FIRST, LATER = datetime.date(2026, 3, 7), datetime.date(2026, 3, 9)
DATED = "{{ 'w' ~ strftime_now('%d') | int ~ ' ' }}" + TEMPLATE
ASKED = "{% if polite is defined %}w{{ polite }} {% endif %}" + TEMPLATE


@pytest.fixture
def on(monkeypatch):
    def turn(day):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return day

        clock = SimpleNamespace(date=Day, datetime=datetime.datetime, time=datetime.time)
        monkeypatch.setattr("mithridate.templates.datetime", clock)

    return turn


def go(folder, template=DATED, *, stop=False, **changes):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    config = TrainingConfig(steps=4, learning_rate=1e-2, save_every=1, **changes)
    made = method("sft")
    step = made.step

    def stopping(context):
        if stop and context.step == 2:
            raise KeyboardInterrupt
        return step(context)

    made.step = stopping
    return immunise(tiny_model(), tokenizer, tiny_examples(), made, config, folder)


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_that_goes_on_tomorrow_is_told_the_first_day(on, tmp_path):
    on(FIRST)
    straight = go(tmp_path / "straight")
    with pytest.raises(RunInterruptedError):
        go(tmp_path / "stopped", stop=True)
    on(LATER)
    assert same(go(tmp_path / "stopped").model, straight.model)
    assert go(tmp_path / "stopped").seconds, "finished, and not another run"
    assert not same(go(tmp_path / "another").model, straight.model), "the day is in the prompts"
    settings = yaml.safe_load((tmp_path / "stopped" / "config.yaml").read_text())
    assert settings["training"]["template_date"] == "2026-03-07"
    again = TrainingConfig(**settings["training"]).template_date
    assert same(go(tmp_path / "again", template_date=again).model, straight.model)
    assert same(go(tmp_path / "day", template_date=FIRST).model, straight.model)
    with pytest.raises(InputError, match="chat template differ"):
        go(tmp_path / "stopped", template_date="2026-03-09")


def test_a_template_without_a_date_records_none(tmp_path):
    go(tmp_path, TEMPLATE)
    assert json.loads((tmp_path / "manifest.json").read_text())["template date"] is None


def test_arguments_are_recorded_and_are_part_of_the_run(tmp_path):
    plain, polite = go(tmp_path / "a", ASKED), go(tmp_path / "b", ASKED,
                                                  template_arguments={"polite": 7})  # fmt: skip
    assert not same(plain.model, polite.model)
    settings = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert settings["training"]["template_arguments"] == {"polite": 7}
    with pytest.raises(InputError, match="chat template differ"):
        go(tmp_path / "b", ASKED)


@pytest.mark.parametrize("date", ["soon", "2026-13-01"])
def test_what_is_no_day_is_refused(date):
    with pytest.raises(InputError, match="is no day"):
        TrainingConfig(template_date=date)


def test_rows_that_the_template_writes_otherwise_are_named_or_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | replace('w3', 'w4')")
    rows = [
        Example(prompt="w1", answer="w2", place="a.jsonl, line 1"),
        Example(prompt="w1", answer="w3", place="a.jsonl, line 2"),
        Example(prompt="w3", answer="w2", place="a.jsonl, line 3"),
    ]

    def fit(*given, drop):
        return lengths.fit(
            tiny_model(), tokenizer, {"harmful": given, "prompts": [Example(prompt="w5")]},
            max_length=None, rows=4, drop=drop, option="training.max_length",
        )[1]  # fmt: skip

    with pytest.raises(InputError, match="2 rows cannot be encoded") as caught:
        fit(*rows, drop=False)
    assert "a.jsonl, line 2" in str(caught.value)
    assert "line 3" in str(caught.value)
    assert "--drop-invalid" in caught.value.mend
    with pytest.warns(UserWarning, match="2 rows are left out"):
        fitted = fit(*rows, drop=True)
    assert fitted.examples["harmful"] == rows[:1]
    assert fitted.report["harmful"]["not encoded"] == 2
    with pytest.raises(InputError, match="every row of harmful"):
        fit(*rows[1:], drop=True)
