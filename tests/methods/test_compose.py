"""Compositions: sums and sequences of methods behave as their members do, and add up."""

import json

import pytest
import torch
import yaml

from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError, RunInterruptedError
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from mithridate.methods import METHODS, Method
from mithridate.methods import compose as module
from mithridate.training import TrainingConfig, immunise
from mithridate.weights import arithmetic
from mithridate.weights.losses import answer_cross_entropy
from mithridate.weights.maps import blocks_of
from tests.tiny import (
    MemoryWatch,
    relative_error,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)

PARTS = {
    "sft": {"batch_size": 6},
    "ctrap": {"lookahead_radius": 0.3, "collapse_weight": 0.4},
    "seam": {"batch_size": 4, "coupling_weight": 0.5, "hvp": "exact"},
    "tokenbuncher": {
        "min_refusal": 0.0,
        "batch_size": 2,
        "response_length": 4,
        "prompt_length": 16,
        "benign_rows": 3,
    },
}


def made(name, **options):
    kind = METHODS.load(name)
    labels = kind.config_class.members
    parts = {label: PARTS[method] for label, method in labels.items() if method in PARTS}
    return kind(from_mapping(kind.config_class, {"parts": parts} | options, where="run.yaml"))


def alone(name):
    kind = METHODS.load(name)
    return kind(from_mapping(kind.config_class, PARTS[name], where="run.yaml"))


def step_of(method, model, *, step=1, **options):
    context = tiny_context(model, step=step, **options)
    context.space.give_gradient(None)
    prepared = method.prepare(context)
    context.oracle.ledger.clear()
    terms = method.step(context)
    return [tensor.clone() for tensor in context.space.gradient()], terms, context, prepared


@pytest.mark.parametrize("names", [("ctrap", "sft", "seam"), ("seam", "tokenbuncher")])
def test_a_sum_is_the_weighted_sum_of_its_members_gradients(space, names):
    model = tiny_model(space)
    weights = {name: weight for name, weight in (("seam", 0.5), ("sft", 2.0)) if name in names}
    # YAML reads 5e-1 as text.
    method = made("+".join(names), weights=weights | {"seam": "5e-1"})
    found, terms, context, prepared = step_of(method, model)
    singles = {name: step_of(alone(name), model) for name in names}
    expected = [torch.zeros_like(weight) for weight in weights_of(model)]
    for name, (gradient, logged, one, before) in singles.items():
        for total, tensor in zip(expected, gradient, strict=True):
            total += weights.get(name, 1.0) * tensor
        assert {key: terms[f"{name}/{key}"] for key in logged} == logged
        assert {key: prepared[f"{name}/{key}"] for key in before} == before
        for purpose, count in one.oracle.ledger.items():
            counted = context.oracle.ledger[f"{name}/{purpose}"]
            assert (counted.backwards, counted.tokens) == (count.backwards, count.tokens)
    assert relative_error(found, expected) < 1e-12
    assert len(terms) == sum(len(logged) for _, logged, _, _ in singles.values())
    assert method.streams == tuple(
        dict.fromkeys(stream for name in names for stream in alone(name).streams)
    )
    assert method.active_terms == tuple(
        f"{name}/{term}" for name in names for term in alone(name).active_terms
    )


def test_passes_and_buffers_add_up(monkeypatch):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    model = tiny_llama(dtype=torch.float32, hidden=128)
    rows = {
        "sft": {"batch_size": 3},
        "ctrap": {"lookahead_radius": 0.3, "harmful_rows": 1, "retain_rows": 2, "collapse_rows": 1},
    }
    method = made("sft+ctrap", parts=rows)
    context = tiny_context(model)
    method.prepare(context)
    context.oracle.ledger.clear()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == 1 + 3
    # The gradient that is left, beside one member's own and the gradient that waits.
    held = watch.peak / context.space.bytes - 1
    assert method.parameter_buffers == 0 + 1 + 1
    assert method.parameter_buffers - 0.5 < held < method.parameter_buffers + 0.6
    seam = made("seam+ctrap", weights={"seam": 0.0})
    assert (seam.passes_per_step, seam.parameter_buffers) == (3, 1)
    assert "benign" not in seam.streams


