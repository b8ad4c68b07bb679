"""Schemas: where the rows of known data sets keep the prompt, its answer, and what goes with them.

`SCHEMAS` is the whole knowledge; `examples_of` applies it to one row.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mithridate.errors import InputError
from mithridate.examples.sets import Example
from mithridate.printable import printable

TEXT_FIELDS = ("source", "half", "split", "template", "fact_id")
TARGETS = ("prompt", "answer", "category", "context", "system", "accepted", "is_safe", *TEXT_FIELDS)
"""What ``--columns`` can name; an empty column leaves the target out."""

MAPPING = "--columns prompt=question,answer=response"

_NAME_LIMIT = 40
_NAMES_SHOWN = 20
_WORDS_OF_A_TEXT = 3
_DEPTH_SEARCHED = 4

# Which answers, and which requests, a stream takes from sets that mark them as safe or not.
SAFE_ANSWERS = {
    "harmful": False,
    "prompts": False,
    "refusal": True,
    "benign": True,
    "general": True,
}
_SAFE_REQUESTS = {**SAFE_ANSWERS, "refusal": False}

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# The form of Anthropic's HH-RLHF: one text that holds the conversation.
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")
_BRACED = re.compile(r"\{([^{}]+)\}")


class RowError(InputError):
    """One row cannot be used; the others may.

    Parameters
    ----------
    reason
        The kind of fault, under which such rows are counted.
    """

    def __init__(
        self, reason: str, what: str, *, where: str, field: str = "", mend: str = "correct the row"
    ) -> None:
        self.reason = reason
        self.row = where
        place = f"{where}, field {printable(field, limit=_NAME_LIMIT)}" if field else where
        super().__init__(what, where=place, mend=mend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Where one kind of row keeps what. Of several columns, the first that holds something counts.

    Parameters
    ----------
    name
        Who publishes such rows.
    marks
        The columns that tell it: all of them are given.
    prompt, answer, system, category
        Columns of the parts of an example.
    context
        Text that the prompt is about; it is put after the prompt.
    safe
        Column that says whether the answer is safe.
    unsafe_request
        Column, and the pattern of its values, where the request is unsafe.
    conversation
        Column that holds the turns.
    sides
        Columns of two answers or conversations, of which the user chooses one.
    candidates
        Columns of several answers, each with the one that says whether it is safe.
    choices, right
        Columns of the choices of a question, and of the right one (its text, letter or number).
    counted_from
        What the first choice is called where ``right`` is a number.
    known
        Further columns that are no part of an example.
    """

    name: str
    marks: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ("prompt", "question", "instruction", "query")
    answer: tuple[str, ...] = ("answer", "completion", "response", "output", "answers")
    context: tuple[str, ...] = ("input", "context", "passage", "passages", "document", "article")
    system: tuple[str, ...] = ("system", "system_prompt")
    category: tuple[str, ...] = ("category",)
    safe: str = "is_safe"
    unsafe_request: tuple[str, str] | None = None
    conversation: str = ""
    sides: tuple[str, ...] = ()
    candidates: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    right: str = ""
    counted_from: int = 0
    known: tuple[str, ...] = ()


PLAIN = Schema(name="prompt and answer")

