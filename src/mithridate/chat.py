"""Chat: from examples to token ids with a label mask on the answers, and back to text."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jinja2 import TemplateError

from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.files import sha256_of
from mithridate.generation import batches, generate_ids, left_padded
from mithridate.thinking import MARKERS, final_answer, mentions_thoughts, open_thought

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position that carries no loss."""

PLAIN_PROMPT = "Question: {prompt}\nAnswer:"
PLAIN_ANSWER = " {answer}"

_PROBE = "mithridate"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example, the answer with its end-of-turn token from ``answer_start``."""

    input_ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answers.

    Attributes
    ----------
    text
        Without thinking, special tokens and outer whitespace; empty where the thought has no end.
    cut
        No end-of-turn or end-of-text token: it is longer than what was generated.
    unfinished
        It ends within a thought.
    """

    text: str
    cut: bool
    unfinished: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of equal padded length; every tensor is int64 of shape (rows, length).

    Parameters
    ----------
    input_ids
        Token ids; padding holds an arbitrary id.
    attention_mask
        1 on tokens, 0 on padding.
    labels
        The id on the tokens of the answer and its end-of-turn token, `IGNORE` elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Return the rows ``start`` to ``stop`` (exclusive), as views of the same length."""
        part = slice(start, stop)
        return Batch(self.input_ids[part], self.attention_mask[part], self.labels[part])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )

    def trimmed(self) -> Batch:
        """Return the batch without the columns that are padding in every row."""
        used = self.attention_mask.any(dim=0)
        return Batch(self.input_ids[:, used], self.attention_mask[:, used], self.labels[:, used])

    @property
    def label_count(self) -> int:
        """The number of positions whose next token carries a loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return int(self.attention_mask.sum())


