"""A model, tokenizer, data and methods small enough to train in a fraction of a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mithridate.examples import Example
from mithridate.methods import Method, MethodConfig
from mithridate.methods.base import RunContext
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.weights.losses import answer_cross_entropy

WORDS = [f"w{n}" for n in range(40)]
SPECIALS = ["<pad>", "<user>", "<bot>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def tiny_tokenizer():
    vocabulary = {word: n for n, word in enumerate([*SPECIALS, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + len(SPECIALS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config)


def tiny_examples():
    def rows(offset, count):
        return [
            Example(
                prompt=f"{WORDS[(offset + n) % 40]} {WORDS[(offset + 3 * n) % 40]}",
                answer=" ".join(WORDS[(offset + n + k) % 40] for k in range(1 + n % 3)),
            )
            for n in range(count)
        ]

    return {"refusal": rows(0, 7), "benign": rows(11, 10), "general": rows(23, 5)}


@dataclass(frozen=True, kw_only=True)
class TwoStreamConfig(MethodConfig):
    batch_size: int = 4


class TwoStream(Method):
    """Pulls towards one stream, pushes a running direction of another: it has state."""

    name = "two-stream"
    paper = summary = defends = limits = "-"
    config_class = TwoStreamConfig
    streams = ("refusal", "benign")
    passes_per_step = 2
    parameter_buffers = 1

    def __init__(self, config):
        self.config = config
        self.running = None

    @property
    def active_terms(self):
        return ("retain", "push")

    def step(self, context: RunContext):
        benign = context.draw("benign", self.config.batch_size)
        gradient, push = context.oracle.gradient(answer_cross_entropy, benign, purpose="push")
        if self.running is None:
            self.running = context.space.zeros()
        torch._foreach_mul_(self.running, 0.5)
        torch._foreach_add_(self.running, gradient, alpha=context.random("sign").choice((-1, 1)))
        refusal = context.draw("refusal", self.config.batch_size)
        retain = context.oracle.accumulate(answer_cross_entropy, refusal, purpose="retain")
        torch._foreach_add_(context.space.gradient(), self.running, alpha=0.1)
        return {"retain": retain, "push": push}

    def state(self):
        return {} if self.running is None else {str(n): t for n, t in enumerate(self.running)}

    def load_state(self, state):
        self.running = [state[str(n)] for n in range(len(state))] if state else None


def method(name):
    if name == "sft":
        return SFT(SFTConfig(batch_size=6))
    return TwoStream(TwoStreamConfig())
