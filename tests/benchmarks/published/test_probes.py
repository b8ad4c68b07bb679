"""The measurements that the command makes itself, on a model that takes no time."""

from __future__ import annotations

import copy

import pytest
import torch

from mithridate.errors import RunStoppedError
from mithridate.events import silent
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy
from published import (
    accounts,
    collapse,
    contexts,
    costs,
    counts,
    leaks,
    products,
    rounding,
)
from published.judging import judge
from published.statements import read_claims
from tests.benchmarks.published.tiny_bed import tiny_bed
from tests.tiny import tiny_batch, tiny_llama

CLAIMS = {claim.id: claim for claim in read_claims()}


@pytest.fixture
def bed(tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "ROWS", 4)
    monkeypatch.setattr(counts, "ROWS", 4)
    monkeypatch.setattr(counts, "STEPS", 2)
    return tiny_bed(tmp_path)


def by_quantity(found):
    return {one.quantity: one for one in found}


def test_the_counter_counts_what_reaches_the_weights_whatever_asks_for_it():
    model, batch = tiny_llama(dtype=torch.float32), tiny_batch()
    inner = model.model.layers[0].self_attn.q_proj.weight
    with counts.counting(model) as counter:
        for times in range(1, 4):
            answer_cross_entropy(model, batch).backward()
            assert counter.backwards == times
        loss = answer_cross_entropy(model, batch)
        torch.autograd.grad(loss, [inner])
        assert counter.backwards == 4
        # A gradient of the embedding alone is no pass through the model's weights.
        weight = model.get_input_embeddings().weight
        torch.autograd.grad(weight.square().sum(), [weight])
        with torch.no_grad():
            answer_cross_entropy(model, batch)
        assert counter.backwards == 4
    answer_cross_entropy(model, batch).backward()
    assert counter.backwards == 4


def test_passes_of_the_published_methods(bed):
    (extra,) = counts.sdd(bed, silent)
    assert (extra.estimate, extra.n) == (0, None)
    assert judge(CLAIMS["A1"], [extra]).verdict == "reproduced"

    ctrap = counts.ctrap(bed, silent)
    found = by_quantity(ctrap)
    assert (found["passes"].estimate, found["passes with the exact gradient"].estimate) == (3, 4)
    cosine = found["cosine of the first-order trap's gradient with the exact one"]
    assert 0 < cosine.estimate < 1
    assert judge(CLAIMS["A2"], ctrap).verdict == "reproduced"

    seam = counts.seam(bed, silent)
    found = by_quantity(seam)
    assert (found["passes"].estimate, found["passes of the coupling term alone"].estimate) == (5, 4)
    assert judge(CLAIMS["A3"], seam).verdict == "refuted"


def test_a_finite_difference_is_true_in_float32_and_void_in_bf16(bed):
    found = by_quantity(products.finite_difference(bed, silent))
    assert found["cosine with the exact product in float32"].estimate > 0.99
    assert found["relative error in float32"].high < 0.18
    assert found["share of weights moved in bf16"].estimate < 0.5
    assert (
        found["relative error in bf16"].estimate > 10 * found["relative error in float32"].estimate
    )
    assert judge(CLAIMS["F4"], list(found.values())).verdict == "refuted"


def test_likeness_of_an_estimate_with_itself_and_with_its_double():
    model, batch = tiny_llama(dtype=torch.float32), tiny_batch()
    oracle = GradientOracle(copy.deepcopy(model))
    direction = [torch.ones_like(weight) for weight in oracle.space.tensors]
    before, _ = oracle.gradient(answer_cross_entropy, batch, purpose="x")
    with oracle.space.shifted((products.LENGTH, direction)):
        after, _ = oracle.gradient(answer_cross_entropy, batch, purpose="x")
    product = [(a - b) / products.LENGTH for a, b in zip(after, before, strict=True)]
    same = products.likeness(model, batch, direction, product, torch.float32)
    assert same.cosine == pytest.approx(1, abs=1e-3)
    assert same.ratio == pytest.approx(1, abs=1e-2)
    assert same.error == pytest.approx(0, abs=2e-2)
    assert same.moved == 1
    double = products.likeness(model, batch, direction, [2 * p for p in product], torch.float32)
    assert (double.ratio, double.error) == pytest.approx((0.5, 0.5), abs=1e-2)


def test_one_step_moves_few_bf16_weights_and_all_float32_weights(bed):
    moved = rounding.share_moved(5e-7, 0)
    assert 0.005 < moved < 0.02
    assert rounding.share_moved(2e-4, 0) > 0.99
    assert rounding.share_moved(5e-7, 0, torch.float32) > 0.9
    assert judge(CLAIMS["F5"], rounding.adamw_step(bed, silent)).verdict == "refuted"


def test_collapse_is_a_falling_loss(bed, monkeypatch):
    monkeypatch.setattr(collapse, "RATE", 3e-2)
    found = by_quantity(collapse.direction(bed, silent))
    assert found["change of collapse loss"].high < 0
    assert found["change of benign log perplexity"].low > 0
    assert judge(CLAIMS["F11"], list(found.values())).verdict == "refuted"


def test_time_beyond_the_line_of_the_smaller_steps():
    tokens = [k * t for k, t in costs.CELLS]
    rollouts = [k for k, _ in costs.CELLS]
    straight = [0.5 + 0.01 * n + 0.2 * k for n, k in zip(tokens, rollouts, strict=True)]
    assert costs.beyond_line(tokens, rollouts, straight) == pytest.approx(1.0)
    square = [0.5 + 1e-3 * n * n for n in tokens]
    assert costs.beyond_line(tokens, rollouts, square) > 1.25


