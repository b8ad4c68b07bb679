"""A stream that is missing, empty or without answers is refused before any work."""

import dataclasses

import pytest

from mithridate.errors import InputError
from mithridate.methods.repnoise import RepNoise, RepNoiseConfig
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.training import TrainingConfig, immunise
from tests.methods.every import EVERY
from tests.tiny import tiny_context, tiny_examples, tiny_llama, tiny_tokenizer

CASES = [
    (name, stream) for name, make in EVERY.items() if " " not in name for stream in make().streams
]


@pytest.mark.parametrize("how", ["missing", "empty", "without answers"])
@pytest.mark.parametrize(("name", "stream"), CASES)
def test_a_stream_that_gives_nothing_is_refused(name, stream, how, tmp_path):
    examples = tiny_examples()
    if how == "missing":
        del examples[stream]
    elif how == "empty":
        examples[stream] = []
    elif stream == "prompts":
        pytest.skip("its answers are not read")
    else:
        examples[stream] = [dataclasses.replace(row, answer="") for row in examples[stream]]
    method, folder, model = EVERY[name](), tmp_path / "run", tiny_llama()
    config = TrainingConfig(steps=1, save_every=0, learning_rate=1e-3)
    with pytest.raises(
        InputError, match="no answer to learn|text is empty" if "answers" in how else stream
    ):
        immunise(model, tiny_tokenizer(), examples, method, config, folder)
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("stream", ["harmful", "refusal"])
@pytest.mark.parametrize(
    "method",
    [
        SEAM(SEAMConfig(answer_mask="difference", refusal_weight=0.0)),
        RepNoise(RepNoiseConfig(answer_mask="difference")),
    ],
)
def test_a_mask_that_needs_a_stream_says_so(method, stream):
    context = tiny_context(tiny_llama())
    del context.examples[stream]
    with pytest.raises(InputError, match="no harmful prompt has a refusal"):
        method.prepare(context)
