r"""What an attacker may put into a frozen model and train alone, every weight staying as it was.

- ``soft``: k vectors before each conversation, in place of words (arXiv 2104.08691);
- ``hard``: k words there, found by greedy coordinate gradient (GCG, arXiv 2307.15043);
- ``lens``: an affine map of the last state before the final norm, W h + b: the probe that reads
  answers out of inner layers once the later ones are dropped (tuned lens, arXiv 2303.08112);
- ``scales`` and ``offsets``: with z the output of an attention head, z (1 + a) for every head, then
  z + v for the heads whose a has grown most (LoFiT, arXiv 2406.01563).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from mithridate.chat import Batch, ChatFormat, Encoded
from mithridate.errors import InputError, NotApplicableError
from mithridate.examples import Example
from mithridate.weights.losses import answer_cross_entropy
from mithridate.weights.maps import blocks_of, residual_writers
from mithridate.weights.oracle import GradientOracle

Insert = Literal["soft", "hard", "lens", "scales", "offsets"]

SWAPS = 32
"""Swaps of one word that a step of GCG tries."""

_SHORTLIST = 64


class SoftChat(ChatFormat):
    """A chat format that begins with tokens past the model's vocabulary.

    Parameters
    ----------
    plain
        The format without them.
    model
        Its embedding says where its vocabulary ends.
    count
        Soft tokens.
    """

    def __init__(self, plain: ChatFormat, model: PreTrainedModel, count: int) -> None:
        super().__init__(
            plain.tokenizer,
            system=plain.system,
            max_length=plain.max_length,
            arguments=plain.arguments,
            date=plain.date,
        )
        self._plain = plain
        first = len(_table(model))
        self.soft_ids = list(range(first, first + count))

    def prompt_ids(self, prompt: str, *, max_length: int | None = None) -> list[int]:
        """Return the soft tokens and then the token ids of the prompt."""
        most = None if max_length is None else max_length - len(self.soft_ids)
        return [*self.soft_ids, *self._plain.prompt_ids(prompt, max_length=most)]

    def encode(self, example: Example, *, max_length: int | None = None) -> Encoded:
        """Encode one example; where it is too long, its prompt loses words, not soft tokens."""
        most, count = self.max_length if max_length is None else max_length, len(self.soft_ids)
        found = self._plain.encode(example, max_length=None if most is None else most - count)
        return Encoded([*self.soft_ids, *found.input_ids], count + found.answer_start)


class SoftEmbedding(nn.Module):
    """An embedding that also knows the ids past its table: they stand for trained vectors."""

    def __init__(self, table: nn.Module, vectors: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors)

    @property
    def weight(self) -> torch.Tensor:
        """The table's weight, to which the output head may be tied."""
        weight = self.table.weight
        assert isinstance(weight, torch.Tensor), "a causal language model embeds token ids"
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of ``ids``, of any shape."""
        places = ids - len(self.weight)
        plain: torch.Tensor = self.table(ids.masked_fill(places >= 0, 0))
        return torch.where((places >= 0)[..., None], self.vectors[places.clamp_min(0)], plain)


class Heads(nn.Module):
    """Changes the outputs of attention heads before the layer that mixes them.

    Attributes
    ----------
    values
        Shape (chosen heads, width of a head); all zero they change nothing.
    multiply
        z (1 + values) instead of z + values.
    """

    def __init__(
        self, mix: nn.Module, heads: int, width: int, chosen: Sequence[int], *, multiply: bool
    ) -> None:
        super().__init__()
        self.mix = mix
        self.heads = heads
        self.multiply = multiply
        like = next(mix.parameters())
        self.values = nn.Parameter(like.new_zeros(len(chosen), width))
        self.register_buffer("chosen", torch.tensor(chosen, device=like.device))

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return what the heads' outputs, shape (..., heads * width), are mixed to."""
        assert isinstance(self.chosen, torch.Tensor), "it is a buffer"
        values = self.values.new_zeros(self.heads, self.values.shape[1])
        values = values.index_copy(0, self.chosen, self.values).flatten()
        changed = outputs * (1 + values) if self.multiply else outputs + values
        mixed: torch.Tensor = self.mix(changed)
        return mixed