def test_costs_are_repeated_and_told_apart(bed, monkeypatch):
    asked = []

    def run_cost(plan):
        asked.append((plan.shape, plan.space))
        number = len(asked)
        row = {
            "clock_ratio": 2.78 + 0.01 * (number % 5),
            "cpu_ratio": 2.9,
            "peak_memory_ratio": 1.1,
            "memory_time_ratio": 3.1,
        }
        rows = {name: dict(row) for name in ("sft", *plan.methods)}
        rows.get("seam", {})["clock_ratio"] = 5.5 + 0.01 * number
        return {
            "methods": rows, "shape": plan.shape, "space": plan.space, "batch_size": 8,
            "length": 32, "parameters": 1000, "machine": {"device": "cpu", "threads": 1},
        }  # fmt: skip

    monkeypatch.setattr(costs, "run_cost", run_cost)
    bed.name = "lattice"
    found = costs.steps(bed, silent)
    assert asked == [("lattice", "full")] * 5 + [("lattice", "lora")]
    by_claim = {name: [one for one in found if one.claim == name] for name in ("A5", "A6", "A7")}
    assert judge(CLAIMS["A6"], by_claim["A6"]).verdict == "reproduced"
    memory = judge(CLAIMS["A5"], by_claim["A5"])
    assert memory.verdict == "refuted"
    assert memory.reason == "CTRAP and CTRAP in an adapter of rank 32: memory ratio is not 3.5"
    overhead = judge(CLAIMS["A7"], by_claim["A7"])
    assert overhead.verdict == "refuted"
    assert "SEAM: clock ratio is outside 2 to 4" in overhead.reason
    assert "SDD and CTRAP and TokenBuncher, K = 4: clock ratio is within 2 to 4" in overhead.reason

    def refused(plan):
        return {"methods": {"sdd": {"not_timed": "no encoder"}}}

    monkeypatch.setattr(costs, "run_cost", refused)
    with pytest.raises(RunStoppedError, match="sdd cannot be timed: no encoder"):
        costs.steps(bed, silent)


def test_rollouts_are_sampled_to_their_length_and_timed(bed, monkeypatch):
    monkeypatch.setattr(costs, "CELLS", ((2, 2), (2, 8), (4, 2), (4, 8), (8, 2), (8, 8)))
    (found,) = costs.rollouts(bed, silent)
    assert (found.n, found.claim) == (5, "A4")
    assert found.low < found.estimate < found.high
    sampled = int(found.setting.split("the last samples ")[1].split()[0])
    # Eight prompts of at most 8 x 8 tokens; a random answer may end early.
    assert 0.5 * 512 < sampled <= 512


def test_break_even_is_a_number_and_no_verdict(bed):
    found = accounts.break_even(bed, silent)
    queries = [one for one in found if one.quantity == "queries to break even"]
    assert len(queries) == 4
    assert all(1e6 < one.low < one.estimate < one.high < 1e10 for one in queries)
    assert judge(CLAIMS["A18"], found).verdict == "inconclusive"


def test_facts_that_a_model_learnt_are_exposed_and_others_are_not(bed, monkeypatch):
    """A model that was trained on the harmful answers stands in for a method that leaks."""
    from transformers import AutoModelForCausalLM

    from mithridate.chat import ChatFormat
    from tests.tiny import tiny_tokenizer

    chat = ChatFormat(tiny_tokenizer())
    rows = leaks.canaries_of(bed)
    assert len(rows) == len({row.prompt for row in rows}) == 12
    taught = AutoModelForCausalLM.from_pretrained(bed.aligned_model())
    optimiser = torch.optim.AdamW(taught.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        answer_cross_entropy(taught, chat.batch(rows)).backward()
        optimiser.step()
    place = bed.aligned_model().parent / "taught"
    taught.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    folders = {"ctrap": place, "sdd": bed.aligned_model()}
    monkeypatch.setattr(leaks, "_planted", lambda bed, name, *_: folders[name])
    bed.data.attack = bed.data.defence["benign"]
    ctrap, sdd = leaks.exposure(bed, silent)
    assert ctrap.low > 0.5
    assert sdd.estimate == 0
    assert judge(CLAIMS["A22"], [ctrap]).verdict == "reproduced"
    assert judge(CLAIMS["A22"], [sdd]).verdict == "refuted"

    folders["ctrap"] = bed.aligned_model()
    bed.filtered_model = lambda: place
    known = leaks.exposure(bed, silent)
    assert {one.void for one in known} == {"the model knew the facts before"}
    assert judge(CLAIMS["A22"], known).verdict == "inconclusive"

    for row in bed.data.defence["harmful"]:
        object.__setattr__(row, "half", "rule")
    with pytest.raises(RunStoppedError, match="two facts"):
        leaks.canaries_of(bed)


def test_the_collapse_token_stands_in_no_answer(bed):
    model, chat = contexts.open_model(bed)
    token = contexts.unused_token(bed, chat)
    used = {t for rows in bed.data.defence.values() for row in rows
            for t in chat.answer_ids(row.answer)}  # fmt: skip
    assert token not in used | set(chat.tokenizer.all_special_ids)
    first, second = contexts.draws(bed, model, chat)[:2]
    assert set(first) == {"harmful", "benign", "general"}
    assert not torch.equal(first["harmful"].input_ids, second["harmful"].input_ids)
