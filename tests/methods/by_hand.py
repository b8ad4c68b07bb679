"""A Llama's forward pass written out, and what the methods that look into layers share in tests."""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from mithridate.chat import IGNORE
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.training import TrainingConfig, immunise
from tests.tiny import (
    FULL,
    LORA,
    MemoryWatch,
    tiny_batch,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_tokenizer,
)


def plain(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward(model, batch, *, attention=None, block=None):
    """Return (logits, hidden states, MLP outputs), with tensors added to attentions or blocks."""
    body = plain(model).model
    h = body.embed_tokens(batch.input_ids)
    positions = body.rotary_emb(h, position_ids=torch.arange(h.shape[1]).unsqueeze(0))
    states, mlps = [h], []
    for index, layer in enumerate(body.layers):
        a, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h),
            position_embeddings=positions,
            attention_mask=None,
        )
        h = h + (a if attention is None else a + attention[index])
        mlps.append(layer.mlp(layer.post_attention_layernorm(h)))
        h = h + mlps[-1]
        if block is not None:
            h = h + block[index]
        states.append(h)
    return plain(model).lm_head(body.norm(h)), states, mlps


def cross_entropy(logits, batch):
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
    )


def loss(model, batch, **shifts):
    return cross_entropy(forward(model, batch, **shifts)[0], batch)


def still(model, batch):
    """No shift at all, one per layer, to differentiate by."""
    body = plain(model).model
    shape = (*batch.input_ids.shape, body.embed_tokens.weight.shape[1])
    kind = body.embed_tokens.weight.dtype
    return [torch.zeros(shape, dtype=kind, requires_grad=True) for _ in body.layers]


def step_of(method, model, **options):
    context = tiny_context(model, **options)
    context.space.give_gradient(None)
    method.prepare(context)
    context.oracle.ledger.clear()
    terms = method.step(context)
    found = [None if w.grad is None else w.grad.clone() for w in context.space.tensors]
    return found, terms, context


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def roomy_model(space):
    """Weights, or adapters, that are large beside the activations of a row."""
    model = tiny_llama(dtype=torch.float32, hidden=128)
    if space == FULL:
        return model
    config = LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape) * 0.05
    return adapted.eval()


def buffers_of(method, space):
    """Return a step's peak beyond that of plain SFT on a row, in parameter-sized buffers."""
    peaks = []
    for each in (SFT(SFTConfig(batch_size=1, retain=("refusal",))), method):
        context = tiny_context(roomy_model(space))
        each.prepare(context)
        with MemoryWatch() as watch:
            each.step(context)
        peaks.append(watch.peak)
    return (peaks[1] - peaks[0]) / context.space.bytes


def run(method, folder, *, without=()):
    """A short run of the real thing, for what it refuses."""
    examples = {name: rows for name, rows in tiny_examples().items() if name not in without}
    model = tiny_llama(dtype=torch.float32)
    settings = TrainingConfig(steps=2, save_every=0, learning_rate=1e-3)
    return immunise(model, tiny_tokenizer(), examples, method, settings, folder)


HARMFUL, REFUSAL = tiny_batch(4, seed=1), tiny_batch(4, seed=2)
SPACES = (FULL, LORA)
