"""Arithmetic on trainable weights: exact restores, float64 reductions, ties counted once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mithridate.errors import InputError
from mithridate.weights import WeightSpace, dot, norm
from mithridate.weights.arithmetic import bound_, gram, scale_
from tests.tiny import LORA, tiny_llama, tiny_model

numbers = st.floats(-1e4, 1e4, width=32)
shapes = st.sampled_from([(1,), (3,), (2, 3), (4, 1, 2)])


class BodyError(Exception):
    pass


def space_of(data, dtype=torch.float32, tensors=2):
    module = nn.Module()
    for index in range(tensors):
        shape = data.draw(shapes)
        count = math.prod(shape)
        values = data.draw(st.lists(numbers, min_size=count, max_size=count))
        module.register_parameter(
            f"w{index}", nn.Parameter(torch.tensor(values, dtype=dtype).reshape(shape))
        )
    return WeightSpace(module)


def direction_of(data, space):
    return [
        torch.tensor(
            data.draw(st.lists(numbers, min_size=p.numel(), max_size=p.numel())), dtype=p.dtype
        ).reshape(p.shape)
        for p in space.tensors
    ]


def bits(tensors):
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), coefficients=st.lists(numbers, min_size=1, max_size=3), raises=st.booleans())
def test_shifted_restores_every_bit_also_when_the_body_raises(data, coefficients, raises):
    space = space_of(data)
    terms = [(c, direction_of(data, space)) for c in coefficients]
    before = bits(space.tensors)
    expected = [p.detach().double() for p in space.tensors]
    sizes = [p.abs() for p in expected]
    for c, gradient in terms:
        expected = [p + c * g.double() for p, g in zip(expected, gradient, strict=True)]
        sizes = [size + (c * g.double()).abs() for size, g in zip(sizes, gradient, strict=True)]
    try:
        with space.shifted(*terms):
            for p, wanted, size in zip(space.tensors, expected, sizes, strict=True):
                # Terms may cancel: the rounding is that of the largest, not of the sum. Below the
                # smallest normal number it is absolute.
                assert ((p.detach() - wanted).abs() <= 1e-6 * size + 1e-44).all()
            if raises:
                raise BodyError
    except BodyError:
        assert raises
    assert same_bits(bits(space.tensors), before)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_kept_restores_whatever_happened_inside(data):
    space = space_of(data)
    before = bits(space.tensors)

    def spoil():
        with space.kept() as saved:
            assert same_bits(bits(saved), before)
            for p in space.tensors:
                p.data.fill_(math.nan)
            raise BodyError

    with pytest.raises(BodyError):
        spoil()
    assert same_bits(bits(space.tensors), before)


def test_kept_returns_negative_zero_and_nan_payloads():
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.tensor([-0.0, math.nan, math.inf, 1e-45])))
    space = WeightSpace(module)
    before = bits(space.tensors)
    with space.shifted((1.0, [torch.ones(4)])):
        pass
    assert same_bits(bits(space.tensors), before)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_dot_and_norm_are_those_of_float64(data):
    space = space_of(data)
    a, b = direction_of(data, space), direction_of(data, space)
    expected = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    assert dot(a, b) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert norm(a) == pytest.approx(math.sqrt(dot(a, a)))
    assert gram(a, b) == pytest.approx((dot(a, a), expected, dot(b, b)), rel=1e-12, abs=1e-12)


def test_dot_keeps_what_float32_sums_lose():
    ones = [torch.full((1 << 23,), 1.0), torch.tensor([2.0**-24])]
    assert dot(ones, ones) == 2.0**23 + 2.0**-48


@settings(max_examples=30, deadline=None)
@given(data=st.data(), limit=st.floats(0.1, 100))
def test_bound_limits_the_norm_and_leaves_short_gradients_alone(data, limit):
    gradient = direction_of(data, space_of(data))
    before = [tensor.clone() for tensor in gradient]
    size = bound_(gradient, limit)
    assert norm(gradient) <= limit * (1 + 1e-5)
    if size <= limit:
        assert all(torch.equal(a, b) for a, b in zip(gradient, before, strict=True))


def test_exchanged_weights_stand_in_place_without_a_copy():
    space = WeightSpace(nn.Linear(3, 1))
    own = [p.data_ptr() for p in space.tensors]
    others = [torch.full((1, 3), 2.0), torch.ones(1)]
    theirs = [tensor.data_ptr() for tensor in others]
    with space.exchanged(others):
        assert [p.data_ptr() for p in space.tensors] == theirs
        assert [tensor.data_ptr() for tensor in others] == own
    assert [p.data_ptr() for p in space.tensors] == own
    assert [tensor.data_ptr() for tensor in others] == theirs


def test_travel_is_the_distance_from_the_start():
    space = WeightSpace(nn.Linear(3, 1))
    start = space.snapshot()
    with space.shifted((2.0, [torch.ones(1, 3), torch.ones(1)])):
        assert space.travel(start) == pytest.approx(4.0)
    assert space.travel(start) == 0.0


def test_tied_weights_are_counted_and_moved_once():
    model = tiny_llama()
    space = WeightSpace(model)
    names = [name for name in space.names if "embed" in name or "lm_head" in name]
    assert len(names) == 1
    assert space.count == sum(p.numel() for p in model.parameters())
    before = model.lm_head.weight.detach().clone()
    with space.shifted((1.0, [torch.ones_like(p) for p in space.tensors])):
        assert torch.equal(model.lm_head.weight, before + 1)
        assert torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


def test_only_the_adapter_is_in_the_space_of_a_lora_model():
    model = tiny_model(LORA)
    space = WeightSpace(model)
    assert all("lora_" in name for name in space.names)
    assert space.bytes == space.count * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_refused_by_name(dtype):
    model = nn.Linear(2, 2)
    model.weight.data = model.weight.data.to(dtype)
    with pytest.raises(InputError, match=r"half precision \(first: weight\)"):
        WeightSpace(model)


def test_a_frozen_half_precision_base_is_allowed():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2))
    assert WeightSpace(model).count == 6


def test_nothing_trainable_is_refused():
    with pytest.raises(InputError, match="no trainable weights"):
        WeightSpace(nn.Linear(2, 2).requires_grad_(False))


def test_gradients_are_taken_and_given_without_copies():
    space = WeightSpace(nn.Linear(2, 1))
    given_ = [torch.ones(1, 2), torch.ones(1)]
    space.give_gradient(given_)
    scale_(space.gradient(), 3.0)
    assert float(given_[0].sum()) == 6.0
    taken = space.take_gradient()
    assert taken[0].data_ptr() == given_[0].data_ptr()
    assert all(p.grad is None for p in space.tensors)
    assert all(float(gradient.abs().sum()) == 0 for gradient in space.gradient())
