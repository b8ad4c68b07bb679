"""Shapes without weights: sizes as published, rows of the length asked for."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.measures.shapes import SHAPES, Shape, find_shape, random_streams
from tests.tiny import tiny_tokenizer

SIZES = {
    "lattice": (0.9e6, 1.0e6),
    "smollm2-135m": (134_515_008, 134_515_008),
    "qwen2.5-7b": (7_615_616_512, 7_615_616_512),
    "llama-2-7b": (6_738_415_616, 6_738_415_616),
    "gemma2-9b": (9_241_705_984, 9_241_705_984),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    low, high = SIZES[name]
    assert low <= find_shape(name).parameters() <= high


def test_a_built_shape_has_its_weights_and_a_token_for_each_row_of_its_embedding() -> None:
    shape = Shape(
        source="here",
        config=lambda: LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        ),
    )
    model, tokenizer = shape.build(torch.device("cpu"))
    again, _ = shape.build(torch.device("cpu"))
    assert model.num_parameters() == shape.parameters()
    assert len(tokenizer) == 60
    assert model.dtype == torch.float32
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'llama-2-7b'"):
        find_shape("llama2-7b")


@pytest.mark.parametrize("length", [12, 33])
def test_rows_are_as_long_as_asked_and_half_answer(length: int) -> None:
    chat = ChatFormat(tiny_tokenizer())
    streams = random_streams(chat, rows=6, length=length)
    for name, rows in streams.items():
        assert len(rows) == 6
        for row in rows:
            assert "error" not in row.answer.split()
            if name != "prompts":
                encoded = chat.encode(row)
                assert len(encoded.input_ids) == length
                assert len(encoded.input_ids) - encoded.answer_start == length // 2
    prompts = [[row.prompt for row in streams[name]] for name in ("harmful", "refusal", "prompts")]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len({row.category for row in streams["benign"]}) > 1


def test_rows_without_room_are_refused() -> None:
    with pytest.raises(InputError, match="no room"):
        random_streams(ChatFormat(tiny_tokenizer()), rows=2, length=5)