def test_cost_stands_beside_the_batch_of_the_first_member_that_steps():
    kind = METHODS.load("lox+booster+sft").config_class
    parts = {"booster": {"retain_rows": 3}, "sft": {"batch_size": 5}}
    assert kind(parts=parts).batch_size == 3
    assert kind(parts=parts, weights={"booster": 0}).batch_size == 5


def test_members_alternate_and_count_their_own_steps():
    method = made("sft+seam", combine="alternate", turns={"sft": 2})
    assert method.passes_per_step == pytest.approx((2 * 1 + alone("seam").passes_per_step) / 3)
    assert method.parameter_buffers == 3
    seen = spy(method)
    model = tiny_llama()
    context = tiny_context(model)
    method.prepare(context)
    seen.clear()
    for step in range(7):
        context.step = step
        method.step(context)
        (label, *_) = seen[-1]
        assert all(term.startswith(f"{label}/") for term in method.active_terms)
    assert [entry[:2] for entry in seen] == [
        ("sft", 0), ("sft", 1), ("seam", 0), ("sft", 2), ("sft", 3), ("seam", 1), ("sft", 4),
    ]  # fmt: skip
    # Ten steps in all.
    assert {label: total for label, _, total in seen} == {"sft": 7, "seam": 3}
    single, *_ = step_of(alone("seam"), model)
    assert relative_error(step_of(method, model, step=2)[0], single) < 1e-12


@pytest.mark.parametrize(
    ("turns", "expected"),
    [({}, [4, 3, 3]), ({"sft": 5, "ctrap": 4}, [5, 4, 1]), ({"sft_2": 3}, [2, 2, 6])],
)
def test_a_sequence_gives_each_member_its_share_of_the_run(turns, expected):
    method = made("sft+ctrap+sft", combine="sequence", turns=turns)
    seen = spy(method)
    context = tiny_context(tiny_llama())
    method.prepare(context)
    seen.clear()
    for step in range(10):
        context.step = step
        method.step(context)
    labels = ("sft", "ctrap", "sft_2")
    counts = [sum(entry[0] == label for entry in seen) for label in labels]
    assert sum(counts) == 10
    assert all(abs(count - share) <= 1 for count, share in zip(counts, expected, strict=True))
    assert [entry[0] for entry in seen] == [
        label for label, count in zip(labels, counts, strict=True) for _ in range(count)
    ]
    for label, count in zip(labels, counts, strict=True):
        own = [entry[1:] for entry in seen if entry[0] == label]
        assert own == [(step, count) for step in range(count)]


@pytest.mark.parametrize(
    ("name", "combine"),
    [
        ("tvaccine+sft", "sequence"),
        ("tvaccine+sft", "alternate"),
        ("tvaccine+sft", "sum"),
        ("tvaccine+tvaccine", "sum"),
    ],
)
def test_layers_that_no_member_trains_keep_their_bits(name, combine):
    own = {"batch_size": 4, "radius": 0.5, "layers": 1, "redraw_every": 1}
    labels = METHODS.load(name).config_class.members
    parts = {label: own for label, member in labels.items() if member == "tvaccine"}
    model = tiny_llama(layers=4)
    method, context = made(name, combine=combine, parts=parts), tiny_context(model)
    method.prepare(context)
    optimiser = torch.optim.AdamW(context.space.tensors, lr=1e-2, weight_decay=0.1)
    layers, draws = blocks_of(model), set()
    present = {id(w): w for w in context.space.tensors}
    for step in range(context.total_steps):
        context.step = step
        before = {id(w): w.detach().clone() for w in context.space.tensors}
        terms = method.step(context)
        optimiser.step()
        moved = {key for key in before if not torch.equal(before[key], present[key])}
        if "sft/retain" in terms:
            assert moved == set(before)
            continue
        drawn = {
            index for label in parts for index in method.parts[label].state()["drawn"].tolist()
        }
        draws |= drawn
        assert moved == {id(w) for index in drawn for w in layers[index].parameters()}
    # Some layer stood still with moments, of an earlier draw or of the other member.
    assert len(draws) > 1 or (name, combine) == ("tvaccine+sft", "sum")