SCHEMAS: tuple[Schema, ...] = (
    Schema(
        name="XSTest",
        marks=("prompt", "focus", "label"),
        unsafe_request=("label", "unsafe"),
        category=("type",),
        known=("note",),
    ),
    Schema(
        name="PKU-SafeRLHF",
        marks=("prompt", "response_0", "response_1"),
        candidates=(
            ("response_0", "is_response_0_safe"),
            ("response_1", "is_response_1_safe"),
        ),
    ),
    Schema(
        name="preference pairs",
        marks=("chosen", "rejected"),
        answer=(),
        sides=("chosen", "rejected"),
        # The chosen side once more, as some sets have it.
        known=("messages",),
    ),
    Schema(
        name="WildJailbreak",
        marks=("vanilla", "completion"),
        prompt=("adversarial", "vanilla"),
        unsafe_request=("data_type", ".*harmful"),
        known=("vanilla", "adversarial", "tactics"),
    ),
    Schema(
        name="ToxicChat",
        marks=("user_input", "model_output"),
        prompt=("user_input",),
        answer=("model_output",),
        unsafe_request=("toxicity", "1"),
        known=("openai_moderation",),
    ),
    Schema(
        name="StrongREJECT", marks=("forbidden_prompt",), prompt=("forbidden_prompt",)
    ),
    Schema(
        name="HarmBench",
        marks=("Behavior", "SemanticCategory"),
        prompt=("Behavior",),
        context=("ContextString",),
        category=("SemanticCategory",),
    ),
    Schema(
        name="JailbreakBench",
        marks=("Goal", "Target"),
        prompt=("Goal",),
        answer=("Target",),
        category=("Category",),
        known=("Behavior",),
    ),
    Schema(name="AdvBench", marks=("goal", "target"), prompt=("goal",), answer=("target",)),
    Schema(
        name="PIQA",
        marks=("goal", "sol1", "sol2"),
        prompt=("goal",),
        choices=("sol1", "sol2"),
        right="label",
    ),
    Schema(
        name="WMDP, MMLU",
        marks=("question", "choices", "answer"),
        choices=("choices",),
        right="answer",
        category=("category", "subject"),
    ),
    Schema(
        name="ARC, OpenBookQA, CommonsenseQA",
        marks=("choices", "answerKey"),
        prompt=("question", "question_stem"),
        choices=("choices",),
        right="answerKey",
        counted_from=1,
    ),
    Schema(
        name="TruthfulQA",
        marks=("question", "best_answer"),
        answer=("best_answer",),
        known=("correct_answers", "incorrect_answers"),
    ),
    Schema(name="TruthfulQA, choices", marks=("question", "mc1_targets"), answer=("mc1_targets",),
           known=("mc2_targets",)),
    *(
        replace(PLAIN, marks=(prompt, answer))
        for prompt in PLAIN.prompt
        for answer in PLAIN.answer
    ),
    *(
        Schema(name="BIG-bench", marks=("input", answer), prompt=("input",), answer=(answer,))
        for answer in ("target", *PLAIN.answer)
    ),
    *(
        Schema(name="conversations", marks=(column,), conversation=column)
        for column in ("messages", "conversations", "conversation")
    ),
    *(replace(PLAIN, marks=(prompt,)) for prompt in PLAIN.prompt),
)  # fmt: skip
"""Known schemas; the first whose marks are given is a row's."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: ``user``, ``assistant`` or ``system``."""

    role: str
    text: str


@dataclass(slots=True)
class Notes:
    """What was done to the rows of a source that a reader should know of, counted."""

    rows: Counter[str]
    """Rows of each kind of note, its text the key."""

    columns: dict[str, int]
    """Columns that hold text and were left out, with the rows that have it."""


def given(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row holds a value in ``column``."""
    return row.get(column) is not None


def schema_of(row: Mapping[str, Any]) -> Schema | None:
    """Return the schema of a row, None where none is known."""
    return next((one for one in SCHEMAS if all(given(row, mark) for mark in one.marks)), None)


def is_turn(value: Any) -> bool:
    """Whether ``value`` has the form of a turn of a conversation."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def examples_of(
    row: Mapping[str, Any],
    where: str,
    stream: str,
    *,
    columns: Mapping[str, str],
    needs_answer: bool,
    every_kind: bool = False,
    notes: Notes,
) -> list[Example]:
    """Return the examples of one row; none where the stream takes no rows of its kind.

    Parameters
    ----------
    columns
        For targets, the column or the template (``{question} {context}``) to use instead of the
        schema's; an empty one leaves the target out.

    Raises
    ------
    RowError
        The row cannot be read.
    """
    schema = schema_of(row) or PLAIN
    used = {"id", *schema.marks, *schema.known}
    reader = _Reader(row, where, stream, schema, columns, needs_answer, every_kind, notes, used)
    return reader.examples()


_Column = tuple[str, Any]


@dataclass(slots=True)
class _Texts:
    """What an example is made of; ``field`` is the answer's column."""

    prompt: str
    answer: str = ""
    accepted: tuple[str, ...] = ()
    system: str = ""
    field: str = "answer"


