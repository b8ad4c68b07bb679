"""Hessian-vector products against autograd, and the check that tells true from void."""

import pytest
import torch
from torch import nn

from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.weights import GradientOracle, dot
from mithridate.weights.hvp import (
    STEPS,
    add_exact,
    add_far_end,
    add_finite,
    fidelity,
    gradient_with_graph,
)
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import (
    FULL,
    LORA,
    flat,
    gradient_of,
    mean_loss,
    random_direction,
    relative_error,
    tiny_batch,
    tiny_llama,
    tiny_model,
    twice_differentiable,
    weights_of,
)


@pytest.fixture(params=[FULL, LORA])
def model(request):
    return tiny_model(request.param)


def true_product(model, batch, direction):
    with twice_differentiable():
        first = gradient_of(model, mean_loss(model, batch), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
        return gradient_of(model, slope)


def product(oracle, add, batch, direction, **options):
    with oracle.fresh_gradient() as found:
        add(oracle, answer_cross_entropy, batch, [(1.0, direction)], purpose="x", **options)
    return found


@pytest.mark.parametrize("size", [None, 1])
def test_exact_product_is_autograd_s(model, size):
    oracle, batch = GradientOracle(model, micro_batch_size=size), tiny_batch()
    direction = random_direction(model, 1)
    found = product(oracle, add_exact, batch, direction)
    assert relative_error(found, true_product(model, batch, direction)) < 1e-9
    pieces = 1 if size is None else 4
    assert (oracle.ledger["x"].forwards, oracle.ledger["x"].backwards) == (pieces, 2 * pieces)


def test_direction_may_be_a_combination_and_the_result_is_added(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    a, b = random_direction(model, 1), random_direction(model, 2)
    oracle.space.give_gradient([torch.ones_like(p) for p in oracle.space.tensors])
    add_exact(
        oracle, answer_cross_entropy, batch, [(2.0, a), (-3.0, b)], coefficient=0.5, purpose="x"
    )
    joined = [2 * x - 3 * y for x, y in zip(a, b, strict=True)]
    expected = [1 + 0.5 * h for h in true_product(model, batch, joined)]
    assert relative_error(oracle.space.gradient(), expected) < 1e-9


def test_forward_error_halves_and_central_error_quarters_with_the_step(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    direction = random_direction(model, 1)
    truth = true_product(model, batch, direction)
    base, _ = oracle.gradient(answer_cross_entropy, batch, purpose="x")
    before = [p.detach().clone() for p in oracle.space.tensors]
    forward, central = [], []
    for step in (1e-3, 5e-4):
        found = product(oracle, add_finite, batch, direction, step=step, base=base)
        forward.append(relative_error(found, truth))
        found = product(oracle, add_finite, batch, direction, step=step)
        central.append(relative_error(found, truth))
    assert 1.6 < forward[0] / forward[1] < 2.4
    assert 3 < central[0] / central[1] < 5
    assert central[1] < forward[1] < 1e-2
    for p, saved in zip(oracle.space.tensors, before, strict=True):
        assert torch.equal(p, saved)


@pytest.mark.parametrize(
    ("add", "options", "backwards"),
    [(add_finite, {"step": 1e-4}, 2), (add_exact, {"coefficient": 1.0}, 2)],
)
def test_every_way_gives_one_product_at_its_price(model, add, options, backwards):
    oracle, batch = GradientOracle(model), tiny_batch()
    direction = random_direction(model, 1)
    found = product(oracle, add, batch, direction, **options)
    assert relative_error(found, true_product(model, batch, direction)) < 1e-2
    assert oracle.ledger["x"].backwards == backwards


def test_a_far_end_completes_a_difference_and_gives_its_memory_back(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    direction, step = random_direction(model, 1), 1e-4
    before = [p.detach().clone() for p in oracle.space.tensors]
    base, _ = oracle.gradient(answer_cross_entropy, batch, purpose="base")
    expected = product(oracle, add_finite, batch, direction, step=step, base=base)
    displacement = [step * tensor for tensor in direction]
    oracle.space.give_gradient([-g / step for g in base])
    add_far_end(oracle, answer_cross_entropy, batch, displacement, coefficient=1 / step,
                purpose="x")  # fmt: skip
    assert relative_error(oracle.space.gradient(), expected) < 1e-9
    assert displacement == []
    assert all(torch.equal(p, saved) for p, saved in zip(oracle.space.tensors, before, strict=True))


def test_exact_product_holds_under_autocast_where_a_difference_would_not():
    model = tiny_model(FULL, dtype=torch.float32, hidden=32)
    batch, direction = tiny_batch(), random_direction(model, 1)
    with twice_differentiable():
        truth = true_product(model, batch, direction)
    oracle = GradientOracle(model, autocast=True)
    found = product(oracle, add_exact, batch, direction)
    assert torch.cosine_similarity(flat(found), flat(truth), dim=0) > 0.98


def test_finite_difference_ignores_autocast():
    model = tiny_model(FULL, dtype=torch.float32)
    batch, direction = tiny_batch(), random_direction(model, 1)
    plain = product(GradientOracle(model), add_finite, batch, direction, step=1e-2)
    cast = product(GradientOracle(model, autocast=True), add_finite, batch, direction, step=1e-2)
    assert relative_error(cast, plain) == 0.0


class Kernel(torch.autograd.Function):
    """An operation with a first derivative only."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient


def test_a_model_without_second_derivative_is_refused():
    model = tiny_llama()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: plain(Kernel.apply(states))
    with pytest.raises(InputError, match="cannot be differentiated twice"):
        product(GradientOracle(model), add_exact, tiny_batch(), random_direction(model, 1))


def test_a_loss_that_is_linear_in_the_weights_is_not_silently_first_order():
    model = nn.Linear(3, 1, bias=False).double()
    oracle, batch = GradientOracle(model), tiny_batch()

    def loss(network, piece):
        return network(torch.ones(1, 3, dtype=torch.float64)).sum() * piece.label_count

    with pytest.raises(InactiveTermError, match="no graph"):
        add_exact(oracle, loss, batch, [(1.0, random_direction(model, 1))], purpose="x")


@pytest.mark.parametrize("exact", [True, False])
def test_fidelity_passes_in_float32(exact):
    model = tiny_model(FULL, dtype=torch.float32)
    direction = [(1.0, random_direction(model, 1))]
    oracle = GradientOracle(model, autocast=True)
    found = fidelity(oracle, answer_cross_entropy, tiny_batch(16), direction, exact=exact)
    assert found.passed
    assert not found.void
    assert found.step in STEPS
    assert 0.5 < found.moved <= 1.0
    assert found.reference == ("exact" if exact else "half step")
    # The probe is small: 64 tokens at most.
    assert oracle.ledger["fidelity"].tokens <= 64 * oracle.ledger["fidelity"].forwards


@pytest.mark.parametrize("exact", [True, False])
def test_fidelity_stops_a_run_whose_differences_are_void_and_names_the_ratios(exact):
    model = tiny_model(FULL, dtype=torch.float32)

    def rounded(network, piece):
        # As a frozen bfloat16 base does: float32 weights, passes in half precision.
        with torch.autocast("cpu", torch.bfloat16):
            return answer_cross_entropy(network, piece)

    direction = [(1.0, random_direction(model, 1))]
    with pytest.raises(RunStoppedError, match=r"void.*step 0\.0001: cosine .*norm ratio"):
        fidelity(
            GradientOracle(model),
            rounded,
            tiny_batch(16),
            direction,
            steps=(1e-3, 3e-4, 1e-4),
            exact=exact,
        )


def test_the_cosine_alone_does_not_pass():
    from mithridate.weights.hvp import Fidelity

    values = {"step": 1e-3, "moved": 0.6, "reference": "exact"}
    assert not Fidelity(cosine=0.991, ratio=1.8, **values).passed
    assert Fidelity(cosine=0.991, ratio=1.8, **values).void
    assert not Fidelity(cosine=0.95, ratio=1.0, **values).passed
    assert not Fidelity(cosine=0.95, ratio=1.0, **values).void
    assert Fidelity(cosine=1.0, ratio=1.0, **values).error == 0.0


@pytest.mark.parametrize(
    ("ratio", "passed", "void"),
    [
        (0.79, False, True), (0.8, False, False), (0.89, False, False), (0.9, True, False),
        (1.1, True, False), (1.11, False, False), (1.25, False, False), (1.26, False, True),
    ],
)  # fmt: skip
def test_the_limits_of_a_ratio_of_norms(ratio, passed, void):
    from mithridate.weights.hvp import Fidelity

    found = Fidelity(cosine=1.0, ratio=ratio, step=1e-3, moved=0.6, reference="exact")
    assert (found.passed, found.void) == (passed, void)


def test_products_are_symmetric(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    u, v = random_direction(model, 1), random_direction(model, 2)
    left = dot(u, product(oracle, add_exact, batch, v))
    assert left == pytest.approx(dot(v, product(oracle, add_exact, batch, u)), rel=1e-8)
    assert len(weights_of(model)) == len(u)


def test_a_kept_graph_gives_the_product_without_another_pass(model):
    oracle, batch, direction = GradientOracle(model), tiny_batch(), random_direction(model, 1)
    gradient, value, graph = gradient_with_graph(oracle, answer_cross_entropy, batch, purpose="g")
    again, expected = oracle.gradient(answer_cross_entropy, batch, purpose="again")
    assert relative_error(gradient, again) < 1e-9
    assert value == pytest.approx(expected, rel=1e-12)
    with oracle.space.shifted((0.3, direction)):
        # A pass elsewhere, as a look-ahead makes one, does not disturb it.
        oracle.gradient(answer_cross_entropy, tiny_batch(seed=5), purpose="elsewhere")
    found = product(oracle, add_exact, batch, direction, coefficient=0.5, graph=graph)
    assert relative_error([2 * h for h in found], true_product(model, batch, direction)) < 1e-9
    made, walked = oracle.ledger["g"], oracle.ledger["x"]
    assert (made.forwards, made.backwards, made.walks) == (1, 1, 1)
    assert (walked.forwards, walked.backwards, walked.walks, walked.tokens) == (0, 1, 2, 0)
    assert graph == []


def test_micro_batches_keep_no_graph_and_give_the_same_product(model):
    oracle = GradientOracle(model, micro_batch_size=1)
    batch, direction = tiny_batch(), random_direction(model, 1)
    _, _, graph = gradient_with_graph(oracle, answer_cross_entropy, batch, purpose="g")
    assert graph == []
    found = product(oracle, add_exact, batch, direction, graph=graph)
    assert relative_error(found, true_product(model, batch, direction)) < 1e-9
    assert (oracle.ledger["g"].forwards, oracle.ledger["x"].forwards) == (4, 4)


def test_a_kept_graph_outlives_recomputation():
    model = tiny_model(FULL)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = True
    oracle, batch, direction = GradientOracle(model), tiny_batch(), random_direction(model, 1)
    _, _, graph = gradient_with_graph(oracle, answer_cross_entropy, batch, purpose="g")
    with oracle.space.shifted((0.3, direction)):
        oracle.gradient(answer_cross_entropy, batch, purpose="elsewhere")
    found = product(oracle, add_exact, batch, direction, graph=graph)
    assert relative_error(found, true_product(tiny_model(FULL), batch, direction)) < 1e-9


def test_a_graph_of_once_differentiable_operations_is_refused():
    model = tiny_llama()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: plain(Kernel.apply(states))
    oracle, batch = GradientOracle(model), tiny_batch()
    _, _, graph = gradient_with_graph(oracle, answer_cross_entropy, batch, purpose="g")
    with pytest.raises(InputError, match="cannot be differentiated twice"):
        product(oracle, add_exact, batch, random_direction(model, 1), graph=graph)