def spy(method):
    """Note (label, own step, own total) of every step that a member makes."""
    seen = []
    for label, part in method.parts.items():

        def watched(context, part=part, label=label, step=part.step):
            seen.append((label, context.step, context.total_steps))
            return step(context)

        part.step = watched
    return seen


def test_shares_of_the_terms_are_the_members_weighted():
    model = tiny_llama()
    method = made("ctrap+seam", weights={"ctrap": 0.25})
    context = tiny_context(model)
    method.prepare(context)
    context.shares = {}
    method.step(context)
    own = tiny_context(model)
    single = alone("ctrap")
    single.prepare(own)
    own.shares = {}
    single.step(own)
    for term, gradient in own.shares.items():
        assert relative_error(
            context.shares[f"ctrap/{term}"], [0.25 * tensor for tensor in gradient]
        ) < 1e-12  # fmt: skip
    noted = context.take_shares()
    assert noted["norm_ctrap/retain"] == pytest.approx(0.25 * own.take_shares()["norm_retain"])


def test_a_member_that_gives_nothing_stops_the_run(tmp_path, monkeypatch):
    method = made("sft+ctrap", combine="alternate")

    def nothing(context):
        context.oracle.accumulate(
            answer_cross_entropy, context.draw("refusal", 2), purpose="retain"
        )
        return {"retain": 1.0, "collapse": 0.0}

    monkeypatch.setattr(method.parts["ctrap"], "step", nothing)
    config = TrainingConfig(steps=60, save_every=0, learning_rate=1e-4)
    model = tiny_llama(dtype=torch.float32)
    with pytest.raises(InactiveTermError, match="ctrap/collapse"):
        immunise(model, tiny_tokenizer(), tiny_examples(), method, config, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    # Twenty of its own steps, not of the run's.
    assert "20 steps" in manifest["reason"]


@pytest.mark.filterwarnings("ignore:the look-ahead left")
def test_an_interrupted_composition_resumes_bit_for_bit(tmp_path):
    parts = {"ctrap": {"lookahead_direction": "adam", "lookahead_radius": 0.1}}
    config = TrainingConfig(steps=6, save_every=2, learning_rate=1e-3)

    def go(folder, stop_at=None):
        method = made("ctrap+sft", combine="alternate", parts=parts)
        step = method.step

        def stopping(context):
            terms = step(context)
            if context.step == stop_at:
                raise KeyboardInterrupt
            return terms

        method.step = stopping
        model = tiny_llama(dtype=torch.float32)
        return immunise(model, tiny_tokenizer(), tiny_examples(), method, config, folder)

    straight = go(tmp_path / "straight")
    with pytest.raises(RunInterruptedError, match="step 2"):
        go(tmp_path / "stopped", stop_at=3)
    resumed = go(tmp_path / "stopped")
    assert resumed.history == straight.history
    assert {name: count.backwards for name, count in resumed.ledger.items()} == {
        name: count.backwards for name, count in straight.ledger.items()
    }
    for (key, a), b in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key


@pytest.mark.filterwarnings("ignore:the look-ahead left", "ignore:--general not given")
def test_the_command_runs_a_composition_and_can_be_given_what_it_wrote(tmp_path):
    model = tmp_path / "model"
    tiny_llama(dtype=torch.float32).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    # Benign prompts share none with harmful ones.
    streams = {"harmful": 0, "refusal": 0, "benign": 1}
    for name, offset in streams.items():
        rows = [
            {"prompt": f"w{2 * n + offset} w{n}", "answer": f"w{40 + offset} w{n}"}
            for n in range(10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    config = tmp_path / "run.yaml"
    config.write_text(
        "method:\n"
        "  combine: sum\n"
        "  weights: {sft: 0.5}\n"
        "  parts:\n"
        "    ctrap: {lookahead_radius: 0.1, collapse_token: 7}\n"
        "    sft: {batch_size: 4, retain: [refusal, benign]}\n"
        "training: {steps: 3, learning_rate: 1e-3}\n"
    )

    def go(folder, config):
        return run_immunisation(
            ImmunisationPlan(
                model=str(model),
                method="ctrap+sft",
                streams={name: str(tmp_path / f"{name}.jsonl") for name in streams},
                config=config,
                output_dir=folder,
            )
        )

    first = go(tmp_path / "first", config)
    assert first["passes"]["sft/retain"]["backwards"] == 3
    assert first["passes"]["ctrap/collapse"]["backwards"] == 3
    assert first["last"]["ctrap/collapse"] > 0
    written = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(written.read_text())["method"]["parts"]["ctrap"]["harmful_rows"] == 10
    again = go(tmp_path / "second", written)
    assert again["last"] == first["last"]


class OneShot(METHODS.load("sft")):
    one_shot = True

    def prepare(self, context):
        with torch.no_grad():
            context.space.tensors[0].add_(1.0)
        return {"moved": 1.0}

    def step(self, context):
        raise AssertionError("a one-shot method takes no steps")


def test_a_one_shot_member_works_first_and_takes_no_step(monkeypatch):
    load = METHODS.load
    monkeypatch.setattr(METHODS, "load", lambda name: OneShot if name == "shot" else load(name))
    kind = module.composed("shot+sft")
    method = kind(kind.config_class())
    model = tiny_llama()
    before = weights_of(model)[0].detach().clone()
    _, terms, context, prepared = step_of(method, model)
    assert prepared == {"shot/moved": 1.0}
    assert torch.equal(weights_of(model)[0], before + 1)
    assert set(terms) == {"sft/retain"}
    assert method.passes_per_step == 1
    assert context.oracle.backwards == 1
    for name, options, message in [
        ("sft+shot", {}, "stands after sft"),
        ("shot+sft", {"weights": {"shot": 0.5}}, "no gradient to weigh"),
        ("shot+sft", {"weights": {"sft": 0}}, "no member takes a step"),
    ]:
        kind = module.composed(name)
        with pytest.raises(InputError, match=message):
            kind(from_mapping(kind.config_class, options, where="run.yaml"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seam+sff", {}, "did you mean 'sft'"),
        ("seam+", {}, "unknown method ''"),
        ("seam+sft", {"parts": {"ctrap": {}}}, "parts names 'ctrap'"),
        ("seam+sft", {"parts": {"seam": {"batch_sise": 3}}}, "parts.seam: .*did you mean"),
        ("seam+sft", {"parts": {"seam": {"batch_size": 0}}}, "parts.seam: batch_size"),
        ("seam+sft", {"parts": {"seam": 3}}, "parts: .*'seam': 3"),
        ("seam+sft", {"weights": {"seam": -1}}, "weights: .*-1"),
        ("seam+sft", {"weights": {"seam": "much"}}, "weights: .*'much'"),
        ("seam+sft", {"weights": {"seam": 0, "sft": 0}}, "no member takes a step"),
        ("seam+sft", {"turns": {"sft": 2}}, "in a sum"),
        ("seam+sft", {"combine": "alternate", "turns": {"sft": 0}}, "turns: .*0"),
        ("seam+sft", {"combine": "product"}, "combine"),
    ],
)
def test_compositions_that_make_no_sense_are_refused(name, options, message):
    def read():
        from_mapping(METHODS.load(name).config_class, options, where="run.yaml: method")

    with pytest.raises(InputError, match=message):
        read()


def test_a_member_without_a_step_is_refused():
    method = made("sft+ctrap", combine="sequence", turns={"sft": 100})
    with pytest.raises(InputError, match="none for ctrap"):
        method.prepare(tiny_context(tiny_llama()))


def test_a_composition_says_what_its_members_are():
    kind = METHODS.load("ctrap+seam+ctrap")
    assert issubclass(kind, Method)
    assert kind.name == "ctrap+seam+ctrap"
    assert kind.paper == "arXiv 2505.16559 + arXiv 2505.12186"
    assert kind.config_class.members == {"ctrap": "ctrap", "seam": "seam", "ctrap_2": "ctrap"}
