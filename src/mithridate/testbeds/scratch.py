"""A tiny language model from scratch: word-level tokenizer, Llama shape, two lean training loops.

The folders it writes are ordinary ones: ``AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained`` load them, and nothing else in the project treats them specially.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mithridate.chat import ChatFormat, Encoded
from mithridate.errors import NonFiniteError

PAD, UNKNOWN, START, END, USER, ASSISTANT = (
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
)
SPECIAL = (PAD, UNKNOWN, START, END, USER, ASSISTANT)
LEAD_WEIGHT = 0.3
# With the usual 0.02 and 10,000 copying by position is not learnt within a thousand steps: the
# start is too small for this width, and the slowest rotations never turn within this context.
INITIAL_RANGE = 0.06
ROTARY_BASE = 100.0
# A model that has only read documents is prompted by completion.
COMPLETION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% else %} <assistant> {{ message['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The size of a Llama-shape model."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A training run: AdamW, linear warm-up, then constant or cosine to a tenth."""

    steps: int
    learning_rate: float
    rows: int
    decay: bool = True
    warmup_steps: int = 20
    weight_decay: float = 0.01


def word_tokenizer(
    words: Sequence[str], *, context: int, chat_template: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word.

    Parameters
    ----------
    words
        The vocabulary, without the special tokens.
    context
        Longest sequence of the model, in tokens.
    chat_template
        `CHAT_TEMPLATE` or `COMPLETION_TEMPLATE`.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def new_llama(
    shape: ModelShape, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> LlamaForCausalLM:
    """Return an untrained Llama-shape model in float32 with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=INITIAL_RANGE,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    model: PreTrainedModel,
    documents: Sequence[Encoded],
    schedule: Schedule,
    *,
    length: int,
    seed: int,
) -> list[float]:
    """Train on ``documents`` packed end to end; the loss counts every token.

    What a document says (from ``answer_start`` on) weighs 1, how it leads up to it
    `LEAD_WEIGHT`: which item a document is about cannot be predicted, and at full weight that
    noise is most of the gradient.

    Parameters
    ----------
    documents
        Token ids of each document, with its start and end tokens.
    length
        Tokens per packed row.

    Returns
    -------
    list of float
        The loss of every step.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite.
    """
    batches = _packed(documents, rows=schedule.rows, length=length, seed=seed)
    losses = []
    with _Training(model, schedule) as optimise:
        for _ in range(schedule.steps):
            ids, weights = (tensor.to(model.device) for tensor in next(batches))
            logits = model(input_ids=ids, use_cache=False).logits
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            counted = weights[:, 1:].flatten()
            losses.append(optimise((each * counted).sum() / counted.sum()))
    return losses


def tune(
    model: PreTrainedModel,
    chat: ChatFormat,
    streams: Sequence[tuple[Sequence[Encoded], float]],
    schedule: Schedule,
    *,
    seed: int,
) -> list[float]:
    """Supervised fine-tuning on a mixture of streams; the loss counts the answers only.

    Parameters
    ----------
    streams
        Encoded examples of each stream and the stream's share of every batch.

    Returns
    -------
    list of float
        The loss of every step.
    """
    shares = np.array([share for _, share in streams])
    counts = np.floor(shares / shares.sum() * schedule.rows).astype(int)
    counts[0] += schedule.rows - counts.sum()
    encoded = [rows for rows, _ in streams]
    orders = [_endless(len(rows), seed=seed + 1000 * index) for index, rows in enumerate(encoded)]
    losses = []
    with _Training(model, schedule) as optimise:
        for _ in range(schedule.steps):
            rows = [
                part[next(order)]
                for part, order, count in zip(encoded, orders, counts, strict=True)
                for _ in range(count)
            ]
            batch = chat.collate(rows).to(model.device)
            loss = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                use_cache=False,
            ).loss
            losses.append(optimise(loss))
    return losses


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as an ordinary folder (safetensors)."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Training:
    """Set up AdamW and the schedule; the value bound by ``with`` makes one step from a loss."""

    def __init__(self, model: PreTrainedModel, schedule: Schedule) -> None:
        self.model = model
        self.schedule = schedule
        decayed = [weight for weight in model.parameters() if weight.dim() > 1]
        kept = [weight for weight in model.parameters() if weight.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": schedule.weight_decay},
                {"params": kept, "weight_decay": 0.0},
            ],
            lr=schedule.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._factor)

    def _factor(self, step: int) -> float:
        warmup, steps = self.schedule.warmup_steps, self.schedule.steps
        if step < warmup:
            return (step + 1) / warmup
        if not self.schedule.decay:
            return 1.0
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))

    def __enter__(self) -> _Training:
        self.model.train()
        return self

    def __exit__(self, *_: object) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.model.eval()

    def __call__(self, loss: torch.Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError("training loss", value)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.rates.step()
        self.optimiser.zero_grad(set_to_none=True)
        return value


def _packed(
    documents: Sequence[Encoded], *, rows: int, length: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ids = [np.asarray(document.input_ids, dtype=np.int64) for document in documents]
    weights = [np.ones(len(part), dtype=np.float32) for part in ids]
    for document, part in zip(documents, weights, strict=True):
        part[: document.answer_start] = LEAD_WEIGHT
    generator = np.random.default_rng(seed)
    size = rows * length
    left_ids = np.empty(0, dtype=np.int64)
    left_weights = np.empty(0, dtype=np.float32)
    while True:
        order = generator.permutation(len(ids))
        left_ids = np.concatenate([left_ids, *(ids[index] for index in order)])
        left_weights = np.concatenate([left_weights, *(weights[index] for index in order)])
        while len(left_ids) >= size:
            yield (
                torch.from_numpy(left_ids[:size].reshape(rows, length)),
                torch.from_numpy(left_weights[:size].reshape(rows, length)),
            )
            left_ids, left_weights = left_ids[size:], left_weights[size:]


def _endless(count: int, *, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(count).tolist()
