"""TAR: the oracle tests of `methods.md` §11."""

import json
import math
from collections import Counter

import pytest
import torch
from torch.func import functional_call

from mithridate.chat import IGNORE
from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.examples import Example
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from mithridate.methods.adapter import Adapter, adaptable
from mithridate.methods.adversaries import Adversary
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.methods.tar import TAR, TARConfig
from mithridate.weights import arithmetic
from tests.tiny import (
    LORA,
    MemoryWatch,
    flat,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)

RATE = 0.05
SGD = {"optimiser": "sgd", "learning_rates": [RATE], "max_grad_norm": 0.0}
ADAMW = {"learning_rates": [RATE], "max_grad_norm": 0.0}


def method_for(**options):
    defaults = {
        "batch_size": 4,
        "inner_steps": 1,
        "evaluate_every": 1,
        "adversaries": (SGD,),
        "distance_weight": 0.0,
    }
    return TAR(from_mapping(TARConfig, defaults | options, where="run.yaml"))


def same_harm(context):
    """Make every harmful row the same, so that no draw matters; return it."""
    row = context.examples["harmful"][1]
    context.examples["harmful"] = [row] * 8
    return row


def step_of(method, model, *, alike=True, shift=0.0, **options):
    context = tiny_context(model, **options)
    if alike:
        same_harm(context)
    context.space.give_gradient(None)
    method.prepare(context)
    if shift:
        move(model, shift)
    terms = method.step(context)
    return [tensor.clone() for tensor in context.space.gradient()], terms, context


def move(model, size):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in weights_of(model):
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * size)


def outputs(model, weights, batch, **options):
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return functional_call(
        model,
        dict(zip(names, weights, strict=True)),
        (),
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **options},
    )


def mean_entropy(model, weights, batch, wanted=None):
    logits = outputs(model, weights, batch).logits
    labelled = batch.labels[:, 1:] != IGNORE
    rows = logits[:, :-1][labelled] if wanted is None else logits[wanted]
    return torch.distributions.Categorical(logits=rows).entropy().mean()


def uninformed(model, weights, batch, factor=-4.0, wanted=None):
    """The gradient of factor * mean entropy at ``weights``."""
    there = [weight.detach().clone().requires_grad_() for weight in weights]
    entropy = mean_entropy(model, there, batch, wanted)
    return list(torch.autograd.grad(factor * entropy, there)), float(entropy.detach())


def total(*gradients):
    return [sum(parts) for parts in zip(*gradients, strict=True)]


@pytest.mark.parametrize("mask", ["label", "all"])
def test_one_sgd_step_is_the_hand_made_composition(space, mask):
    model = tiny_model(space)
    found, terms, context = step_of(method_for(tamper_mask=mask), model)
    row = context.examples["harmful"][0]
    attacked, held_out = context.chat.batch([row] * 4), context.chat.batch([row] * 4)
    g = gradient_of(model, mean_loss(model, attacked))
    there = [w.detach() - RATE * d for w, d in zip(weights_of(model), g, strict=True)]
    wanted = held_out.attention_mask.bool() if mask == "all" else None
    tamper, entropy = uninformed(model, there, held_out, wanted=wanted)
    retain = gradient_of(model, mean_loss(model, tiny_batch(4, seed=4)))
    assert relative_error(found, total(tamper, retain)) < 1e-8
    assert terms["tamper"] == pytest.approx(-entropy)
    assert terms["attack"] == pytest.approx(float(mean_loss(model, attacked).detach()))
    assert terms["travel"] == pytest.approx(RATE * float(flat(g).norm()))


@pytest.mark.parametrize("kind", ["norm", "squared"])
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_distance_is_from_the_hidden_states_of_the_aligned_model(space, kind, micro_batch_size):
    model = tiny_model(space)
    aligned = [weight.detach().clone() for weight in weights_of(model)]
    method = method_for(
        tamper_weight=0.0, retain_weight=0.7, distance_weight=0.3, retain_distance=kind
    )
    found, terms, context = step_of(method, model, shift=0.05, micro_batch_size=micro_batch_size)
    batch = tiny_batch(4, seed=4)
    real = batch.attention_mask.bool()
    here, there = (
        torch.stack(outputs(model, weights, batch, output_hidden_states=True).hidden_states)
        for weights in (weights_of(model), aligned)
    )
    squares = (here - there.detach()).square().sum(-1)[:, real]
    distance = (squares if kind == "squared" else squares.sqrt()).mean()
    expected = gradient_of(model, 0.7 * (mean_loss(model, batch) + 0.3 * distance))
    assert relative_error(found, expected) < 1e-8
    assert terms["distance"] == pytest.approx(float(distance.detach()))
    assert terms["retain"] == pytest.approx(float(mean_loss(model, batch).detach()))
    ledger = context.oracle.ledger
    passes = 1 if micro_batch_size is None else 4
    assert (ledger["reference"].forwards, ledger["reference"].backwards) == (passes, 0)
    assert (ledger["retain"].forwards, ledger["retain"].backwards) == (passes, passes)