def put_in(model: PreTrainedModel, insert: Insert, size: int) -> None:
    """Put an insert into the model, in place, and freeze all else.

    Vectors begin as those of words drawn by torch's own generator; the other inserts begin by
    changing nothing.

    Parameters
    ----------
    size
        Soft or hard tokens; heads that get offsets, at most.

    Raises
    ------
    InputError
        The model has no place for it, or ``offsets`` are to be learnt before ``scales`` were.
    """
    model.requires_grad_(False)
    if insert in ("soft", "hard"):
        table = model.get_input_embeddings()
        words = torch.randint(len(_table(model)), (size,)).to(model.device)
        model.set_input_embeddings(SoftEmbedding(table, table(words).detach().clone()))
    elif insert == "lens":
        width = model.config.get_text_config().hidden_size
        lens = nn.Linear(width, width, device=model.device, dtype=model.dtype)
        with torch.no_grad():
            nn.init.eye_(lens.weight)
            nn.init.zeros_(lens.bias)
        last = blocks_of(model)[-1]
        last.add_module("lens", lens)
        last.register_forward_hook(_through_lens)
    elif insert == "scales":
        heads = getattr(model.config.get_text_config(), "num_attention_heads", 0)
        for mix, width in _mixers(model, heads):
            _replace(model, mix, Heads(mix, heads, width, range(heads), multiply=True))
    else:
        _choose_heads(model, size)


def swap_words(oracle: GradientOracle, batch: Batch) -> float:
    """Swap one of the hard words for a better one, if one is found; return the loss before.

    By first order each word's effect at each place is the gradient times its vector; of the most
    promising words some are drawn and tried on the batch, and the best of all is kept.
    """
    embedding = oracle.model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, SoftEmbedding), "words are swapped in a model that has some"
    (slope,), loss = oracle.gradient(answer_cross_entropy, batch, purpose="harmful")
    words = embedding.table(torch.arange(len(embedding.weight), device=slope.device)).detach()
    best = (-slope @ words.T).topk(min(_SHORTLIST, len(words)), dim=1).indices
    start = embedding.vectors.detach().clone()
    found = [(loss, start)]
    with torch.no_grad():
        for _ in range(SWAPS):
            place = int(torch.randint(len(start), ()))
            word = best[place, int(torch.randint(best.shape[1], ()))]
            embedding.vectors.copy_(start)
            embedding.vectors[place] = words[word]
            tried = oracle.loss(answer_cross_entropy, batch, purpose="harmful")
            found.append((tried, embedding.vectors.detach().clone()))
        embedding.vectors.copy_(min(found, key=lambda one: one[0])[1])
    return loss


def _choose_heads(model: PreTrainedModel, size: int) -> None:
    scaled = [module for module in model.modules() if isinstance(module, Heads)]
    grown = [
        (float(values.norm()), layer, head)
        for layer, module in enumerate(scaled)
        for head, values in enumerate(module.values)
    ]
    if not grown:
        raise InputError("heads are chosen by their scales, and none were learnt",
                         mend="let a phase with insert: scales go first")  # fmt: skip
    best = sorted(grown, key=lambda one: -one[0])[:size]
    for layer, module in enumerate(scaled):
        chosen = sorted(head for _, where, head in best if where == layer)
        mix = module.mix
        width = module.values.shape[1]
        new = Heads(mix, module.heads, width, chosen, multiply=False) if chosen else mix
        _replace(model, module, new)


def _mixers(model: PreTrainedModel, heads: int) -> list[tuple[nn.Module, int]]:
    """Return the modules that mix the heads' outputs, with the width of a head."""
    found = []
    for one in residual_writers(model):
        above = one.name.split(".")[:-2]
        kind = type(model.get_submodule(".".join(above))).__name__.lower()
        if "attention" in kind and one.weight.dim() == 2 and heads and one.inputs % heads == 0:
            found.append((one.owner, one.inputs // heads))
    if not found:
        raise NotApplicableError(
            f"no layer of {type(model).__name__} is found to mix attention heads",
            mend="attack it in another way",
        )
    return found


def _through_lens(block: nn.Module, _: object, output: Any) -> Any:
    lens = block.get_submodule("lens")
    return lens(output) if isinstance(output, torch.Tensor) else (lens(output[0]), *output[1:])


def _table(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor), "a causal language model embeds token ids"
    return weight


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, new)
