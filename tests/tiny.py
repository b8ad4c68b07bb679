"""A Llama small enough for exact comparisons, its batches and contexts, and a memory watch."""

from __future__ import annotations

import weakref

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mithridate.chat import IGNORE, Batch, ChatFormat
from mithridate.examples import Example
from mithridate.methods import RunContext
from mithridate.weights import GradientOracle

WORDS = [f"w{n}" for n in range(43)] + ["error"]
SPECIALS = ["<pad>", "<unk>", "<start>", "<end>", "<user>", "<bot>"]
VOCABULARY = len(WORDS) + len(SPECIALS)
FULL, LORA = "full", "lora"


def tiny_tokenizer(words=WORDS):
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<bot>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
        "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
    )
    return tokenizer


def tiny_llama(*, dtype=torch.float64, hidden=16, layers=2, seed=0, **options):
    """A random model with weights large enough for its Hessian to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **options,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        # The library's norm computes in float32, whose rounding would hide in every comparison.
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = _exact_norm.__get__(module)
    return model


def _exact_norm(self, states):
    scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * states * scale


def tiny_model(space, **options):
    """The same, to be trained in full or through a LoRA adapter away from its zero start."""
    model = tiny_llama(**options)
    if space == FULL:
        return model
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape).to(model.dtype) * 0.3
    return adapted.eval()


def tiny_batch(rows=4, *, seed=0, length=10):
    """Rows of different lengths, padded on the right, the last third of each labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (rows, length), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row in range(rows):
        size = length - int(torch.randint(0, 4, (), generator=generator))
        start = size - 1 - int(torch.randint(1, 4, (), generator=generator))
        mask[row, :size] = 1
        labels[row, start:size] = ids[row, start:size]
    return Batch(input_ids=ids, attention_mask=mask, labels=labels)


def tiny_examples(count=12):
    def rows(first, name):
        return [
            Example(
                prompt=f"w{(first + n) % 40} w{(first + 3 * n + 1) % 40} w{n % 7}",
                answer=" ".join(f"w{(first + 2 * n + k) % 40}" for k in range(1 + n % 3)),
                category=f"c{n % 3}",
                source=f"{name}{n % 2}",
            )
            for n in range(count)
        ]

    examples = {"harmful": rows(0, "h"), "benign": rows(11, "b"), "general": rows(23, "g")}
    examples["refusal"] = [
        Example(prompt=item.prompt, answer="w41 w42") for item in examples["harmful"]
    ]
    examples["prompts"] = [
        Example(prompt=item.prompt, category=item.category) for item in examples["harmful"]
    ]
    return examples


def tiny_context(model, *, micro_batch_size=None, autocast=False, step=1, output_dir=None):
    """A context whose streams always give the same batch, so that runs can be compared."""
    oracle = GradientOracle(model, micro_batch_size=micro_batch_size, autocast=autocast)
    seeds = {"harmful": 1, "refusal": 2, "benign": 3, "general": 4}
    return RunContext(
        oracle=oracle,
        draw=lambda stream, rows: tiny_batch(rows, seed=seeds[stream]),
        total_steps=10,
        seed=0,
        chat=ChatFormat(tiny_tokenizer()),
        examples=tiny_examples(),
        step=step,
        output_dir=output_dir,
    )


def mean_loss(model, batch):
    """The answer cross-entropy, written a second time."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE
    )


def weights_of(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradient_of(model, loss, *, create_graph=False):
    """The gradient of a scalar as a list, by autograd alone."""
    return list(torch.autograd.grad(loss, weights_of(model), create_graph=create_graph))


def relative_error(found, expected):
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def twice_differentiable():
    return sdpa_kernel(SDPBackend.MATH)


def random_direction(model, seed):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights_of(model)]
    size = flat(found).norm()
    return [tensor / size for tensor in found]


def slope_along(model, direction, scalar, step):
    """The central difference of ``scalar()`` along ``direction``."""
    values = []
    for sign in (1, -1):
        saved = [weight.detach().clone() for weight in weights_of(model)]
        with torch.no_grad():
            for weight, d in zip(weights_of(model), direction, strict=True):
                weight.add_(d, alpha=sign * step)
        values.append(float(torch.as_tensor(scalar()).detach()))
        with torch.no_grad():
            for weight, before in zip(weights_of(model), saved, strict=True):
                weight.copy_(before)
    return (values[0] - values[1]) / (2 * step)


class MemoryWatch(TorchDispatchMode):
    """Follows the bytes of every tensor made while it is on, through forward and backward."""

    def __enter__(self):
        self.bytes = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in given and storage not in self._seen:
                    size = storage.nbytes()
                    self._seen[storage] = size
                    self.bytes += size
                    weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def _freed(self, size):
        self.bytes -= size


class Vector(nn.Module):
    """Four weights, for losses whose every derivative is known by hand."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))


def quadratic(seed):
    """Return (A, b) of the loss w.A.w / 2 - b.w, with A symmetric."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    return a @ a.T + torch.eye(4), torch.randn(4, generator=generator, dtype=torch.float64)


def quadratic_loss(model, batch):
    """The mean loss of `quadratic`, seeded by the batch's first token."""
    a, b = quadratic(int(batch.input_ids[0, 0]))
    return (model.w @ a @ model.w / 2 - b @ model.w) * batch.label_count


def marked_batch(mark, rows):
    """A batch that tells `quadratic_loss` which loss it is."""
    ids = torch.full((rows, 3), mark)
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