@dataclass(slots=True)
class _Reader:
    """One row while it is read; ``used`` grows by the columns that something was read from."""

    row: Mapping[str, Any]
    where: str
    stream: str
    schema: Schema
    columns: Mapping[str, str]
    needs_answer: bool
    every_kind: bool
    notes: Notes
    used: set[str]

    def examples(self) -> list[Example]:
        if self._is_other_kind() and not self.every_kind:
            return []
        found = [self._example(texts) for texts in self._texts()]
        for name, value in self.row.items():
            if name not in self.used and _carries_text(value):
                self.notes.columns[name] = self.notes.columns.get(name, 0) + 1
        return found

    def _is_other_kind(self) -> bool:
        """Whether the row is marked as one that the stream does not take."""
        if (safe := self._value("is_safe", (self.schema.safe,))) is not None:
            return _truth(safe[1], self.where, safe[0]) != SAFE_ANSWERS[self.stream]
        if self.schema.unsafe_request is None or "is_safe" in self.columns:
            return False
        column, unsafe = self.schema.unsafe_request
        if (found := self._value("is_safe", (column,))) is None:
            return False
        is_unsafe = re.fullmatch(unsafe, str(found[1]).strip(), re.IGNORECASE) is not None
        return is_unsafe == _SAFE_REQUESTS[self.stream]

    def _texts(self) -> list[_Texts]:
        schema, own = self.schema, {"prompt", "answer"} & set(self.columns)
        if schema.conversation and not own:
            self.used.add(schema.conversation)
            turns = turns_of(
                self.row[schema.conversation], self.where, schema.conversation, self.notes
            )
            return [self._exchange(turns, schema.conversation)]
        if schema.choices and not own:
            return [self._choice()]
        if schema.candidates and "answer" not in own:
            return self._candidates()
        prompt = self._value("prompt", schema.prompt)
        answer = self._value("answer", schema.answer)
        if schema.sides and answer is None:
            if self.needs_answer:
                one, other = schema.sides
                raise RowError(
                    "no side chosen",
                    f"holds two answers, {one} and {other}, and none is chosen",
                    where=self.where,
                    mend=f"choose one: --columns answer={one} or --columns answer={other}",
                )
            # Both sides begin with the same request.
            answer = None if prompt else (schema.sides[0], self.row[schema.sides[0]])
        return [self._pair(prompt, answer)]

    def _pair(self, prompt: _Column | None, answer: _Column | None) -> _Texts:
        """Return what a prompt and its answer say, each a text or a conversation."""
        replies = self._turns(answer, "assistant") if answer else None
        if answer and replies and any(turn.role == "user" for turn in replies):
            # The whole conversation; a prompt beside it says the same.
            self.used.update(self.schema.prompt)
            return self._exchange(replies, answer[0])
        if prompt is None:
            raise self._missing("prompt", self.schema.prompt)
        if answer is None and self.needs_answer:
            raise self._missing("answer", self.schema.answer)
        asked = self._turns(prompt, "user")
        if asked is None and replies is None:
            text = self._with_context(_text(prompt[1], self.where, prompt[0]))
            if answer is None:
                return _Texts(text, system=self._system())
            reply, accepted = _answer(answer[1], self.where, answer[0])
            return _Texts(text, reply, accepted, self._system(), answer[0])
        if asked is None:
            asked = [Turn("user", self._with_context(_text(prompt[1], self.where, prompt[0])))]
        elif not asked or asked[-1].role != "user":
            raise _roles(asked, self.where, prompt[0], "the last is due to be a user turn")
        if answer and replies is None:
            replies = [Turn("assistant", _text(answer[1], self.where, answer[0]))]
        elif answer and [turn.role for turn in replies or ()] != ["assistant"]:
            raise _roles(replies or (), self.where, answer[0], "one assistant turn is due")
        return self._exchange([*asked, *(replies or ())], answer[0] if answer else prompt[0])

    def _turns(self, column: _Column, role: str) -> list[Turn] | None:
        """Return the turns that a column holds, None where it is no conversation."""
        name, value = column
        if _is_conversation(value):
            return turns_of(value, self.where, name, self.notes)
        if not (isinstance(value, str) and _TRANSCRIPT.match(value)):
            return None
        parts = _TRANSCRIPT.split(_text(value, self.where, name))[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [
            Turn(roles[who], text.strip())
            for who, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        # A prompt of this form ends with the name of who speaks next.
        return turns[:-1] if role == "user" and not turns[-1].text else turns

    def _candidates(self) -> list[_Texts]:
        columns = [name for pair in self.schema.candidates for name in pair]
        self.used.update(columns)
        found = []
        for answer, safe in self.schema.candidates:
            if not given(self.row, safe):
                raise RowError(
                    "no side chosen",
                    f"holds several answers and no {safe}, which would tell them apart",
                    where=self.where,
                    mend=f"choose one: --columns answer={answer}",
                )
            is_safe = _truth(self.row[safe], self.where, safe)
            if self.every_kind or is_safe == SAFE_ANSWERS[self.stream]:
                found.append(self._pair(
                    self._value("prompt", self.schema.prompt), (answer, self.row[answer])
                ))  # fmt: skip
        return found if self.needs_answer else found[:1]

    def _choice(self) -> _Texts:
        schema = self.schema
        self.used.update((*schema.choices, schema.right))
        prompt = self._value("prompt", schema.prompt)
        if prompt is None:
            raise self._missing("prompt", schema.prompt)
        texts, labels = _choices(self.row, schema, self.where)
        lines = [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]
        asked = self._with_context(_text(prompt[1], self.where, prompt[0]))
        found = _Texts("\n".join((asked, *lines)), system=self._system(), field=schema.right)
        if self.needs_answer or given(self.row, schema.right):
            right = _right(self.row.get(schema.right), texts, labels, schema, self.where)
            found.answer = texts[right]
        return found

    def _exchange(self, turns: Sequence[Turn], field: str) -> _Texts:
        """Return the exchange that a conversation ends with; what came before is in its prompt."""
        spoken = list(turns)
        system = []
        while spoken and spoken[0].role == "system":
            system.append(spoken.pop(0).text)
        if any(turn.role == "system" for turn in spoken):
            raise _roles(turns, self.where, field, "a system turn is due to come first")
        if self.needs_answer and spoken and spoken[-1].role == "user" and len(spoken) > 1:
            spoken.pop()
            self.notes.rows["end with a user turn, which nothing answers: it is left out"] += 1
        answer = spoken.pop() if spoken and spoken[-1].role == "assistant" else None
        if not spoken or spoken[-1].role != "user" or (self.needs_answer and answer is None):
            raise _roles(turns, self.where, field, "a user turn and its answer are due")
        prompt = spoken[0].text
        if len(spoken) > 1:
            self.notes.rows[
                "hold more than one exchange: all before the last answer is their prompt, as one "
                "text with the turns marked User: and Assistant:"
            ] += 1
            prompt = "\n\n".join(f"{turn.role.title()}: {turn.text}" for turn in spoken)
        text = "\n\n".join(one for one in system if one.strip())
        if text and "system" in self.columns:
            self.notes.rows["have a system turn, which is left out as asked"] += 1
        if "system" in self.columns or not text:
            text = self._system()
        return _Texts(prompt, answer.text if answer else "", (), text, field)

    def _with_context(self, prompt: str) -> str:
        """Return the prompt with the text that it is about."""
        names: list[str | None] = [name for name in self.schema.context if name not in self.used]
        if "context" in self.columns:
            names = [None]
        elif "{" in self.columns.get("prompt", ""):
            names = []
        parts = [prompt]
        for name in names:
            if (found := self._value("context", [name] if name else [])) is not None:
                several = found[1] if isinstance(found[1], (list, tuple)) else [found[1]]
                parts += [_text(one, self.where, found[0]) for one in several]
        return "\n\n".join(part for part in parts if part is prompt or part.strip())

    def _system(self) -> str:
        found = self._value("system", self.schema.system)
        return "" if found is None else _text(found[1], self.where, found[0])

    def _example(self, texts: _Texts) -> Example:
        prompt = texts.prompt
        if not prompt.strip():
            columns = (*self.schema.prompt, self.schema.conversation)
            raise RowError(
                "empty prompt",
                "the prompt is empty",
                where=self.where,
                field=next((name for name in columns if given(self.row, name)), "prompt"),
                mend="give it a text or remove the row",
            )
        if self.needs_answer and not texts.answer.strip():
            raise RowError(
                "empty answer",
                "the answer is empty",
                where=self.where,
                field=texts.field,
                mend="give it a text or remove the row; only the stream prompts has no answers",
            )
        if texts.system.strip():
            self.notes.rows[
                "have a system text: it is kept in front of the prompt "
                "(--columns system= leaves it out)"
            ] += 1
            prompt = f"{texts.system}\n\n{prompt}"
        fields = {
            name: _text(found[1], self.where, found[0])
            for name in TEXT_FIELDS
            if (found := self._value(name, (name,))) is not None
        }
        category = self._value("category", self.schema.category)
        accepted = self._value("accepted", ("accepted",))
        return Example(
            prompt=prompt,
            answer=texts.answer,
            category=_category(category[1], self.where) if category else "",
            accepted=_accepted(accepted[1], self.where) if accepted else texts.accepted,
            place=self.where,
            **fields,
        )

    def _value(self, target: str, names: Sequence[str]) -> _Column | None:
        """Return the column that ``target`` is read from, and its value; None where none has one.

        Of several columns the first that is not blank counts.
        """
        if target in self.columns:
            return self._mapped(self.columns[target])
        held = [name for name in names if given(self.row, name)]
        if not held:
            return None
        name = next((name for name in held if not _is_blank(self.row[name])), held[0])
        self.used.add(name)
        return name, self.row[name]

    def _mapped(self, source: str) -> _Column | None:
        """Return the column, or the filled template, that the user named for a target."""
        if not source:
            return None
        names = _BRACED.findall(source)
        for name in names or [source]:
            if name not in self.row:
                raise RowError(
                    "no such column",
                    f"has no column {printable(name, limit=_NAME_LIMIT)!r}, which --columns names",
                    where=self.where,
                    mend=f"columns found: {self._found()}; for one stream alone write its name "
                    f"first, as in --columns {self.stream}:prompt=question",
                )
        self.used.update(names or [source])
        if not names:
            value = _number_as_text(self.row[source])
            return None if value is None else (source, value)
        texts = {
            name: "" if value is None else _text(value, self.where, name)
            for name in names
            for value in (_number_as_text(self.row[name]),)
        }
        return source, _BRACED.sub(lambda found: texts[found[1]], source)

    def _found(self) -> str:
        names = [printable(str(name), limit=_NAME_LIMIT) for name in self.row]
        more = len(names) - _NAMES_SHOWN
        return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "") or "none"

    def _missing(self, target: str, names: Sequence[str]) -> RowError:
        return RowError(
            f"no {target}",
            f"missing field {names[0]!r}",
            where=self.where,
            mend=f"columns found: {self._found()}; say which hold the texts, as in {MAPPING}, or "
            f"give one of {', '.join(names)}, or messages with a user and an assistant turn",
        )


def turns_of(value: Any, where: str, field: str, notes: Notes) -> list[Turn]:
    """Return the turns of a conversation, in one of the forms that are in use.

    A turn has ``role`` and ``content`` (OpenAI) or ``from`` and ``value`` (ShareGPT); its content
    is a text or a list of text parts.

    Raises
    ------
    RowError
        Anything else, tool calls and pictures among it.
    """
    if not _is_conversation(value) or not all(is_turn(turn) for turn in value):
        raise RowError(
            "not a conversation",
            "is not a list of turns",
            where=where,
            field=field,
            mend='give turns {"role": ..., "content": ...}',
        )
    return [_turn(turn, where, field, notes) for turn in value]


def _turn(turn: Mapping[str, Any], where: str, field: str, notes: Notes) -> Turn:
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(str(named).strip().casefold())
    if role is None or turn.get("tool_calls") or turn.get("function_call"):
        held = "a tool call" if role else f"the role {printable(str(named), limit=_NAME_LIMIT)!r}"
        raise RowError(
            "tool turns",
            f"holds {held}; only system, user and assistant turns of text are read",
            where=where,
            field=field,
            mend="take the turns of tools out, or leave out the row",
        )
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, (list, tuple)):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text"
            else part if isinstance(part, str) else None
            for part in content
        ]  # fmt: skip
        if not all(isinstance(text, str) for text in texts):
            raise RowError(
                "content other than text",
                "holds a turn with content that is not text",
                where=where,
                field=field,
                mend="leave out the row: only text is read",
            )
        content = "".join(map(str, texts))
    if content is None:
        raise RowError(
            "not a conversation",
            "is not a list of turns: one has no content",
            where=where,
            field=field,
            mend='give turns {"role": ..., "content": ...}',
        )
    for extra in ("thinking", "reasoning_content"):
        if turn.get(extra):
            notes.columns[extra] = notes.columns.get(extra, 0) + 1
    return Turn(role, _text(content, where, field))


