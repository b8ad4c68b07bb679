"""Radii in merged weights, adapters as released, and weights that would round a look-ahead."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mithridate.errors import InactiveTermError, InputError
from mithridate.methods import METHODS
from mithridate.methods.booster import Booster, BoosterConfig
from mithridate.methods.ctrap import CTRAP, CTRAPConfig
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.training import TrainingConfig, immunise
from mithridate.training.lora import with_adapter_of
from mithridate.weights import GradientOracle
from mithridate.weights.merged import Merged
from tests.tiny import (
    FULL,
    LORA,
    random_direction,
    relative_error,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)

ROWS = {"harmful_rows": 4, "retain_rows": 4}
MAKE = {
    "ctrap": lambda **options: CTRAP(CTRAPConfig(**ROWS | {"collapse_rows": 4} | options)),
    "booster": lambda **options: Booster(BoosterConfig(**ROWS | options)),
}


def adapted(*, rank=2, alpha=4, targets=("q_proj", "v_proj", "embed_tokens"), fresh=False):
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    )
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.double()
            if not fresh:
                weight.data = torch.randn(weight.shape, dtype=torch.float64) * 0.3
    return model.eval()


def products(model):
    """Every layer's s B A, by hand."""
    found = []
    for module in model.modules():
        for name in module.scaling if hasattr(module, "lora_A") else ():
            if name in module.lora_A:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
            else:
                a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
            found.append(module.scaling[name] * (b @ a).detach())
    return found


def distance(before, after):
    return float(sum((x - y).square().sum() for x, y in zip(before, after, strict=True)).sqrt())


# Merged travel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank": 4, "alpha": 1}, {"fresh": True}])
@pytest.mark.parametrize("length", [1e-3, 0.5, 30.0])
def test_factors_move_until_the_merged_weights_have_travelled_so_far(options, length):
    model = adapted(**options)
    space = GradientOracle(model).space
    direction, merged = random_direction(model, 3), Merged(model, space)
    before, start = products(model), space.snapshot()
    factor = merged.reach(direction, length)
    space.add_((-factor, direction))
    assert distance(before, products(model)) == pytest.approx(length, rel=1e-9)
    assert merged.travel(start) == pytest.approx(length, rel=1e-9)
    space.restore(start)
    assert merged.distance(direction, factor) == pytest.approx(length, rel=1e-9)
    assert merged.travel(start) == 0


def test_weights_beside_the_factors_count_as_they_are():
    model = adapted(targets=("q_proj",))
    norm = model.get_base_model().model.norm.weight.requires_grad_()
    space = GradientOracle(model).space
    start, before = space.snapshot(), products(model)
    with torch.no_grad():
        for weight in weights_of(model):
            weight.add_(0.1)
    expected = (distance(before, products(model)) ** 2 + 0.01 * norm.numel()) ** 0.5
    assert Merged(model, space).travel(start) == pytest.approx(expected)


def test_a_direction_that_moves_nothing_is_no_look_ahead():
    model = adapted(fresh=True, targets=("q_proj",))
    space = GradientOracle(model).space
    # With B at zero, A alone moves nothing.
    direction = [
        torch.ones_like(w) if "lora_A" in name else torch.zeros_like(w)
        for name, w in zip(space.names, space.tensors, strict=True)
    ]
    with pytest.raises(InactiveTermError, match="does not move the merged weights"):
        Merged(model, space).reach(direction, 0.1)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("direction", ["gradient", "sign", "adam", "random"])
def test_the_radius_is_the_travel_of_the_merged_weights(name, direction, monkeypatch):
    found = {}
    for alpha in (1, 16):
        torch.manual_seed(0)
        model = adapted(alpha=alpha)
        context = tiny_context(model)
        method = MAKE[name](lookahead_radius=0.05, lookahead_direction=direction)
        method.prepare(context)
        before, seen = products(model), []
        exchange = context.space._exchange

        def noting(weights, exchange=exchange, seen=seen, model=model):
            exchange(weights)
            seen.append(products(model))

        monkeypatch.setattr(context.space, "_exchange", noting)
        terms = method.step(context)
        assert terms["radius"] == 0.05
        assert distance(before, seen[0]) == pytest.approx(0.05, rel=1e-9)
        found[alpha] = terms["radius_factors"]
    assert found[1] > 5 * found[16]


