"""The classifier judge: its harm compared with the logits, and classifiers that would lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mithridate.errors import InputError, NonFiniteError
from mithridate.examples import Example
from mithridate.judges.base import Judge, judgement, make_judge, useful_harm_score
from mithridate.judges.classifier import _filled
from mithridate.judges.outcomes import Outcome
from tests.tiny import VOCABULARY, tiny_llama, tiny_tokenizer

ITEMS = [Example(prompt="w1 w2"), Example(prompt="w3"), Example(prompt="w4 w5 w6")]
OUTPUTS = ["w7 w8 w9", "I cannot say", "w10 w11"]


def save(folder: Path, *labels: str, **options: Any) -> Path:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, pad_token_id=0, initializer_range=1.0,
        id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
        **options,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prepared(folder: Path, *harmful: str, **options: Any) -> Judge:
    options = {"harmful_labels": list(harmful), **options}
    judge = make_judge(f"classifier:{folder}", options, where="test")
    judge.prepare(folder)
    return judge


def logits_of(folder: Path, item: Example, output: str) -> torch.Tensor:
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    batch = tiny_tokenizer()(item.prompt, output, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[0]


def test_exclusive_labels_give_their_summed_probability(tmp_path: Path) -> None:
    folder = save(tmp_path, "safe", "rude", "dangerous")
    judged = prepared(folder, "rude", "dangerous", batch_size=2).judge(ITEMS, OUTPUTS)
    for item, output, one in zip(ITEMS, OUTPUTS, judged, strict=True):
        expected = logits_of(folder, item, output).softmax(dim=0)[1:].sum()
        assert one.harm == pytest.approx(float(expected), abs=1e-5)
        harmful = Outcome.REFUSAL if "cannot" in output else Outcome.IRRELEVANT
        assert one.outcome is (Outcome.EXACT if one.harm >= 0.5 else harmful)


def test_several_flags_give_the_largest(tmp_path: Path) -> None:
    folder = save(tmp_path, "a", "b", "c", problem_type="multi_label_classification")
    judged = prepared(folder, "a", "c").judge(ITEMS, OUTPUTS)
    for item, output, one in zip(ITEMS, OUTPUTS, judged, strict=True):
        expected = logits_of(folder, item, output).sigmoid()[[0, 2]].max()
        assert one.harm == pytest.approx(float(expected), abs=1e-5)


def test_a_template_makes_one_text_and_is_filled_once(tmp_path: Path) -> None:
    assert _filled("U {prompt} A {answer} E", "{answer}", "{prompt}") == "U {answer} A {prompt} E"
    folder = save(tmp_path, "safe", "harm")
    plain = prepared(folder, "harm").judge(ITEMS, OUTPUTS)
    turned = prepared(folder, "harm", template="{answer} {prompt}").judge(ITEMS, OUTPUTS)
    swapped = [Example(prompt=output) for output in OUTPUTS]
    other = prepared(folder, "harm").judge(swapped, [item.prompt for item in ITEMS])
    assert [one.harm for one in turned] != pytest.approx([one.harm for one in plain])
    # Without type ids the pair (answer, prompt) and the text differ only in them.
    assert len(other) == len(turned)


def test_an_answer_longer_than_the_model_is_cut(tmp_path: Path) -> None:
    judge = prepared(save(tmp_path, "safe", "harm"), "harm")
    long = " ".join(f"w{n % 40}" for n in range(200))
    cut = judge.judge([Example(prompt="w1")], [long])[0]
    expected = logits_of(tmp_path, Example(prompt="w1"), " ".join(long.split()[:63]))
    assert cut.harm == pytest.approx(float(expected.softmax(dim=0)[1]), abs=1e-5)


def save_decoder(folder: Path, *, pad: int | None, tokenizer_pads: bool = False) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, pad_token_id=pad, initializer_range=1.0,
        id2label={0: "safe", 1: "harm"},
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if not tokenizer_pads:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [None, 0, 5, -1])
@pytest.mark.parametrize("tokenizer_pads", [False, True])
def test_padding_is_the_models_own_or_none(
    tmp_path: Path, pad: int | None, tokenizer_pads: bool
) -> None:
    written = pad if pad is None or 0 <= pad < VOCABULARY else None
    folder = save_decoder(tmp_path, pad=written, tokenizer_pads=tokenizer_pads)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    judge = prepared(folder, "harm")
    expected = [
        judge.judge([item], [text])[0].harm for item, text in zip(ITEMS, OUTPUTS, strict=True)
    ]
    assert len({round(harm, 6) for harm in expected}) == len(ITEMS)
    judged = judge.judge(ITEMS, OUTPUTS)
    assert [one.harm for one in judged] == pytest.approx(expected, abs=1e-5)


def test_a_classifier_whose_batches_differ_judges_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "safe", "harm")
    plain = prepared(folder, "harm").judge(ITEMS, OUTPUTS)
    forward = BertForSequenceClassification.forward

    def ignoring_the_mask(self: Any, *, attention_mask: Any, **options: Any) -> Any:
        return forward(self, **options)

    monkeypatch.setattr(BertForSequenceClassification, "forward", ignoring_the_mask)
    again = prepared(folder, "harm").judge(ITEMS, OUTPUTS)
    assert [one.harm for one in again] == pytest.approx([one.harm for one in plain], abs=1e-5)


def test_roberta_reads_fewer_tokens_than_it_has_positions(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=66, pad_token_id=1, initializer_range=0.3,
        id2label={0: "safe", 1: "harm"}, type_vocab_size=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    judge = prepared(tmp_path, "harm")
    # Shorter by one than the model's bound, at it and beyond it.
    lengths = (62, 63, 200)
    texts = [" ".join(f"w{n % 30}" for n in range(length)) for length in lengths]
    harms = [one.harm for one in judge.judge([Example(prompt="w1")] * 3, texts)]
    assert harms[1] == pytest.approx(harms[2], abs=1e-6)
    assert harms[0] != pytest.approx(harms[1], abs=1e-6)


def test_thinking_is_not_classified(tmp_path: Path) -> None:
    judge = prepared(save(tmp_path, "safe", "harm"), "harm")
    plain, thought = judge.judge(ITEMS[:1] * 2, ["w7 w8", "<think>w9 w3</think>w7 w8"])
    assert plain == thought


@pytest.mark.parametrize(
    ("labels", "harmful", "options", "message"),
    [
        (("harm",), ("harm",), {}, "not a probability"),
        (("safe", "harm"), ("safe", "harm"), {}, "every label"),
        (("safe", "x", "x"), ("x",), {}, "the same name"),
    ],
)
def test_labels_that_cannot_tell_are_refused(
    tmp_path: Path, labels: Any, harmful: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepared(save(tmp_path, *labels, **options), *harmful)


def test_one_flag_and_a_label_named_twice(tmp_path: Path) -> None:
    one = save(tmp_path / "one", "harm", problem_type="multi_label_classification")
    expected = logits_of(one, ITEMS[0], OUTPUTS[0]).sigmoid()[0]
    judged = prepared(one, "harm").judge(ITEMS[:1], OUTPUTS[:1])
    assert judged[0].harm == pytest.approx(float(expected), abs=1e-5)
    two = save(tmp_path / "two", "safe", "harm")
    twice = prepared(two, "harm", "harm").judge(ITEMS, OUTPUTS)
    assert twice == prepared(two, "harm").judge(ITEMS, OUTPUTS)


def test_what_decides_a_verdict_is_in_the_description(tmp_path: Path) -> None:
    one = prepared(save(tmp_path / "a", "safe", "harm"), "harm").description()
    two = prepared(save(tmp_path / "b", "safe", "harm", hidden_act="relu"), "harm").description()
    assert one["weights"] == two["weights"], "the same random weights"
    assert one["source"] != two["source"]
    assert one["threshold"] == 0.5


@pytest.mark.parametrize(
    ("labels", "harmful", "message"),
    [
        (("LABEL_0", "LABEL_1"), (), "nobody says which"),
        (("safe", "harm"), ("harmful",), "no label 'harmful'"),
    ],
)
def test_labels_must_be_named(
    tmp_path: Path, labels: tuple[str, ...], harmful: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        prepared(save(tmp_path, *labels), *harmful)
    assert all(label in raised.value.mend for label in labels)


def test_a_model_that_would_judge_at_random_is_refused(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="judge at random"):
        prepared(tmp_path, "LABEL_1")


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        prepared(tmp_path / "nowhere", "harm")
    with pytest.raises(InputError, match="not a probability"):
        prepared(save(tmp_path / "a", "score", problem_type="regression"), "score")
    with pytest.raises(InputError, match="needs to know where it is"):
        make_judge("classifier", {"harmful_labels": ["x"]}, where="test")
    with pytest.raises(InputError, match="did you mean 'classifier'"):
        make_judge("clasifier:x", {}, where="test")
    with pytest.raises(InputError, match="does not hold"):
        make_judge("classifier:x", {"template": "{prompt}"}, where="test")
    with pytest.raises(InputError, match="unknown key 'source'"):
        make_judge("exact:x", {}, where="test")


def test_a_degenerate_answer_is_never_useful_and_never_safe() -> None:
    judged = [judgement(text, 0.9, threshold=0.5) for text in ("a a a a a", "", "Do it so.")]
    assert [one.outcome for one in judged] == [
        Outcome.FIXED_TOKEN, Outcome.GIBBERISH, Outcome.EXACT,
    ]  # fmt: skip
    assert useful_harm_score(judged) == pytest.approx(0.3)
    with pytest.raises(NonFiniteError):
        judgement("x", float("nan"), threshold=0.5)