def test_at_the_aligned_weights_the_distance_is_zero_and_so_is_its_gradient(space):
    model = tiny_model(space)
    found, terms, _ = step_of(method_for(tamper_weight=0.0, distance_weight=1.0), model)
    assert terms["distance"] == 0.0
    expected = gradient_of(model, mean_loss(model, tiny_batch(4, seed=4)))
    assert relative_error(found, expected) < 1e-12


def hand_attack(model, trained, optimiser, batch, steps, merge=lambda: None, clip=0.0):
    """Fine-tune with torch alone; return the weights after each step."""
    found = []
    for _ in range(steps):
        optimiser.zero_grad()
        merge()
        mean_loss(model, batch).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimiser.step()
        found.append([weight.detach().clone() for weight in weights_of(model)])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "sgd", "momentum": 0.9},
        {"optimiser": "adamw", "weight_decay": 0.1},
        {"optimiser": "adamw", "schedule": "linear"},
        {"optimiser": "adamw", "schedule": "cosine", "max_grad_norm": 0.5},
    ],
)
def test_every_evaluation_counts_where_torch_s_own_optimiser_has_led(space, options):
    model = tiny_model(space)
    kind = {"learning_rates": [RATE], "max_grad_norm": 0.0} | options
    method = method_for(
        inner_steps=4, evaluate_every=2, decay=0.3, retain_weight=0.0, adversaries=(kind,)
    )
    found, terms, context = step_of(method, model)
    row = context.examples["harmful"][0]
    batch = context.chat.batch([row] * 4)
    before = [weight.detach().clone() for weight in weights_of(model)]
    trained = weights_of(model)
    decay = kind.get("weight_decay", 0.0)
    groups = [
        {"params": [w for w in trained if w.ndim > 1], "weight_decay": decay},
        {"params": [w for w in trained if w.ndim == 1], "weight_decay": 0.0},
    ]
    if kind["optimiser"] == "sgd":
        optimiser = torch.optim.SGD(trained, lr=RATE, momentum=0.9)
    else:
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE)
    rates = {
        "linear": lambda step: 1 - step / 4,
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * step / 4)),
    }.get(kind.get("schedule"), lambda step: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rates)
    optimiser.register_step_post_hook(lambda *_: schedule.step())
    path = hand_attack(model, trained, optimiser, batch, 4, clip=kind["max_grad_norm"])
    with torch.no_grad():
        for weight, old in zip(weights_of(model), before, strict=True):
            weight.copy_(old)
    first, _ = uninformed(model, path[1], batch, factor=-4 * math.exp(0.3 * -2))
    last, entropy = uninformed(model, path[3], batch)
    assert relative_error(found, total(first, last)) < 1e-6
    assert terms["tamper"] == pytest.approx(-entropy)