def _roles(turns: Sequence[Turn], where: str, field: str, due: str) -> RowError:
    held = ", ".join(turn.role for turn in turns[:_NAMES_SHOWN]) or "none"
    return RowError(
        "not an exchange",
        f"holds the roles {held}; {due}",
        where=where,
        field=field,
        mend="give conversations that end with a user turn and its answer",
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not any(isinstance(one, str) for one in value)


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(
            "not text",
            f"is {type(value).__name__}, not text",
            where=where,
            field=name,
            mend="write the value as text",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "not text",
            "holds half a surrogate pair, which is no valid text",
            where=where,
            field=name,
            mend="write the character itself, or both halves of its escape",
        ) from None
    return value


def _number_as_text(value: Any) -> Any:
    """Return a number as the text that whoever named its column wants."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _answer(value: Any, where: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Return an answer and, where a set gives several right ones, all of them."""
    if isinstance(value, Mapping):
        if "choices" in value and "labels" in value:  # TruthfulQA
            pairs = zip(_list(value["choices"]), _list(value["labels"]), strict=False)
            value = [text for text, label in pairs if label == 1]
        else:
            value = value.get("text", value)  # SQuAD
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
        texts = tuple(dict.fromkeys(_text(one, where, name) for one in value))
        return texts[0], texts
    if isinstance(value, (list, tuple)) and not value:
        return "", ()
    return _text(value, where, name), ()


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _choices(row: Mapping[str, Any], schema: Schema, where: str) -> tuple[list[str], list[str]]:
    """Return the choices of a question and what each is called."""
    values: Any = [row[name] for name in schema.choices]
    labels: list[Any] = []
    if len(values) == 1:
        (values,) = values
        if isinstance(values, str):  # CSV holds a list as text
            try:
                values = json.loads(values)
            except (ValueError, RecursionError):
                values = [values]
        if isinstance(values, Mapping):
            labels, values = _list(values.get("label")), values.get("text")
        values = _list(values)
    texts = [_text(value, where, schema.choices[0]) for value in values]
    letters = [*string.ascii_uppercase[: len(texts)]]
    labels = [str(label) for label in labels] if len(labels) == len(texts) else letters
    if len(texts) < 2 or len(labels) != len(texts):
        raise RowError(
            "no choices",
            f"holds {len(texts)} choices",
            where=where,
            field=schema.choices[0],
            mend="give 2 to 26 choices as a list of texts",
        )
    return texts, labels


def _right(
    value: Any, texts: Sequence[str], labels: Sequence[str], schema: Schema, where: str
) -> int:
    """Return the index of the right choice."""
    text = str(value).strip()
    for known in (labels, texts):
        if text in known:
            return list(known).index(text)
    if re.fullmatch(r"\d{1,2}", text) and 0 <= int(text) - schema.counted_from < len(texts):
        return int(text) - schema.counted_from
    raise RowError(
        "no answer",
        f"names none of the {len(texts)} choices",
        where=where,
        field=schema.right,
        mend="give the number, letter or text of the right choice",
    )


def _category(value: Any, where: str) -> str:
    # Some published sets (BeaverTails) give a truth value for every category, and have commas in
    # the names.
    if isinstance(value, Mapping):
        value = [name for name, holds in value.items() if holds]
    if isinstance(value, (list, tuple)):
        return ",".join(_text(name, where, "category").replace(",", "/") for name in value)
    return _text(value, where, "category")


def _truth(value: Any, where: str, column: str) -> bool:
    named = {"true": True, "false": False, "1": True, "0": False}
    # CSV knows text only, and some copies count in 0 and 1.
    found = named.get(str(value)[:8].strip().casefold())
    if found is None:
        raise RowError(
            "no truth value",
            "is no truth value",
            where=where,
            field=column,
            mend="write true or false",
        )
    return found


def _accepted(value: Any, where: str) -> tuple[str, ...]:
    if value == "":
        return ()
    answers = value.split("|") if isinstance(value, str) else value
    if not isinstance(answers, (list, tuple)):
        raise RowError(
            "not text",
            f"is {type(value).__name__}, not a list of texts",
            where=where,
            field="accepted",
            mend='write ["one answer", "another"]',
        )
    return tuple(_text(answer, where, "accepted") for answer in answers)


def _carries_text(value: Any, depth: int = _DEPTH_SEARCHED) -> bool:
    """Whether a value holds a text of several words, rather than a name, a number or a hash."""
    if isinstance(value, str):
        return len(value.split(maxsplit=_WORDS_OF_A_TEXT)) >= _WORDS_OF_A_TEXT
    if depth and isinstance(value, Mapping):
        return any(_carries_text(one, depth - 1) for one in value.values())
    if depth and isinstance(value, (list, tuple)):
        return any(_carries_text(one, depth - 1) for one in value)
    return False
