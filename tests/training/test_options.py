"""Options that concern every method: balanced streams, length of rows, shares of the terms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mithridate.chat import ChatFormat
from mithridate.errors import InputError, RunInterruptedError
from mithridate.examples import Example
from mithridate.methods import METHODS
from mithridate.training import TrainingConfig, immunise
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIG = TrainingConfig(steps=4, save_every=0, learning_rate=1e-3)
DRAWING = [
    ("ctrap", {"lookahead_radius": 0.1}),
    ("seam", {"hvp": "exact"}),
    ("seam", {"hvp": "exact", "answer_mask": "difference"}),
    ("seam", {"hvp": "exact", "coupling_at": "trajectory", "attack_rows": 4}),
    ("trajectory", {"attack_rows": 4, "simulator": "stored"}),
]


def go(
    name, folder, *, examples=None, config=CONFIG, stop_at=None, at_first=lambda: None, **options
):
    kind = METHODS.load(name)
    method = kind(kind.config_class(**options))
    step = method.step

    def stopping(context):
        if context.step == 0:
            at_first()
        terms = step(context)
        if context.step == stop_at:
            raise KeyboardInterrupt
        return terms

    method.step = stopping
    return immunise(
        tiny.tiny_llama(dtype=torch.float32),
        tiny.tiny_tokenizer(),
        examples or tiny.tiny_examples(),
        method,
        config,
        folder,
    )


def noted_rows(monkeypatch):
    """Every row that is made part of a batch, wherever the batch is made."""
    rows = []
    collate = ChatFormat.collate

    def noting(self, encoded, **options):
        rows.extend(tuple(item.input_ids) for item in encoded)
        return collate(self, encoded, **options)

    monkeypatch.setattr(ChatFormat, "collate", noting)
    return rows


def uneven_examples():
    """One of twelve harmful rows, and its refusal, is of another category."""
    examples = tiny.tiny_examples()
    for name in ("harmful", "refusal"):
        examples[name] = [
            dataclasses.replace(row, category="rare" if n == 5 else "common")
            for n, row in enumerate(examples[name])
        ]
    return examples


@pytest.mark.parametrize(("name", "options"), DRAWING)
def test_balanced_harmful_rows_reach_every_method(name, options, monkeypatch, tmp_path):
    examples, rows = uneven_examples(), noted_rows(monkeypatch)
    chat = ChatFormat(tiny.tiny_tokenizer())
    kinds = {tuple(chat.encode(row).input_ids): row.category for row in examples["harmful"]}

    def share(config, folder):
        # What a method only looks at while it is prepared is not drawn.
        go(name, folder, examples=examples, config=config, at_first=rows.clear, **options)
        harmful = [kinds[row] for row in rows if row in kinds]
        assert harmful
        return harmful.count("rare") / len(harmful)

    assert share(CONFIG, tmp_path / "plain") < 0.2
    even = dataclasses.replace(CONFIG, balanced=("harmful",))
    # Half of the rows; a quarter of a simulated attacker's, whose four rows all differ.
    least = 0.2 if "attack_rows" in options else 0.4
    assert share(even, tmp_path / "even") > least


def test_a_balanced_run_resumes_bit_for_bit(tmp_path):
    config = dataclasses.replace(CONFIG, steps=6, save_every=2, balanced=("harmful", "general"))
    straight = go("ctrap", tmp_path / "a", config=config, lookahead_radius=0.1)
    with pytest.raises(RunInterruptedError):
        go("ctrap", tmp_path / "b", config=config, stop_at=3, lookahead_radius=0.1)
    resumed = go("ctrap", tmp_path / "b", config=config, lookahead_radius=0.1)
    assert resumed.history == straight.history
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_balancing_nothing_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, balanced=("refusal",))
    with pytest.raises(InputError, match="one category only"):
        go("sft", tmp_path, config=config)
    config = dataclasses.replace(CONFIG, balanced=("harmful",))
    with pytest.raises(InputError, match="no stream 'harmful'"):
        go("sft", tmp_path, config=config)


def test_reworded_prompts_are_drawn_and_a_run_with_them_resumes_bit_for_bit(monkeypatch, tmp_path):
    rows = noted_rows(monkeypatch)
    config = dataclasses.replace(CONFIG, steps=6, save_every=2, reworded=("refusal", "benign"))
    chat = ChatFormat(tiny.tiny_tokenizer())
    own = [row for stream in ("refusal", "benign") for row in tiny.tiny_examples()[stream]]
    known = {tuple(chat.encode(row).input_ids) for row in own}
    straight = go("sft", tmp_path / "a", config=config, retain=("refusal", "benign"))
    assert any(row not in known for row in rows)
    with pytest.raises(RunInterruptedError):
        go("sft", tmp_path / "b", config=config, retain=("refusal", "benign"), stop_at=3)
    resumed = go("sft", tmp_path / "b", config=config, retain=("refusal", "benign"))
    assert resumed.history == straight.history


def test_shuffled_answers_are_what_the_method_sees(tmp_path):
    examples = tiny.tiny_examples()
    seen = []
    config = dataclasses.replace(CONFIG, shuffled=("harmful",))
    method = METHODS.load("ctrap")
    plain = method.prepare

    def prepare(self, context):
        seen.append(context.examples)
        return plain(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "prepare", prepare)
        go("ctrap", tmp_path, examples=examples, config=config, lookahead_radius=0.1)
    assert seen[0]["refusal"] == examples["refusal"]
    pairs = list(zip(examples["harmful"], seen[0]["harmful"], strict=True))
    assert all(own.prompt == new.prompt and own.answer != new.answer for own, new in pairs)


def test_rewording_a_stream_that_nobody_draws_from_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, reworded=("harmful",))
    with pytest.raises(InputError, match=r"reworded: .* no stream 'harmful'"):
        go("sft", tmp_path, config=config)


@pytest.mark.parametrize(("name", "options"), DRAWING)
def test_no_batch_of_any_method_is_longer_than_max_length(name, options, monkeypatch, tmp_path):
    rows, examples = noted_rows(monkeypatch), tiny.tiny_examples()
    for stream in examples:
        examples[stream] = [
            dataclasses.replace(row, prompt=" ".join([f"w{n}"] * 20 + [row.prompt]))
            for n, row in enumerate(examples[stream])
        ]
    go(name, tmp_path, examples=examples, config=dataclasses.replace(CONFIG, max_length=12),
       **options)  # fmt: skip
    assert {len(row) for row in rows} == {12}


def test_an_own_length_stands_before_the_run_s():
    chat = ChatFormat(tiny.tiny_tokenizer(), max_length=6)
    row = Example(prompt="w1 " * 20, answer="w2")
    assert len(chat.encode(row).input_ids) == 6
    assert len(chat.encode(row, max_length=9).input_ids) == 9
    assert chat.batch([row]).input_ids.shape == (1, 6)


@pytest.mark.parametrize(
    ("name", "options", "terms"),
    [
        ("ctrap", {"lookahead_radius": 0.1}, ("collapse", "retain")),
        ("seam", {"hvp": "exact"}, ("coupling", "unlearning", "refusal")),
        ("trajectory", {}, ("collapse", "retention", "retain")),
    ],
)
def test_cosines_are_logged_every_so_often_and_change_nothing(name, options, terms, tmp_path):
    often = dataclasses.replace(CONFIG, steps=5, cosines_every=2)
    watched = go(name, tmp_path / "watched", config=often, **options)
    never = go(
        name, tmp_path / "never", config=dataclasses.replace(often, cosines_every=0), **options
    )
    for a, b in zip(watched.model.parameters(), never.model.parameters(), strict=True):
        assert torch.equal(a, b)
    added = {f"{what}_{term}" for what in ("norm", "cos") for term in terms}
    for index, (row, plain) in enumerate(zip(watched.history, never.history, strict=True)):
        assert set(row) - set(plain) == (set() if index % 2 else added)
        if index % 2 == 0:
            # The combined gradient is the sum of its terms', and so is its norm, along itself.
            along = sum(row[f"norm_{term}"] * row[f"cos_{term}"] for term in terms)
            assert along == pytest.approx(row["grad_norm"], rel=1e-4)
            assert all(-1 <= row[f"cos_{term}"] <= 1 + 1e-9 for term in terms)
    # How often they are logged does not make it another run.
    again = go(
        name, tmp_path / "watched", config=dataclasses.replace(often, cosines_every=7), **options
    )
    assert again.history == watched.history
