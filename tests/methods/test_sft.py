"""Plain SFT: the gradient of the mean loss on the retained streams, and nothing else."""

import pytest
import torch

from mithridate.errors import InputError
from mithridate.methods.base import join
from mithridate.methods.sft import SFT, SFTConfig
from tests.tiny import (
    MemoryWatch,
    flat,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_llama,
    tiny_model,
)


def test_gradient_is_that_of_the_joined_streams(space):
    model = tiny_model(space)
    context = tiny_context(model)
    terms = SFT(SFTConfig(batch_size=6)).step(context)
    batch = join([tiny_batch(2, seed=seed) for seed in (2, 3, 4)])
    loss = mean_loss(model, batch)
    assert terms["retain"] == pytest.approx(float(loss.detach()))
    assert relative_error(context.space.gradient(), gradient_of(model, loss)) < 1e-10


def test_eight_rows_equal_eight_micro_batches(space):
    model = tiny_model(space)
    found = []
    for size in (None, 1):
        context = tiny_context(model, micro_batch_size=size)
        context.space.give_gradient(None)
        SFT(SFTConfig(batch_size=8)).step(context)
        found.append(flat(context.space.gradient()))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-9


def test_one_pass_and_no_buffer():
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    method = SFT(SFTConfig(batch_size=3))
    context.space.gradient()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == 1
    assert method.parameter_buffers == 0
    assert watch.peak < 0.5 * context.space.bytes


def test_a_stream_without_rows_is_refused():
    with pytest.raises(InputError, match="gives some of the 3 streams no row"):
        SFTConfig(batch_size=2)


def test_rows_of_a_method_s_own_stream_depend_on_the_step_alone():
    context = tiny_context(tiny_llama())
    drawn = []
    for step in range(6):
        context.step = step
        drawn.append(context.rows_of_step(9, 3, "x"))
    context.step = 4
    assert context.rows_of_step(9, 3, "x") == drawn[4]
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(9))
    assert drawn[:3] != drawn[3:]