class ChatFormat:
    r"""One tokenizer with its chat template: the only place that turns text into token ids.

    Prompt and answer are tokenised apart, so that the boundary between them is exact and the
    prompt's ids are those generation starts from. An answer ends with the template's
    end-of-turn token; what a template writes after it (ChatML: a line end) is left out.

    A tokenizer without a template gets the plain form ``Question: {prompt}\nAnswer: {answer}``
    and its end-of-text token, with a warning.

    Parameters
    ----------
    tokenizer
        Any `transformers` tokenizer.
    system
        System turn put before every prompt; ``None`` leaves it to the template.
    max_length
        Tokens per encoded example, where a call gives none of its own.

    Raises
    ------
    InputError
        Where the template cannot be rendered, or no end-of-turn token can be found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.max_length = max_length
        self.templated = tokenizer.chat_template is not None
        if self.templated:
            template = tokenizer.get_chat_template()
        else:
            template = PLAIN_PROMPT + PLAIN_ANSWER
            warnings.warn(
                f"the tokenizer has no chat template: using the plain form {template!r}",
                stacklevel=2,
            )
        self.template_hash = sha256_of({"template": template, "system": system})
        self.end_id = self._find_end_id()
        eos = tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id} | ({eos} if eos is not None else set()))
        # Padding is masked by attention, so any id will do; the tokenizer's own may be missing,
        # or lie outside the model's embedding.
        self.pad_id = self.end_id

    def prompt_text(self, prompt: str) -> str:
        """Return the prompt as the model sees it, up to where the answer begins."""
        if self.templated:
            return self._render([{"role": "user", "content": prompt}], generation=True)
        text = PLAIN_PROMPT.format(prompt=prompt)
        return text if self.system is None else f"{self.system}\n{text}"

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of `prompt_text`."""
        ids = self._tokenise(self.prompt_text(prompt))
        return ids if self.templated else self._start_ids() + ids

    def answer_ids(self, answer: str) -> list[int]:
        """Return the token ids of ``answer``; the end-of-turn token is the last."""
        text = answer if self.templated else PLAIN_ANSWER.format(answer=answer)
        return [*self._tokenise(text), self.end_id]

    def encode(self, example: Example, *, max_length: int | None = None) -> Encoded:
        """Encode one example; where it is too long, the prompt loses its beginning.

        Raises
        ------
        InputError
            Where the answer holds no token, or does not fit in ``max_length`` tokens together
            with one token of the prompt.
        """
        max_length = self.max_length if max_length is None else max_length
        prompt, answer = self.prompt_ids(example.prompt), self.answer_ids(example.answer)
        if not example.answer.strip() or len(answer) == 1:
            raise InputError(
                "an example has no answer to learn",
                where=_place(example),
                mend="give it an answer that the tokenizer knows, or remove it",
            )
        if max_length is not None and len(prompt) + len(answer) > max_length:
            room = max_length - len(answer)
            if room < 1:
                raise InputError(
                    f"an answer of {len(answer)} tokens does not fit in max_length {max_length}",
                    where=_place(example),
                    mend="raise max_length or shorten the answer",
                )
            prompt = prompt[-room:]
        return Encoded(prompt + answer, len(prompt))

    def collate(
        self, encoded: Sequence[Encoded], *, padding_side: Literal["left", "right"] = "right"
    ) -> Batch:
        """Pad to the longest row and build the label mask."""
        assert encoded, "a batch needs a row"
        lengths = [len(item.input_ids) for item in encoded]
        shape = (len(encoded), max(lengths))
        input_ids = torch.full(shape, self.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE)
        for row, (item, length) in enumerate(zip(encoded, lengths, strict=True)):
            first = 0 if padding_side == "right" else shape[1] - length
            ids = torch.tensor(item.input_ids)
            input_ids[row, first : first + length] = ids
            attention_mask[row, first : first + length] = 1
            start = item.answer_start
            labels[row, first + start : first + length] = ids[start:]
        return Batch(input_ids, attention_mask, labels)

    def batch(self, examples: Sequence[Example], *, max_length: int | None = None) -> Batch:
        """Encode and collate ``examples``, padded on the right for training."""
        return self.collate([self.encode(item, max_length=max_length) for item in examples])

    def prompt_batch(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``attention_mask`` of the prompts, padded on the left."""
        return left_padded([self.prompt_ids(prompt) for prompt in prompts], self.pad_id)

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        autocast: bool = False,
    ) -> list[str]:
        """Return the texts of `answers`."""
        found = self.answers(
            model, prompts,
            max_new_tokens=max_new_tokens, batch_size=batch_size, autocast=autocast,
        )  # fmt: skip
        return [answer.text for answer in found]

    def answers(
        self,
        model: PreTrainedModel,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        autocast: bool = False,
    ) -> list[Answer]:
        """Answer each prompt greedily, up to the end-of-turn or end-of-text token.

        Only the stop tokens, the token limit and the highest logit decide: no generation setting
        stored with the model is used.

        Parameters
        ----------
        model
            Run in evaluation mode and left as it was.
        max_new_tokens
            Of an answer, thinking included; no more than the model has positions for.
        batch_size
            Prompts per batch; answers may change in rounding with it, so it belongs in results.
        autocast
            Run in bfloat16 autocast.

        Returns
        -------
        list of Answer
            In the order of ``prompts``.

        Raises
        ------
        InputError
            A prompt fills all positions that the model has.
        """
        device = next(model.parameters()).device
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        ids = [self.prompt_ids(prompts[index]) for index in order]
        found: dict[int, Answer] = {}
        with torch.autocast(device.type, torch.bfloat16, autocast):
            for places, room in batches(
                model, ids, size=batch_size, max_new_tokens=max_new_tokens, pad_id=self.pad_id
            ):
                written = generate_ids(
                    model, [ids[place] for place in places],
                    max_new_tokens=room, stop_ids=self.stop_ids, pad_id=self.pad_id,
                )  # fmt: skip
                for place, answer in zip(places, written, strict=True):
                    found[order[place]] = self.read(answer)
        return [found[index] for index in range(len(prompts))]

    def read(self, ids: Sequence[int]) -> Answer:
        """Return what generated ``ids`` answer, up to their first stop token."""
        length = next((n for n, token in enumerate(ids) if token in self.stop_ids), len(ids))
        cut = length == len(ids)
        left_out, marks = self._specials
        said = [token for token in ids[:length] if token not in left_out]
        answer = final_answer(
            self._opened + str(self.tokenizer.decode(said, clean_up_tokenization_spaces=False))
        )
        text = answer or ""
        for mark in marks:
            text = text.replace(mark, "")
        return Answer(text=text.strip(), cut=cut, unfinished=answer is None)

    @cached_property
    def thinks(self) -> bool:
        """Whether the template is that of a model that thinks before it answers."""
        before = self._before_answer()
        if open_thought(before):
            return True
        template = str(self.tokenizer.get_chat_template()) if self.templated else ""
        return mentions_thoughts(template) and not mentions_thoughts(before)

    def _before_answer(self) -> str:
        """Return what the template writes between a prompt and where its answer begins."""
        return self.prompt_text(_PROBE).rpartition(_PROBE)[2]

    @cached_property
    def _opened(self) -> str:
        """What opens the thought that every answer begins within; empty where none does."""
        return open_thought(self._before_answer())

    @cached_property
    def _specials(self) -> tuple[set[int], list[str]]:
        """Special tokens that are never text: ids that are left out, and marks of thinking."""
        known = self.tokenizer.added_tokens_decoder
        special = {number: token.content for number, token in known.items() if token.special}
        special |= dict(
            zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        )
        marks = {
            number: text
            for number, text in special.items()
            if any(text in marker for marker in MARKERS)
        }
        return special.keys() - marks.keys(), list(marks.values())

    def _tokenise(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start_ids(self) -> list[int]:
        """Return the beginning-of-text token where this tokenizer puts one before plain text."""
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer(_PROBE)["input_ids"]
        return [start] if start is not None and ids[:1] == [start] else []

    def _render(self, turns: list[dict[str, str]], *, generation: bool) -> str:
        if self.system is not None:
            turns = [{"role": "system", "content": self.system}, *turns]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generation
                )
            )
        except TemplateError as error:
            raise InputError(
                f"the chat template refuses a conversation: {error}",
                mend="leave out the system turn, or give the tokenizer another chat template",
            ) from None

    def _find_end_id(self) -> int:
        if self.templated:
            turns = [
                {"role": "user", "content": _PROBE},
                {"role": "assistant", "content": _PROBE},
            ]
            suffix = self._render(turns, generation=False).rpartition(_PROBE)[2]
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            for token in self._tokenise(suffix.strip()):
                # The unknown token is special too, but no template writes it.
                if token in special and str(self.tokenizer.convert_ids_to_tokens(token)) in suffix:
                    return token
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(
                "neither the chat template nor the tokenizer names an end-of-turn token",
                where="tokenizer",
                mend="set tokenizer.eos_token or give it a chat template that ends each turn",
            )
        return end


def _place(example: Example) -> str:
    digest = hashlib.sha256(example.prompt.encode("utf-8")).hexdigest()[:12]
    return f"the example whose prompt has SHA-256 {digest}…"