def test_a_lora_adversary_ends_where_its_adapter_would_be_merged():
    model = tiny_llama()
    kind = {"learning_rates": [RATE], "lora_rank": 2}
    method = method_for(inner_steps=3, evaluate_every=3, retain_weight=0.0, adversaries=(kind,))
    found, _, context = step_of(method, model)
    batch = context.chat.batch([context.examples["harmful"][0]] * 4)
    seed = context.random("attack")
    seed.choice([RATE])
    adapter = Adapter(context, rank=2, seed=seed)
    start = [weight.detach().clone() for weight in weights_of(model)]
    factors = [factor.clone().requires_grad_() for factor in adapter.factors]

    def merged():
        weights = list(start)
        places = adaptable(context)
        for place, b, a in zip(places, factors[::2], factors[1::2], strict=True):
            weights[place] = start[place] + 2.0 * b @ a
        return weights

    optimiser = torch.optim.AdamW(factors, lr=RATE, weight_decay=0.0)
    for _ in range(3):
        optimiser.zero_grad()
        logits = outputs(model, merged(), batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimiser.step()
    expected, _ = uninformed(model, merged(), batch)
    assert relative_error(found, expected) < 1e-5
    assert method.parameter_buffers == 2


@pytest.mark.parametrize(("steps", "every"), [(64, 4), (8, 2), (10, 3)])
def test_the_weights_of_the_evaluations_follow_their_formula(steps, every):
    decay = 4 / steps
    config = TARConfig(inner_steps=steps, evaluate_every=every)
    weights = [config.weight(step) for step in range(1, steps + 1)]
    asked = [step for step in range(1, steps + 1) if step % every == 0]
    assert [step for step, weight in enumerate(weights, start=1) if weight] == asked
    if steps % every == 0:
        series = (1 - math.exp(-decay * steps)) / (1 - math.exp(-decay * every))
        assert sum(weights) == pytest.approx(series)
        assert weights[-1] == 1.0
    if steps == 64:
        assert 4 * sum(weights) == pytest.approx(17.8, abs=0.05)


def test_uniform_answers_have_the_least_loss_and_no_gradient():
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    kind = SGD | {"learning_rates": [1e-12]}
    found, terms, _ = step_of(method_for(adversaries=(kind,), retain_weight=0.0), model)
    assert terms["tamper"] == pytest.approx(-math.log(model.config.vocab_size))
    assert float(flat(found).norm()) < 1e-8


def test_without_tamper_weight_it_is_retain_sft_and_nothing_else(space):
    model = tiny_model(space)
    method = method_for(tamper_weight=0.0)
    found, terms, context = step_of(method, model)
    plain = tiny_context(model)
    plain.space.give_gradient(None)
    SFT(SFTConfig(batch_size=4, retain=("general",))).step(plain)
    for a, b in zip(found, plain.space.gradient(), strict=True):
        assert torch.equal(a, b)
    assert set(context.oracle.ledger) == {"retain"}
    assert set(terms) == {"retain", "retain_norm"}
    assert method.streams == ("general",)
    assert method.passes_per_step == 1
    assert method.parameter_buffers == 0


@pytest.mark.parametrize("kind", [SGD, ADAMW, {"lora_rank": 2}])
def test_weights_are_the_same_bits_after_the_step(kind):
    model = tiny_llama(dtype=torch.float32)
    before = [weight.detach().clone() for weight in weights_of(model)]
    step_of(method_for(inner_steps=3, distance_weight=1.0, adversaries=(kind,)), model)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


def test_eight_rows_equal_eight_micro_batches(space):
    model = tiny_model(space)
    options = {"batch_size": 8, "inner_steps": 2, "adversaries": (ADAMW | {"optimiser": "sgd"},)}
    whole, *_ = step_of(method_for(**options), model, alike=False)
    split, *_ = step_of(method_for(**options), model, alike=False, micro_batch_size=1)
    assert relative_error(split, whole) < 1e-9


@pytest.mark.parametrize(
    ("options", "passes", "buffers"),
    [
        ({}, 7, 4),
        ({"distance_weight": 1.0}, 7, 5),
        ({"adversaries": (SGD,)}, 7, 2),
        ({"adversaries": (SGD | {"momentum": 0.9},)}, 7, 3),
        ({"adversaries": ({"lora_rank": 1},)}, 7, 2),
        ({"evaluate_every": 3}, 5, 4),
        ({"retain_weight": 0.0}, 6, 4),
    ],
)
def test_passes_and_buffers(monkeypatch, options, passes, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    small = {"batch_size": 1, "adversary_rows": 1, "inner_steps": 3, "adversaries": (ADAMW,)}
    method = method_for(**small | options)
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    with MemoryWatch() as watch:
        method.prepare(context)
        context.oracle.ledger.clear()
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == passes
    assert method.parameter_buffers == buffers
    # The gradient itself is made inside, too.
    held = watch.peak / context.space.bytes - 1
    assert buffers - 0.5 < held < buffers + 0.7


def test_the_published_loop_is_81_passes():
    method = TAR(TARConfig())
    assert method.passes_per_step == 64 + 16 + 1
    assert method.parameter_buffers == 4 + 1
    assert set(method.streams) == {"harmful", "general", "benign"}


def rows_seen(context, monkeypatch):
    """Note the rows of every batch that is made of examples."""
    seen = []
    batch = context.chat.batch
    monkeypatch.setattr(context.chat, "batch", lambda rows: seen.append(rows) or batch(rows))
    return seen


@pytest.mark.parametrize("held_out", ["redrawn", "fixed"])
def test_held_out_rows_are_not_trained_on(monkeypatch, held_out):
    context = tiny_context(tiny_llama())
    seen = rows_seen(context, monkeypatch)
    method = method_for(inner_steps=6, evaluate_every=3, held_out=held_out, batch_size=2)
    splits = set()
    for step in range(4):
        seen.clear()
        context.step = step
        method.step(context)
        # After every third batch of the attack comes one of the held-out rows.
        held = [seen.pop(3), seen.pop(6)]
        kept, trained = ({row.prompt for rows in part for row in rows} for part in (held, seen))
        assert kept.isdisjoint(trained)
        assert (held[0] == held[1]) == (held_out == "fixed")
        splits.add(tuple(sorted(row.prompt for row in held[0])))
        assert [len(rows) for rows in seen] == [4] * 6
    assert len(splits) > 1


def by_category(**counts):
    return [
        Example(prompt=f"w{n % 40} w{n // 40}", answer="w1", category=name)
        for name, count in counts.items()
        for n in range(count)
    ]


@pytest.mark.parametrize("balanced", [True, False])
def test_a_small_category_is_both_attacked_and_held_out(monkeypatch, balanced):
    context = tiny_context(tiny_llama())
    context.examples |= {name: by_category(big=54, small=6) for name in ("harmful", "benign")}
    context.balanced = frozenset({"harmful", "benign"} if balanced else ())
    seen = rows_seen(context, monkeypatch)
    kind = SGD | {"first": "benign"}
    method = method_for(inner_steps=32, evaluate_every=16, adversaries=(kind,))
    attacked, held = Counter(), Counter()
    for step in range(4):
        seen.clear()
        context.step = step
        method.step(context)
        # After every sixteenth batch of the attack comes one of the held-out rows.
        held.update(row.category for rows in (seen.pop(16), seen.pop(32)) for row in rows)
        attacked.update(row.category for rows in seen for row in rows)
    assert attacked.total() == 4 * 32 * 4
    assert held.total() == 4 * 2 * 4
    if balanced:
        assert attacked["small"] == attacked["big"]
        assert held["small"] == held["big"]
    else:
        assert attacked["small"] / attacked.total() == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"big": 54, "small": 6}, {"big": 13, "small": 1}),
        ({"big": 8, "two": 2, "one": 1}, {"big": 2, "two": 1}),
    ],
)
def test_a_quarter_of_every_category_is_held_out_and_a_row_is_left(counts, expected):
    context = tiny_context(tiny_llama())
    context.examples["harmful"] = by_category(**counts)
    trained, held_out = method_for()._split(context)
    assert Counter(row.category for row in held_out) == expected
    assert Counter(row.category for row in trained) == Counter(counts) - Counter(expected)


