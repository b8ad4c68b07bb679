"""Model folders with one thing changed at random: they load, or are an input error, in time."""

from __future__ import annotations

import json
import shutil
import signal
import time
from random import Random

import pytest
import torch

from mithridate import models
from mithridate.errors import InputError
from tests.training.tiny_world import tiny_model, tiny_tokenizer

SECONDS = 20
"""Most that one folder may take, on a busy machine; one takes a twentieth of a second."""

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**3, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -0.5,
    float("nan"), float("inf"), 1e300, "", "0", "x", "\ud800", "../..", "/etc/passwd", "float16",
    "{{ 1 }}", "a" * 10**5, [], {}, [0], ["x"], {"x": 1}, [[]], [10**9] * 3, {"a": {"b": []}},
    "<end>", "LlamaForCausalLM", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "gemma3",
]  # fmt: skip
KEYS = [
    "quantization_config", "auto_map", "text_config", "vision_config", "rope_parameters",
    "rope_scaling", "layer_types", "architectures", "is_encoder_decoder", "head_dim",
    "transformers_weights", "sliding_window", "dtype", "torch_dtype", "num_experts",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def spots(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        rows = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(rows)[:60]:
            yield from spots(inner, (*path, key))


def change_json(path, rng):
    value = json.loads(path.read_text())
    place = rng.choice([place for place in spots(value) if place])
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    how = rng.choice(["value", "value", "value", "delete", "new", "nest"])
    if how == "value":
        holder[place[-1]] = rng.choice(VALUES)
    elif how == "delete":
        del holder[place[-1]]
    elif how == "nest":
        inner = holder[place[-1]]
        holder[place[-1]] = rng.choice([[[inner]], {"x": inner}, str(inner)])
    elif isinstance(value, dict):
        value[rng.choice(KEYS)] = rng.choice(VALUES)
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    return how, place


def change_bytes(path, rng):
    content = bytearray(path.read_bytes())
    how = rng.choice(["cut", "flip", "flip head", "delete", "empty", "double", "folder"])
    if how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "double":
        content *= 2
    elif how == "empty":
        content.clear()
    else:
        most = min(len(content), 200) if how == "flip head" else len(content)
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(most)] ^= 1 << rng.randrange(8)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "delete":
        path.write_bytes(content)
    return how


def try_folder(folder):
    """Load it within the time, and say what came of it."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    start, told = time.perf_counter(), ""
    try:
        model, tokenizer = models.load(str(folder))
    except InputError as error:
        told = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    # What the alarm raises may come back as an input error.
    assert time.perf_counter() - start < SECONDS - 1, f"slow: {told}"
    assert len(told) < 1500
    if told:
        return "refused"
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    return "loaded"


def fuzz(whole, folder, seeds):
    outcomes = []
    for seed in seeds:
        rng = Random(f"model folder {seed}")
        shutil.copytree(whole, folder)
        path = rng.choice(sorted(folder.iterdir()))
        how = ""
        try:
            if path.suffix == ".json" and rng.random() < 0.75:
                how = change_json(path, rng)
            else:
                how = change_bytes(path, rng)
            outcomes.append(try_folder(folder))
        except BaseException as error:
            error.add_note(f"seed {seed}: {path.name}: {how}")
            raise
        shutil.rmtree(folder)
    return outcomes


def test_a_share_of_changed_folders(whole, tmp_path):
    outcomes = fuzz(whole, tmp_path / "m", range(60))
    assert {"loaded", "refused"} == set(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_changed_folders(whole, tmp_path, part):
    fuzz(whole, tmp_path / "m", range(100 + 200 * part, 300 + 200 * part))
