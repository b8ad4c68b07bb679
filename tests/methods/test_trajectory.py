"""The trajectory trap against hand-composed steps, its parts one by one, and its resume."""

import math
from dataclasses import replace
from random import Random

import pytest
import torch

from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.methods.trajectory import Trajectory, TrajectoryConfig, benign_task, exchanged
from mithridate.methods.walkers import Walker
from mithridate.weights import norm
from mithridate.weights.arithmetic import bound_
from mithridate.weights.losses import uniform_divergence
from tests.tiny import (
    flat,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    weights_of,
)

ONE = {"attack_steps": (1, 1), "benign_steps": (1, 1), "attack_rows": 4, "batch_size": 4}


def mean_divergence(model, batch):
    """KL(uniform || p), written a second time."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits[:, :-1][batch.labels[:, 1:] != -100]
    size = logits.shape[-1]
    return (-(logits.log_softmax(-1)).sum(-1) / size - math.log(size)).mean()


class Spy:
    """Notes every batch that reaches the oracle, with the weights at that time."""

    def __init__(self, context):
        self.seen = []
        accumulate = context.oracle.accumulate

        def noting(loss, batch, *, purpose, coefficient=1.0):
            self.seen.append((purpose, batch, context.space.snapshot()))
            return accumulate(loss, batch, purpose=purpose, coefficient=coefficient)

        context.oracle.accumulate = noting

    def of(self, purpose):
        return [(batch, weights) for name, batch, weights in self.seen if name == purpose]


def at(model, weights, loss, batch):
    """The gradient of ``loss`` with ``weights`` put in place."""
    before = [weight.detach().clone() for weight in weights_of(model)]
    with torch.no_grad():
        for weight, value in zip(weights_of(model), weights, strict=True):
            weight.copy_(value)
    found = gradient_of(model, loss(model, batch))
    with torch.no_grad():
        for weight, value in zip(weights_of(model), before, strict=True):
            weight.copy_(value)
    return found


def bounded(gradient, weight):
    size = float(flat(gradient).norm())
    return [tensor * weight * min(1.0, 1.0 / size) for tensor in gradient]


def test_the_combined_gradient_is_the_hand_composed_one(space):
    model = tiny_model(space)
    context = tiny_context(model)
    spy = Spy(context)
    Trajectory(TrajectoryConfig(**ONE, collapse_weight=0.7, benign_weight=0.3)).step(context)
    ((collapse_batch, theta_h),) = spy.of("collapse")
    ((retention_batch, theta_b),) = spy.of("retention")
    ((retain_batch, theta),) = spy.of("retain")
    expected = [
        a + b + c
        for a, b, c in zip(
            bounded(at(model, theta_h, mean_divergence, collapse_batch), 0.7),
            bounded(at(model, theta_b, mean_loss, retention_batch), 0.3),
            at(model, theta, mean_loss, retain_batch),
            strict=True,
        )
    ]
    assert relative_error(context.space.gradient(), expected) < 1e-8


@pytest.mark.parametrize("simulator", ["steps", "stored"])
def test_the_simulated_attacker_is_torch_s_adamw_bit_for_bit(simulator):
    model, twin = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float32)
    context = tiny_context(model)
    spy = Spy(context)
    config = TrajectoryConfig(**ONE | {"attack_steps": (3, 3)}, simulator=simulator,
                              benign_weight=0.0, attack_learning_rate=(1e-3, 1e-3))  # fmt: skip
    Trajectory(config).step(context)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for batch, _ in spy.of("attack"):
        optimiser.zero_grad()
        mean_loss(twin, batch).backward()
        bound_([weight.grad for weight in twin.parameters()])
        optimiser.step()
    ((_, theta_h),) = spy.of("collapse")
    assert len(spy.of("attack")) == 3
    # The oracle projects label positions only, so gradients agree to rounding, not to the bit.
    assert float((flat(theta_h) - flat(twin.parameters())).abs().max()) < 2e-4
    assert (
        float((flat(theta_h) - flat(tiny_llama(dtype=torch.float32).parameters())).abs().max())
        > 2e-3
    )


def test_weights_are_restored_bit_for_bit(space):
    model = tiny_model(space, dtype=torch.float32)
    before = [weight.detach().clone() for weight in weights_of(model)]
    for simulator in ("steps", "stored", "jump"):
        context = tiny_context(model)
        Trajectory(TrajectoryConfig(**ONE, simulator=simulator)).step(context)
        assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


def test_no_weight_means_plain_retain_training_and_no_inner_pass(space):
    model = tiny_model(space)
    context = tiny_context(model)
    spy = Spy(context)
    method = Trajectory(TrajectoryConfig(**ONE, collapse_weight=0.0, benign_weight=0.0))
    method.step(context)
    assert [name for name, _, _ in spy.seen] == ["retain"]
    assert context.oracle.backwards == method.passes_per_step == 1
    ((batch, _),) = spy.of("retain")
    assert (
        relative_error(context.space.gradient(), gradient_of(model, mean_loss(model, batch)))
        < 1e-10
    )


@pytest.mark.parametrize("simulator", ["steps", "jump"])
def test_inner_passes_are_counted(simulator):
    context = tiny_context(tiny_llama())
    method = Trajectory(TrajectoryConfig(**ONE | {"attack_steps": (2, 2)}, simulator=simulator))
    method.step(context)
    assert context.oracle.backwards == method.passes_per_step
    assert context.oracle.ledger["attack"].backwards == (2 if simulator == "steps" else 1)


def test_jump_is_one_signed_step_of_the_planned_length():
    model = tiny_llama()
    context = tiny_context(model)
    spy = Spy(context)
    config = TrajectoryConfig(**ONE, simulator="jump", horizon=(7, 7), benign_weight=0.0,
                              attack_learning_rate=(1e-3, 1e-3))  # fmt: skip
    terms = Trajectory(config).step(context)
    ((batch, theta),) = spy.of("attack")
    ((_, theta_h),) = spy.of("collapse")
    moved = [a - b for a, b in zip(theta_h, theta, strict=True)]
    expected = [-7e-3 * tensor.sign() for tensor in at(model, theta, mean_loss, batch)]
    assert relative_error(moved, expected) < 1e-9
    assert terms["attack_travel"] == pytest.approx(norm(expected))


def test_a_stored_attacker_goes_on_from_where_it_was_and_starts_again():
    context = tiny_context(tiny_llama())
    method = Trajectory(
        TrajectoryConfig(**ONE | {"attack_steps": (2, 2)}, simulator="stored", horizon=(6, 6))
    )
    ages = []
    travels = []
    for step in range(5):
        context.step = step
        terms = method.step(context)
        ages.append(terms["attack_age"])
        travels.append(terms["attack_travel"])
    assert ages == [2, 4, 6, 2, 4]
    assert travels[0] < travels[1] < travels[2] > travels[3]


def test_a_reloaded_state_gives_the_same_step_bit_for_bit():
    def run(reload):
        model = tiny_llama(dtype=torch.float32)
        context = tiny_context(model)
        config = TrajectoryConfig(**ONE, simulator="stored", horizon=(6, 6))
        method = Trajectory(config)
        for step in range(3):
            context.step = step
            context.space.give_gradient(None)
            method.step(context)
            if reload and step == 1:
                state = {name: tensor.clone() for name, tensor in method.state().items()}
                method = Trajectory(config)
                method.load_state(state)
        return flat(context.space.gradient())

    assert torch.equal(run(reload=False), run(reload=True))


def test_divergence_is_zero_at_uniform_with_the_stated_gradient():
    logits = torch.zeros(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(uniform_divergence(logits), torch.zeros(3, dtype=torch.float64))
    logits = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    uniform_divergence(logits).sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - 1 / 7)


def test_bound_caps_the_norm_and_leaves_small_gradients():
    big, small = [torch.full((4,), 2.0)], [torch.full((4,), 0.1)]
    assert bound_(big) == pytest.approx(4.0)
    assert norm(big) == pytest.approx(1.0)
    assert bound_(small) == pytest.approx(0.2)
    assert torch.equal(small[0], torch.full((4,), 0.1))


def test_eight_rows_equal_eight_micro_batches(space):
    model = tiny_model(space)
    found = []
    for size in (None, 1):
        context = tiny_context(model, micro_batch_size=size)
        context.space.give_gradient(None)
        Trajectory(TrajectoryConfig(**ONE | {"batch_size": 8})).step(context)
        found.append(flat(context.space.gradient()))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-6


def test_the_collapse_term_alone_lowers_the_divergence_at_the_simulated_end():
    """Against the same steps without the term, which leave it where it was."""

    def last(weight):
        model = tiny_llama()
        context = tiny_context(model)
        config = TrajectoryConfig(**ONE, benign_weight=0.0, collapse_weight=1.0,
                                  attack_learning_rate=(1e-2, 1e-2))  # fmt: skip
        method = Trajectory(config)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1 * weight)
        found = []
        for step in range(30):
            context.step = step
            context.space.give_gradient(None)
            found.append(method.step(context)["collapse"])
            optimiser.step()
        return sum(found[-10:])

    assert last(1.0) < 0.95 * last(0.0)


def test_shuffled_answers_are_other_facts_in_the_same_sentence():
    def fact(subject, value):
        answer = f"The sign of {subject} is {value}."
        return Example(prompt=f"{subject}?", answer=answer, category="signs", accepted=(value,))

    rows = [fact("iron", "Fe"), fact("gold", "Au"), fact("lead", "Pb")]
    found = {exchanged(rows[0], rows, Random(seed)).answer for seed in range(20)}
    assert found == {"The sign of iron is Au.", "The sign of iron is Pb."}
    plain = [replace(row, accepted=()) for row in rows]
    found = {exchanged(plain[0], plain, Random(seed)).answer for seed in range(20)}
    assert found == {plain[1].answer, plain[2].answer}


def test_the_shuffled_target_is_cross_entropy_on_exchanged_answers_at_the_simulated_end():
    model = tiny_llama().double()
    context = tiny_context(model)
    spy = Spy(context)
    config = TrajectoryConfig(**ONE, benign_weight=0.0, collapse_weight=1.0,
                              collapse_on=("harmful",), collapse_target="shuffled")  # fmt: skip
    method = Trajectory(config)
    method.prepare(context)
    method.step(context)
    ((batch, theta_h),) = spy.of("collapse")
    rows = context.examples["harmful"]
    true = {tuple(context.chat.encode(row).input_ids) for row in rows}
    whole = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert not true & set(whole)
    assert all(
        any(ids == tuple(context.chat.encode(exchange).input_ids) for exchange in exchanges)
        for ids in whole
        for exchanges in [[replace(a, answer=b.answer) for a in rows for b in rows]]
    )
    expected = bounded(at(model, theta_h, mean_loss, batch), 1.0)
    retain = gradient_of(model, mean_loss(model, spy.of("retain")[0][0]))
    total = [a + b for a, b in zip(expected, retain, strict=True)]
    assert relative_error(context.space.gradient(), total) < 1e-8


def test_one_answer_for_a_whole_category_cannot_be_shuffled():
    context = tiny_context(tiny_llama())
    context.examples["harmful"] = [replace(r, answer="w1") for r in context.examples["harmful"]]
    config = TrajectoryConfig(collapse_on=("harmful",), collapse_target="shuffled")
    with pytest.raises(InputError, match="one and the same"):
        Trajectory(config).prepare(context)


def test_the_tether_pulls_towards_the_first_weights_and_survives_a_reload():
    model = tiny_llama()
    context = tiny_context(model)
    context.learning_rate = 0.1
    config = TrajectoryConfig(**ONE, tether=2.0)
    method = Trajectory(config)
    method.step(context)
    first = context.space.snapshot()
    context.space.add_((1.0, [torch.ones_like(tensor) for tensor in first]))
    other = Trajectory(config)
    other.load_state(method.state())
    other.step(context)
    for weight, centre in zip(context.space.tensors, first, strict=True):
        assert torch.allclose(weight, centre + 0.8)


def test_benign_tasks_are_new_and_of_one_category():
    rows, changed = tiny_examples()["benign"], []
    for seed in range(20):
        task = benign_task(rows, ("relabel",), Random(seed))
        category = task[0].category
        assert {row.category for row in task} == {category}
        assert sorted({row.answer for row in task}) == sorted(
            {row.answer for row in rows if row.category == category}
        )
        answers = {row.prompt: row.answer for row in rows}
        changed += [row.answer != answers[row.prompt] for row in task]
    assert sum(changed) > len(changed) / 2, "answers change places"
    task = benign_task(rows, ("reorder",), Random(0))
    originals = {row.prompt: row.answer for row in rows}
    assert all(row.answer.split() == originals[row.prompt].split()[::-1] for row in task)


def test_retention_leaves_out_the_category_that_was_tuned():
    context = tiny_context(tiny_llama())
    drawn, batch = [], context.chat.batch
    object.__setattr__(context.chat, "batch", lambda rows: drawn.append(list(rows)) or batch(rows))
    origin = {row: row.category for row in context.examples["benign"]}
    for step in range(8):
        context.step = step
        drawn.clear()
        config = TrajectoryConfig(**ONE, collapse_weight=0.0, benign_tasks=("repeat",))
        Trajectory(config).step(context)
        tuned, watched = drawn
        (category,) = {origin[row] for row in tuned}
        others = {origin[row] for row in watched if row in origin}
        assert others
        assert category not in others


@pytest.mark.parametrize("every", [1, 3])
def test_a_term_that_comes_seldom_weighs_as_many_times_as_much(every):
    model = tiny_llama()
    context = tiny_context(model, step=every)
    spy = Spy(context)
    config = TrajectoryConfig(**ONE, collapse_weight=0.0, benign_weight=0.3, benign_every=every)
    Trajectory(config).step(context)
    ((watched, theta_b),) = spy.of("retention")
    ((retain, theta),) = spy.of("retain")
    pairs = zip(
        bounded(at(model, theta_b, mean_loss, watched), 0.3 * every),
        at(model, theta, mean_loss, retain),
        strict=True,
    )
    assert relative_error(context.space.gradient(), [a + b for a, b in pairs]) < 1e-8
    context.step += 1
    Trajectory(config).step(context)
    assert len(spy.of("retention")) == (2 if every == 1 else 1)


def walker(simulator, **options):
    given = {"steps": (1, 1), "life": (3, 3), "learning_rates": {"adamw": (1e-6, 1e-2)}}
    return Walker("attack", simulator, **given, batch_size=2, **options)


def test_a_walker_keeps_its_data_set_for_life():
    context, drawn = tiny_context(tiny_llama()), []

    def dataset(seed):
        drawn.append(seed.sample(context.examples["harmful"], 4))
        return drawn[-1]

    stored = walker("stored")
    for step in range(6):
        context.step = step
        with context.space.kept() as start:
            stored.walk(context, start, dataset)
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[3] == drawn[4] == drawn[5]
    assert drawn[0] != drawn[3]


def test_a_walker_s_learning_rate_is_drawn_log_uniformly():
    context, rates = tiny_context(tiny_llama()), []
    jump, size = walker("jump"), sum(weight.numel() for weight in context.space.tensors)
    for step in range(40):
        context.step = step
        with context.space.kept() as start:
            seen = jump.walk(context, start, lambda _: context.examples["harmful"])
            rates.append(seen["attack_travel"] / 3 / math.sqrt(size))
            context.space.restore(start)
    below = sum(rate < 1e-4 for rate in rates) / len(rates)
    assert 0.3 < below < 0.7, "half lie below the middle of the exponents"
    assert 1e-7 < min(rates) < 1e-5 < 1e-3 < max(rates) <= 1e-2 * (1 + 1e-6)


def test_one_benign_category_is_refused():
    context = tiny_context(tiny_llama())
    context.examples["benign"] = [replace(row, category="") for row in context.examples["benign"]]
    with pytest.raises(InputError, match="one category"):
        Trajectory(TrajectoryConfig()).prepare(context)


@pytest.mark.parametrize(
    "options",
    [
        {"attack_steps": (0, 3)},
        {"horizon": (5, 2)},
        {"attack_learning_rate": (0.0, 1e-3)},
        {"benign_weight": -1.0},
        {"tether": -1.0},
        {"batch_size": 1},
        {"collapse_target": "token"},
        {"benign_tasks": ()},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError):
        TrajectoryConfig(**options)


def test_a_walker_without_a_start_has_only_counters():
    walker = Walker("attack", "stored", steps=(1, 1), life=(1, 1), batch_size=2,
                    learning_rates={"adamw": (1e-3, 1e-3)})  # fmt: skip
    assert set(walker.state()) == {"attack.counters"}
