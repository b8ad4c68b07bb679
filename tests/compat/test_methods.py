"""Every method meets every architecture: it works, or it is refused with the reason."""

from __future__ import annotations

from contextlib import suppress

import pytest

from mithridate.errors import InputError, RunStoppedError
from tests.compat.gradients import STEPPING, step_gradient
from tests.compat.runs import OPTIONS, SPACES, family_table
from tests.compat.table import page
from tests.compat.zoo import FAMILIES, MULTIMODAL
from tests.gloo import NEEDS_GLOO, on_two_processes
from tests.tiny import relative_error

# One of each kind: plain, transposed maps, soft caps and scales, experts, recurrent, a tower.
FEW = {
    "gpt2": ("ctrap", "tvaccine"),
    "cohere": ("seam", "sdd"),
    "mixtral": ("trajectory", "lox"),
    "gpt_oss": ("sft", "repnoise"),
    "mamba": ("seam", "vaccine"),
    "recurrent_gemma": ("sft",),
    "gemma3": ("booster", "tar"),
}
# Families that compute in float32 whatever they are given: rounding, made larger by a method's own
# differences of gradients and by steps that divide by a gradient's size.
ROUNDED = {"mamba": 2e-2, "recurrent_gemma": 1e-4}
EXACT = 1e-6


@pytest.mark.parametrize("family", FEW)
def test_methods_work_or_say_why_not(family, tmp_path):
    table = family_table(family, FEW[family], tmp_path)
    faults = {place: one.reason for place, one in table.items() if one.status == "fault"}
    assert not faults
    assert any(one.status == "works" for one in table.values())
    assert all(one.reason for one in table.values() if one.status == "refused")
    assert f"`{family}`" in page({family: table}, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_every_method_works_or_says_why_not(family, tmp_path):
    table = family_table(family, OPTIONS, tmp_path)
    faults = {place: one.reason for place, one in table.items() if one.status == "fault"}
    assert not faults
    assert table["sft", "full"].status == "works"


def same_for_any_micro_batch(family, method, space, folder):
    whole, single = (
        step_gradient(family, method, space, micro_batch_size=size, output_dir=folder)
        for size in (None, 1)
    )
    assert sum(float(tensor.abs().sum()) for tensor in whole) > 0
    assert relative_error(single, whole) < ROUNDED.get(family, EXACT)


@pytest.mark.parametrize("family", FEW)
def test_micro_batches_change_nothing(family, tmp_path):
    methods = [method for method in FEW[family] if method in STEPPING]
    for method in methods if family in FAMILIES else ():
        same_for_any_micro_batch(family, method, "full", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_change_nothing_anywhere(family, space, tmp_path):
    for method in STEPPING:
        with suppress(InputError, RunStoppedError):  # what is refused is the other test's
            same_for_any_micro_batch(family, method, space, tmp_path)


def gradients(pairs, space, folder):
    """Return the gradient of each family and method, by two rows a pass; none where refused."""
    found = {}
    for family, method in pairs:
        with suppress(InputError, RunStoppedError):
            found[f"{family} {method}"] = step_gradient(
                family, method, space, micro_batch_size=2, output_dir=folder
            )
    return found


def same_on_two_processes(pairs, space, folder, seconds):
    given = (pairs, space, folder)
    with on_two_processes(
        folder, gradients, *given, preload="tests.compat.gradients", seconds=seconds
    ) as both:
        expected = gradients(*given)
    assert expected
    for rank, found in enumerate(both):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            bound = ROUNDED.get(name.split()[0], EXACT)
            assert relative_error(found[name], gradient) < bound, (rank, name)


@NEEDS_GLOO
def test_two_processes_leave_the_gradient_of_one(tmp_path):
    few = [(family, method) for family, methods in FEW.items() for method in methods]
    pairs = [one for one in few if one[0] in FAMILIES and one[1] in STEPPING]
    same_on_two_processes(pairs, "full", tmp_path, 120.0)


@NEEDS_GLOO
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_leave_the_gradient_of_one_anywhere(family, space, tmp_path):
    same_on_two_processes([(family, method) for method in STEPPING], space, tmp_path, 600.0)
