"""A testbed that takes no time: a random model, its streams, no attack worth the name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from tests.tiny import tiny_examples, tiny_llama, tiny_tokenizer


def tiny_bed(folder: Path, name: str = "tiny"):
    place = folder / "tiny-aligned"
    if not place.exists():
        tiny_llama(dtype=torch.float32).save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    examples = tiny_examples()
    return SimpleNamespace(
        name=name,
        data=SimpleNamespace(defence=examples, attack=examples["harmful"], hashes={}),
        attack_preset=SimpleNamespace(examples=8),
        aligned_model=lambda: place,
        filtered_model=lambda: None,
    )
