"""Every registered method resumes bit for bit: what it keeps between steps is in its state."""

from __future__ import annotations

import pytest
import torch

from mithridate.errors import RunInterruptedError
from mithridate.methods import METHODS
from mithridate.training import TrainingConfig, immunise
from tests import tiny

CONFIG = TrainingConfig(steps=6, save_every=2, learning_rate=1e-3)
# A random model refuses nothing, and answers for as long as it may.
OPTIONS = {
    "tokenbuncher": {"min_refusal": 0.0, "response_length": 8, "batch_size": 4},
    "tar": {"inner_steps": 4},
}
STEPPING = [name for name in METHODS.names() if not METHODS.load(name).one_shot]


def go(name, folder, *, stop_at=None):
    method_class = METHODS.load(name)
    method = method_class(method_class.config_class(**OPTIONS.get(name, {})))
    step = method.step

    def stopping(context):
        terms = step(context)
        if context.step == stop_at:
            raise KeyboardInterrupt
        return terms

    method.step = stopping
    model = tiny.tiny_llama(dtype=torch.float32)
    return immunise(model, tiny.tiny_tokenizer(), tiny.tiny_examples(), method, CONFIG, folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", STEPPING)
def test_an_interrupted_run_ends_as_the_straight_one(name, tmp_path):
    straight = go(name, tmp_path / "straight")
    with pytest.raises(RunInterruptedError, match="step 4"):
        go(name, tmp_path / "stopped", stop_at=5)
    resumed = go(name, tmp_path / "stopped")
    assert resumed.history == straight.history
    for (key, a), b in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