@pytest.mark.parametrize("name", MAKE)
def test_unless_given_it_is_measured_there_too(name):
    method = MAKE[name](attack_learning_rate=1e-3)
    context = tiny_context(adapted(alpha=4, fresh=True))
    found = method.prepare(context)
    assert context.oracle.ledger["radius"].backwards == 20
    elsewhere = MAKE[name](attack_learning_rate=1e-3, lookahead_radius_in="factors")
    factors = elsewhere.prepare(tiny_context(adapted(alpha=4, fresh=True)))
    assert factors["radius_low"] != pytest.approx(found["radius_low"], rel=0.1)
    terms = elsewhere.step(context)
    merged = Merged(context.oracle.model, context.space)
    assert 0 < terms["radius_merged"] != pytest.approx(terms["radius"], rel=0.1)
    assert merged.travel(context.space.snapshot()) == 0


# As released -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the look-ahead left")
@pytest.mark.parametrize("name", MAKE)
def test_released_is_planted_in_the_released_adapter(name, tmp_path):
    with pytest.warns(UserWarning, match="reproduction only"):
        method = MAKE[name](variant="released")
    assert (method.config.lookahead_radius, method.config.lookahead_radius_in) == (0.1, "factors")
    config = TrainingConfig(steps=1, save_every=0, lora_rank=8, lora_alpha=16)
    with pytest.warns(UserWarning, match="replaces lora_rank 8, lora_alpha 16$"):
        kept = with_adapter_of(method, config)
    assert (kept.lora_rank, kept.lora_alpha) == (32, 4)
    assert kept == dataclasses.replace(config, **method.adapter)
    model = tiny_llama(dtype=torch.float32)
    config = TrainingConfig(steps=1, save_every=0, learning_rate=1e-3)
    immunise(model, tiny_tokenizer(), tiny_examples(), method, config, tmp_path / "run")
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    assert '"rank": 32' in manifest
    assert '"alpha": 4' in manifest
    assert not MAKE[name]().adapter


def test_a_composition_has_the_adapter_of_its_released_member():
    kind = METHODS.load("ctrap+booster")
    with pytest.warns(UserWarning, match="reproduction only"):
        method = kind(kind.config_class(parts={"booster": {"variant": "released"}}))
    assert method.adapter["lora_rank"] == 32
    assert not kind(kind.config_class()).adapter


# Weights in half precision -----------------------------------------------------------------------


def half_base():
    model = tiny_model(LORA, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    return model


@pytest.mark.parametrize(
    "method",
    [
        *(make(lookahead_radius=0.01) for make in MAKE.values()),
        MAKE["booster"](lookahead_radius=0.01, gradient="exact"),
        SEAM(SEAMConfig(hvp="finite", epsilon=1e-3)),
        SEAM(SEAMConfig(hvp="central")),
    ],
    ids=lambda method: method.name,
)
def test_differences_on_a_half_precision_base_are_refused(method):
    with pytest.raises(InputError, match=r"stored in less than float32 \(first: "):
        method.check(half_base())
    method.check(tiny_model(FULL))
    context = tiny_context(half_base())
    with (
        pytest.raises(InputError, match="stored in less than float32"),
        context.oracle.full_precision(),
    ):
        pass


def test_without_a_difference_such_a_base_is_used():
    for method in (MAKE["ctrap"](collapse_weight=0.0), MAKE["booster"](flatness_weight=0.0)):
        method.check(half_base())
        method.step(tiny_context(half_base()))


def test_auto_products_are_exact_on_such_a_base_and_true():
    found = {}
    for name, model in (("half", half_base()), ("whole", tiny_model(LORA, dtype=torch.float32))):
        method = SEAM(SEAMConfig(coupling_weight=1.0, unlearning="none", refusal_weight=0.0))
        method.check(model)
        context = tiny_context(model)
        method.prepare(context)
        method.step(context)
        found[name] = context.space.gradient()
        assert method._coupling.hvp == ("exact" if name == "half" else "finite")
    assert relative_error(found["half"], found["whole"]) < 0.2


def test_auto_is_finite_where_the_model_cannot_be_differentiated_twice():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 1.0

    for autocast in (True, False):
        model = tiny_model(FULL, dtype=torch.float32)
        model.model.norm.register_forward_hook(lambda _m, _i, output: Once.apply(output))
        method = SEAM(SEAMConfig())
        found = method.prepare(context := tiny_context(model, autocast=autocast))
        assert method._coupling.hvp == "finite"
        assert found["fd_fidelity"] > 0.99
        method.step(context)
