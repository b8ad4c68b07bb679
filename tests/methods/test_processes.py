"""Two processes look ahead, couple and unlearn as one does (`methods.md` D1, D3)."""

import pytest
import torch

from tests.gloo import NEEDS_GLOO, on_two_processes
from tests.methods.every import EVERY, MASKED, step
from tests.tiny import relative_error


def gradients():
    steps = {name: {} for name in EVERY}
    # The first process has no row with a label.
    steps |= {f"{name}, unlabelled": {"unlabelled": 4} for name in MASKED}
    found = {}
    for name, options in steps.items():
        gradient, terms, _ = step(name.split(",")[0], micro_batch_size=4, **options)
        found[name] = [torch.zeros(()) if g is None else g for g in gradient], terms
    return found


@NEEDS_GLOO
@pytest.mark.filterwarnings("ignore:the look-ahead left")
def test_two_processes_leave_the_gradient_of_one(tmp_path):
    with on_two_processes(tmp_path, gradients, preload="tests.methods.every") as both:
        expected = gradients()
    for rank, found in enumerate(both):
        for name, (gradient, terms) in expected.items():
            assert relative_error(found[name][0], gradient) < 1e-9, (rank, name)
            assert found[name][1] == pytest.approx(terms, rel=1e-9), (rank, name)
