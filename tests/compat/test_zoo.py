"""The tiny models answer, are small, and load again from what they save."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compat.zoo import FAMILIES, MULTIMODAL, save_zoo, zoo_model, zoo_multimodal


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_again_it_gives_the_same_logits(family, tmp_path):
    model = zoo_model(family)
    assert model.num_parameters() < 150_000
    loaded = AutoModelForCausalLM.from_pretrained(save_zoo(family, tmp_path), dtype=torch.float32)
    ids = torch.arange(3, 17).reshape(2, 7)
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits
    torch.testing.assert_close(before, after)
    assert not torch.equal(before[0], before[1])


@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_models_have_a_vision_tower(family):
    assert any(
        "vision" in name or "visual" in name
        for name, _ in zoo_multimodal(family).named_parameters()
    )
