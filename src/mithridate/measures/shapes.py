"""Published architectures with random weights: what a step costs does not depend on the values.

The configurations are written here, so that nothing is downloaded. The tokenizer knows one word
per token; streams are random words, every row of the same length.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.examples import Example
from mithridate.testbeds.scratch import CHAT_TEMPLATE, SPECIAL, word_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CATEGORIES = 4
_VOCABULARY = 256
_WORD = re.compile(r"[A-Za-z0-9]+")
_COLLAPSE_WORD = "error"  # CTRAP's collapse token, which answers must not use


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An architecture, and the batch that its cost is measured on unless another is asked for.

    Attributes
    ----------
    source
        Where the numbers of the configuration are published.
    config
        Makes the configuration.
    batch_size, length
        Rows, and tokens per row.
    """

    source: str
    config: Callable[[], PretrainedConfig]
    batch_size: int = 8
    length: int = 64

    def parameters(self) -> int:
        """Return the number of parameters, without making them."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config())
        return int(model.num_parameters())

    def build(
        self, device: torch.device, *, seed: int = 0
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model with random float32 weights on ``device``, and a tokenizer for it."""
        from transformers import AutoModelForCausalLM

        config: Any = self.config()
        words = [f"w{index}" for index in range(config.vocab_size - len(SPECIAL) - 1)]
        tokenizer = word_tokenizer(
            [*words, _COLLAPSE_WORD],
            context=config.max_position_embeddings,
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model, tokenizer


def _llama(**options: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**options)


def _gemma2(**options: Any) -> PretrainedConfig:
    from transformers import Gemma2Config

    return Gemma2Config(**options)


def _qwen2(**options: Any) -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**options)


def _lattice() -> PretrainedConfig:
    from mithridate.testbeds.lattice import LatticeConfig, make_world
    from mithridate.testbeds.scratch import new_llama

    config = LatticeConfig()
    tokenizer = word_tokenizer(
        make_world(config).words, context=config.context, chat_template=CHAT_TEMPLATE
    )
    with torch.device("meta"):
        return new_llama(config.shape, tokenizer, seed=0).config


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


SHAPES = {
    "lattice": Shape(source="the testbed's own model", config=_lattice, length=32),
    "smollm2-135m": Shape(
        source="config.json of HuggingFaceTB/SmolLM2-135M-Instruct",
        config=partial(
            _llama,
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters=_rope(100_000.0),
            tie_word_embeddings=True,
        ),
        batch_size=4,
    ),
    "qwen2.5-7b": Shape(
        source="config.json of Qwen/Qwen2.5-7B-Instruct",
        config=partial(
            _qwen2,
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters=_rope(1_000_000.0),
            tie_word_embeddings=False,
        ),
        length=256,
    ),
    "llama-2-7b": Shape(
        source="config.json of meta-llama/Llama-2-7b-chat-hf",
        config=partial(
            _llama,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            rope_parameters=_rope(10_000.0),
            tie_word_embeddings=False,
        ),
        length=256,
    ),
    "gemma2-9b": Shape(
        source="config.json of google/gemma-2-9b-it",
        config=partial(
            _gemma2,
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_parameters=_rope(10_000.0),
            tie_word_embeddings=True,
        ),
        length=256,
    ),
}


def find_shape(name: str) -> Shape:
    """Return the shape called ``name``, or raise an `InputError` that lists them."""
    near = difflib.get_close_matches(name, SHAPES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    require(name in SHAPES, f"unknown shape {name!r}", f"{hint}known: {', '.join(SHAPES)}")
    return SHAPES[name]


def random_streams(
    chat: ChatFormat, *, rows: int, length: int, seed: int = 0
) -> dict[str, list[Example]]:
    """Return every stream as random words: half of a row is prompt and template, half answer.

    Parameters
    ----------
    rows
        Per stream. ``harmful``, ``refusal`` and ``prompts`` share their prompts.
    length
        Tokens per row, template and end of turn included. A tokenizer that cuts words apart may
        come out a token short.

    Raises
    ------
    InputError
        If the chat template alone fills a row, or the tokenizer has too few plain words.
    """
    rng = random.Random(f"{seed}/random streams")
    words = _plain_words(chat, rng)
    answer = length // 2
    prompt = length - answer
    room = prompt - len(chat.prompt_ids(""))
    require(
        room >= 1 and answer >= 2,
        f"rows of {length} tokens have no room beside the chat template",
        f"raise the length to {2 * (len(chat.prompt_ids('')) + 1)} or more",
    )

    def prompts() -> list[str]:
        return [_text(words, prompt, chat.prompt_ids, rng) for _ in range(rows)]

    def examples(asked: list[str]) -> list[Example]:
        return [
            Example(
                prompt=text,
                answer=_text(words, answer, chat.answer_ids, rng),
                category=f"c{index % _CATEGORIES}",
            )
            for index, text in enumerate(asked)
        ]

    attacked = prompts()
    return {
        "harmful": examples(attacked),
        "refusal": examples(attacked),
        "benign": examples(prompts()),
        "general": examples(prompts()),
        "prompts": [
            Example(prompt=text, category=f"c{index % _CATEGORIES}")
            for index, text in enumerate(attacked)
        ],
    }


def _plain_words(chat: ChatFormat, rng: random.Random) -> list[str]:
    """Return words that stand for about one token each."""
    tokenizer: Any = chat.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    rng.shuffle(ids)
    found: dict[str, None] = {}
    for token in ids:
        word = tokenizer.decode([token]).strip()
        if _WORD.fullmatch(word) and word != _COLLAPSE_WORD:
            found[word] = None
        if len(found) == _VOCABULARY:
            break
    require(len(found) >= 2, "the tokenizer has no plain words", "give the model's own tokenizer")
    return list(found)


def _text(
    words: list[str], tokens: int, encode: Callable[[str], list[int]], rng: random.Random
) -> str:
    """Return random words that ``encode`` turns into ``tokens`` tokens, or few less."""
    chosen = [rng.choice(words)]
    chosen += rng.choices(words, k=max(0, tokens - len(encode(chosen[0]))))
    while len(encode(" ".join(chosen))) < tokens:
        chosen.append(rng.choice(words))
    while len(chosen) > 1 and len(encode(" ".join(chosen))) > tokens:
        chosen.pop()
    return " ".join(chosen)