def test_rows_without_a_category_or_each_of_its_own_are_split_as_one():
    context = tiny_context(tiny_llama())
    for rows in (by_category(**{"": 9}), by_category(**{f"c{n}": 1 for n in range(9)})):
        context.examples["harmful"] = rows
        trained, held_out = method_for()._split(context)
        order = context.random("held-out split").sample(rows, 9)
        assert (held_out, trained) == (order[:2], order[2:])


def test_a_switching_adversary_turns_from_benign_to_harmful_rows_once(monkeypatch):
    context = tiny_context(tiny_llama())
    seen = rows_seen(context, monkeypatch)
    kind = SGD | {"first": "benign"}
    method = method_for(inner_steps=12, evaluate_every=12, adversaries=(kind,))
    switches = []
    for step in range(6):
        seen.clear()
        context.step = step
        method.step(context)
        benign = [rows[0] in context.examples["benign"] for rows in seen[:12]]
        assert benign == sorted(benign, reverse=True)
        switches.append(sum(benign))
    # Beta(6, 3) has mean 2/3.
    assert 6 <= sum(switches) / 6 <= 10
    assert len(set(switches)) > 1


def test_a_bound_leaves_uncertain_answers_alone():
    model = tiny_llama()
    free, terms, _ = step_of(method_for(retain_weight=0.0), model)
    bounded, held, context = step_of(
        method_for(retain_weight=0.0, tamper_bound=terms["tamper"] + 0.1), model
    )
    assert float(flat(bounded).norm()) == 0 < float(flat(free).norm())
    assert held["tamper"] == pytest.approx(terms["tamper"])
    assert context.oracle.ledger["tamper bound"].backwards == 0
    below, *_ = step_of(method_for(retain_weight=0.0, tamper_bound=terms["tamper"] - 0.1), model)
    assert relative_error(below, free) < 1e-12


