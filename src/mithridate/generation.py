"""Generation by our settings alone, whatever a model's folder sets and whatever padding does."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig

from mithridate import models
from mithridate.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mithridate.chat import Answer, ChatFormat
    from mithridate.examples import Example

Company = Literal["any", "equal", "none"]
"""Which prompts may share a batch: any, those of equal length, or none."""

_LEAST_TOKENS = 64
_UNKNOWN_TOKENS = 256
_MARGIN = 32
THOUGHT_TOKENS = 2048
"""What a reasoning model gets to think in, beside its answer."""

# Relative to the largest logit. Rounding moves float32 by 1e-6, a state that has read padding by 1.
_ROUNDING = 0.01
_COMPANY: WeakKeyDictionary[torch.nn.Module, Company] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class AnswerRoom:
    """How much is generated for an answer, and what does not fit.

    Attributes
    ----------
    tokens
        New tokens, thinking included.
    too_long
        Items whose answers are all longer, or longer than the model has positions for.
    """

    tokens: int
    too_long: int = 0

    def counts(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Return what belongs in a probe's row: this room, and what was cut short in it."""
        return {
            "max_new_tokens": self.tokens,
            "n_too_long": self.too_long,
            "n_cut": sum(answer.cut for answer in answers),
            "n_unfinished": sum(answer.unfinished for answer in answers),
        }


def most_cut_short(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return, of each of `AnswerRoom.counts`, the most that a probe's row holds."""
    rows = list(rows)
    names = AnswerRoom(tokens=0).counts([])
    return {name: int(max(row[name] for row in rows)) for name in names}


def answer_room(
    model: PreTrainedModel, chat: ChatFormat, items: Sequence[Example], most: int | None = None
) -> AnswerRoom:
    """Return the room that items are answered in, and warn of answers that do not fit.

    Parameters
    ----------
    most
        New tokens; ``None``: as many as the answers need (`tokens_to_answer`).

    Raises
    ------
    InputError
        A prompt fills all positions that the model has.
    """
    positions = models.positions(model)
    lengths = [len(chat.prompt_ids(item.prompt)) for item in items]
    _check_positions(lengths, positions)
    tokens = most or tokens_to_answer(chat, items)
    too_long = 0
    for item, length in zip(items, lengths, strict=True):
        # The end-of-turn token need not be reached.
        needed = min((len(chat.answer_ids(text)) - 1 for text in _answers_to(item)), default=0)
        too_long += needed > (tokens if positions is None else min(tokens, positions - length))
    if too_long:
        warnings.warn(
            f"{too_long} of {len(items)} questions have answers longer than the {tokens} tokens "
            "that are generated, or than the model has positions for: they cannot be answered in "
            "full, and count as not answered (raise --max-new-tokens, in RL response_length)",
            stacklevel=2,
        )
    return AnswerRoom(tokens=tokens, too_long=too_long)


def tokens_to_answer(chat: ChatFormat, items: Sequence[Example]) -> int:
    """Return how many new tokens leave room for every item's answer.

    The longest known answer and 32 tokens around it, 64 at least; 256 at least where an item has
    no answer to go by; and 2048 more to think in, where the template is a reasoning model's.
    """
    known = [len(chat.answer_ids(text)) for item in items for text in _answers_to(item)]
    least = _LEAST_TOKENS if all(map(_answers_to, items)) else _UNKNOWN_TOKENS
    needed = max(least, max(known, default=0) + _MARGIN)
    return needed + (THOUGHT_TOKENS if chat.thinks else 0)


def _check_positions(lengths: Sequence[int], positions: int | None) -> None:
    longest = max(lengths, default=0)
    if positions is not None and longest >= positions:
        raise InputError(
            f"a question has {longest} tokens, and the model takes {positions} with the answer",
            mend="shorten the question or leave it out",
        )


def _answers_to(item: Example) -> list[str]:
    return [text for text in item.accepted or (item.answer,) if text.strip()]


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    **settings: Any,
) -> list[list[int]]:
    """Return what the model writes after each prompt, in one batch padded on the left.

    Up to the first of ``stop_ids``, which is the last id, or to ``max_new_tokens``. The model's own
    generation settings are not used, also not its stop tokens; it runs in evaluation mode and is
    left as it was.

    Parameters
    ----------
    prompts
        Token ids, which may share a batch (`company`).
    settings
        Further fields of `transformers.GenerationConfig`; by default it is greedy.
    """
    output = _generate(
        model, prompts, pad_id,
        GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad_id,
            **{"do_sample": False, "use_cache": True, **settings},
        ),
    )  # fmt: skip
    width = max(map(len, prompts))
    found = []
    for ids in output[:, width:].tolist():
        # Past its stop token a row holds padding, which may be an ordinary id.
        length = next((n for n, token in enumerate(ids, 1) if token in stop_ids), len(ids))
        found.append(ids[:length])
    return found


def batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    size: int,
    max_new_tokens: int,
    pad_id: int,
) -> Iterator[tuple[list[int], int]]:
    """Cut prompts into batches in which each is answered as if it were alone.

    Prompts that leave fewer than ``max_new_tokens`` of the model's positions, and all prompts of a
    model whose answers change with padding, share a batch only with others of their length; those
    of a model whose answers change in any batch share none.

    Yields
    ------
    list of int, int
        Indices into ``prompts``, and the new tokens that there is room for.

    Raises
    ------
    InputError
        A prompt fills all positions that the model has.
    """
    positions = models.positions(model)
    lengths = [len(ids) for ids in prompts]
    _check_positions(lengths, positions)
    room = [
        max_new_tokens if positions is None else min(max_new_tokens, positions - length)
        for length in lengths
    ]
    company: Company = "any"
    if size > 1 and len(prompts) > 1:
        company = company_of(model, max(prompts, key=len), pad_id)
    roomy = [
        index for index, most in enumerate(room) if company == "any" and most == max_new_tokens
    ]
    alike: dict[int, list[int]] = defaultdict(list)
    for index in sorted(set(range(len(prompts))) - set(roomy)):
        alike[lengths[index]].append(index)
    size = 1 if company == "none" else size
    cut = [
        group[first : first + size]
        for group in (roomy, *alike.values())
        for first in range(0, len(group), size)
    ]
    for one in cut:
        yield one, room[one[0]]


def company_of(model: PreTrainedModel, prompt: Sequence[int], pad_id: int) -> Company:
    """Return which prompts may share a batch without changing what the model says.

    Attention passes over padding; the state of some recurrent models takes it in. Tried once for
    each model, on its logits after the second half of ``prompt`` alone and beside other rows.
    """
    found = _COMPANY.get(model)
    if found is None:
        half = prompt[len(prompt) // 2 :]
        kind = next(model.parameters())
        allowed = max(_ROUNDING, torch.finfo(kind.dtype).eps ** 0.5)
        config = GenerationConfig(
            do_sample=False, use_cache=True, max_new_tokens=2, pad_token_id=pad_id,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        with torch.autocast(kind.device.type, enabled=False):
            alone = _generate(model, [half], pad_id, config)

            def unmoved_by(other: Sequence[int]) -> bool:
                return _alike(alone, _generate(model, [half, other], pad_id, config), allowed)

            if unmoved_by(prompt):
                found = "any"
            else:
                found = "equal" if unmoved_by(prompt[: len(half)]) else "none"
        _COMPANY[model] = found
        if found != "any":
            cause, then = {
                "equal": ("padding", "only prompts of equal length share a batch"),
                "none": ("a batch", "each prompt is answered alone"),
            }[found]
            warnings.warn(
                f"{cause} changes what {type(model).__name__} says, so {then}: slower, and right",
                stacklevel=2,
            )
    return found


def _alike(alone: Any, beside: Any, allowed: float) -> bool:
    """Whether the first rows of two outputs have the same logits as long as they read the same."""
    for step, (one, other) in enumerate(zip(alone.logits, beside.logits, strict=False)):
        known = one[0].isfinite() & other[0].isfinite()  # an attacker may have banned some
        size = one[0][known].abs().amax() if known.any() else 0
        if ((one[0] - other[0])[known].abs() > allowed * size).any():
            return False
        said = [output.sequences[0, step - len(output.logits)] for output in (alone, beside)]
        if said[0] != said[1]:
            break
    return True


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, config: GenerationConfig
) -> Any:
    inputs = left_padded(prompts, pad_id)
    # An adapter's own generate would bring back the settings of its base model.
    plain: Any = getattr(model, "get_base_model", lambda: model)()
    stored, device = plain.generation_config, next(plain.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    # What is None in the settings of a call would be filled from the model's.
    plain.generation_config = GenerationConfig()
    model.train(False)
    try:
        with torch.no_grad():
            return plain.generate(
                **{name: tensor.to(device) for name, tensor in inputs.items()},
                generation_config=config,
            )
    finally:
        plain.generation_config = stored
        for module, training in modes:
            module.training = training


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of prompts that end in one column."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