def test_adversaries_are_drawn_from_all_kinds_and_rates_and_repeat():
    model = tiny_llama()
    kinds = (SGD | {"learning_rates": [1e-3, 1e-1]}, {"lora_rank": 2, "learning_rates": [1e-2]})
    travels = [
        step_of(method_for(adversaries=kinds), model, step=step)[1]["travel"]
        for step in [*range(8), 0]
    ]
    assert travels[0] == travels[-1]
    # Two rates of SGD on the same rows, and adapters that begin at random.
    slow, *adapters, fast = sorted(set(travels))
    assert fast == pytest.approx(100 * slow, rel=1e-3)
    assert len(adapters) > 1


def test_in_an_adapter_the_adversaries_train_that_adapter():
    model = tiny_model(LORA)
    method = method_for(adversaries=None, inner_steps=2)
    *_, context = step_of(method, model)
    assert context.oracle.ledger["attack"].backwards == 2
    with pytest.raises(InputError, match="adapter"):
        method_for(adversaries=({"lora_rank": 4},)).prepare(context)


def test_training_keeps_answers_uncertain_after_an_attack():
    model = tiny_llama(seed=4)
    context = tiny_context(model)
    method = method_for(inner_steps=4, evaluate_every=2, adversaries=({"learning_rates": [1e-2]},))
    method.prepare(context)
    optimiser = torch.optim.AdamW(weights_of(model), lr=1e-2, weight_decay=0.0)
    history = []
    for step in range(25):
        context.step = step
        context.space.give_gradient(None)
        history.append(method.step(context))
        optimiser.step()
    early, late = (sum(row["tamper"] for row in part) / 3 for part in (history[:3], history[-3:]))
    assert late < early - 0.3
    assert history[-1]["retain"] < history[0]["retain"]


def test_a_step_without_preparation_stops_the_run():
    with pytest.raises(InactiveTermError, match="prepare"):
        method_for(distance_weight=1.0).step(tiny_context(tiny_llama()))


def test_one_harmful_row_is_refused():
    context = tiny_context(tiny_llama())
    context.examples["harmful"] = context.examples["harmful"][:1]
    with pytest.raises(InputError, match="held out"):
        method_for().prepare(context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_every": 3, "inner_steps": 2}, "finds nothing"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"tamper_weight": -1.0}, "tamper_weight: -1.0"),
        ({"tamper_weight": 0, "retain_weight": 0}, "no term of TAR is left"),
        ({"adversaries": []}, "adversaries is empty"),
        ({"adversaries": [{}, {"lora_rang": 8}]}, r"adversaries\[1\]: .*did you mean 'lora_rank'"),
        ({"adversaries": [{"learning_rates": []}]}, r"adversaries\[0\]: learning_rates"),
        ({"adversaries": [{"learning_rates": [0.0]}]}, "above 0"),
        ({"adversaries": [{"momentum": 0.9}]}, "not a momentum"),
        ({"adversaries": [{"optimiser": "adam"}]}, "optimiser: 'adam'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(TARConfig, options, where="run.yaml: method")


def test_rates_are_read_as_yaml_writes_them():
    kind = from_mapping(Adversary, {"learning_rates": ["1e-4", 1]}, where="-")
    assert kind.learning_rates == (1e-4, 1.0)


def test_the_command_runs_it_from_a_configuration(tmp_path):
    model = tmp_path / "model"
    tiny_llama(dtype=torch.float32).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    examples = tiny_examples()
    for index, name in enumerate(("harmful", "benign", "general")):
        rows = [
            {"prompt": f"w{index} {row.prompt}", "answer": row.answer} for row in examples[name]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    config = tmp_path / "run.yaml"
    config.write_text(
        "method:\n"
        "  inner_steps: 4\n"
        "  evaluate_every: 2\n"
        "  adversaries:\n"
        "    - {optimiser: sgd, learning_rates: [1e-2], first: benign}\n"
        "    - {lora_rank: 2, learning_rates: [1e-3, 1e-2], schedule: cosine}\n"
        "training: {steps: 3, learning_rate: 1e-3, autocast: true}\n"
    )
    document = run_immunisation(
        ImmunisationPlan(
            model=str(model),
            method="tar",
            streams={
                name: str(tmp_path / f"{name}.jsonl") for name in ("harmful", "benign", "general")
            },
            config=config,
            output_dir=tmp_path / "run",
        )
    )
    assert document["passes"]["attack"]["backwards"] == 3 * 4
    assert document["passes"]["tamper"]["backwards"] == 3 * 2
    assert document["last"]["tamper"] < 0 < document["last"]["distance"]
