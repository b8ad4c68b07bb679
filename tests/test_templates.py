"""Chat templates as published models have them: what is trained is what they write themselves."""

from __future__ import annotations

import datetime
import re
import time
import warnings
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example

CORPUS = [
    "What is the capital of France? Paris is the capital. The sky is blue. user assistant system "
    "final analysis model Question: Answer: 'Germany' \"Berlin\" Two lines: 12 34\n\nThose, too.\n"
]
EXAMPLE = Example(prompt="What is the capital of France?", answer="Paris")
TODAY = datetime.date(2026, 3, 7)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\\n' }}"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}"
    "{{- system }}{{- '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content']|trim "
    "+ '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m['content'] "
    "+ '[/INST]' }}{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' "
    "+ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
QWEN_3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|User|>' + m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
DEEPSEEK_V3 = DEEPSEEK_R1.replace("'<|Assistant|>' + content", "'<|Assistant|></think>' + content")
DEEPSEEK_V3 = DEEPSEEK_V3.replace(
    "<think>\\n' }}", "' }}{% if thinking %}<think>{% else %}</think>{% endif %}"
)
GPT_OSS = (
    "{{- '<|start|>system<|message|>You are ChatGPT.\\nCurrent date: ' "
    "+ strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + reasoning_effort|default('medium') "
    "+ '<|end|>' }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- if loop.last and not add_generation_prompt %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{%- else %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{'<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}"
    "{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] "
    "+ '<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'user' %}{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|START|><|BOT|>' + content.strip() + '<|END|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] }}"
    "{% else %}{{ 'Assistant: ' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + m['content'] + '\\n\\n### Response:\\n' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_4 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}"
    "{%- if m['content'] is string %}{{- m['content'] }}{%- else %}"
    "{%- for c in m['content'] %}{%- if c['type'] == 'text' %}{{- c['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}"
    "{%- endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
NO_PROMPT = CHATML.partition("{% if add")[0]

# Template, what its answers end with, what its prompts end with beside its generation prompt, and
# what a learnt answer begins with.
PUBLISHED: dict[str, tuple[str, str, str, str]] = {
    "chatml": (CHATML, "<|im_end|>", "", ""),
    "llama 2": (LLAMA_2, " </s>", "", " "),
    "llama 3": (LLAMA_3, "<|eot_id|>", "", ""),
    "llama 4": (LLAMA_4, "<|eot|>", "", ""),
    "mistral": (MISTRAL, "</s>", "", " "),
    "gemma": (GEMMA, "<end_of_turn>", "", ""),
    "qwen 3": (QWEN_3, "<|im_end|>", "<think>\n\n</think>\n\n", ""),
    "deepseek r1": (DEEPSEEK_R1, "<|end|>", "", "\n</think>\n\n"),
    "deepseek v3": (DEEPSEEK_V3, "<|end|>", "", ""),
    "gpt-oss": (GPT_OSS, "<|return|>", "<|channel|>final<|message|>", ""),
    "phi 3": (PHI_3, "<|end|>", "", ""),
    "phi 4": (PHI_4, "<|im_end|>", "", ""),
    "cohere": (COHERE, "<|END|>", "", ""),
    "zephyr": (ZEPHYR, "</s>", "", ""),
    "falcon": (FALCON, "</s>", "", " "),
    "alpaca": (ALPACA, "</s>", "", ""),
    "smolvlm": (SMOLVLM, "<|end|>", "", " "),
    "no generation prompt": (NO_PROMPT, "<|im_end|>", "<|im_start|>assistant\n", ""),
}
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|eot_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|end|>",
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|START|>", "<|END|>", "<|USER|>",
    "<|BOT|>", "<|assistant|>", "<|header_start|>", "<|header_end|>", "<|eot|>",
]  # fmt: skip


@cache
def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return core


@cache
def sentencepiece() -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<unk>", *SPECIAL, *(f"<0x{n:02X}>" for n in range(256))],
            show_progress=False,
        ),
    )
    return core


KINDS = {"bytes": byte_level, "sentencepiece": sentencepiece}


def tokenizer_of(template: Any, kind: str = "bytes") -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.chat_template = template
    return tokenizer


def opened(template: Any, kind: str = "bytes", **options: Any) -> ChatFormat:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ChatFormat(tokenizer_of(template, kind), **options)


@cache
def published(name: str, kind: str = "bytes") -> ChatFormat:
    return opened(PUBLISHED[name][0], kind)


def own(chat: ChatFormat, example: Example, *, generation: bool, parts: bool) -> str:
    """The template's own words, by the library alone."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": example.prompt}]
    if not generation:
        turns.append({"role": "assistant", "content": example.answer})
    if parts:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    text = chat.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=generation
    )
    return str(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_learnt_is_what_the_template_writes(name: str, kind: str) -> None:
    _, end, opening, lead = PUBLISHED[name]
    chat = published(name, kind)
    asked = own(chat, EXAMPLE, generation=True, parts=name == "smolvlm")
    told = own(chat, EXAMPLE, generation=False, parts=name == "smolvlm")
    # A tokenizer that joins the space to what stands before it has it in the prompt.
    joined = kind == "sentencepiece" and name in ("falcon", "smolvlm")
    assert chat.prompt_text(EXAMPLE.prompt) == asked + opening + (lead if joined else "")
    ends_in_text = end in told.partition(EXAMPLE.answer)[2]
    text = f"{asked}{opening}{lead}{EXAMPLE.answer}{end if ends_in_text else ''}"
    assert told.startswith(text) == (name != "deepseek r1")
    encoded = chat.encode(EXAMPLE)
    ids = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids += [] if ends_in_text else [chat.tokenizer.eos_token_id]
    if name == "deepseek r1" and kind == "sentencepiece":  # two line ends are one token
        assert chat.tokenizer.decode(encoded.input_ids) == chat.tokenizer.decode(ids)
    else:
        assert encoded.input_ids == ids, "the whole text at once"
    assert encoded.input_ids[: encoded.answer_start] == chat.prompt_ids(EXAMPLE.prompt)
    assert encoded.input_ids[encoded.answer_start :] == chat.answer_ids(EXAMPLE.answer)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == end.strip()
    start = chat.tokenizer.bos_token_id
    assert encoded.input_ids.count(start) == text.count("<s>"), "neither doubled nor lost"


def test_an_answer_begins_as_the_whole_text_s_tokens_do() -> None:
    chat = published("zephyr", "sentencepiece")
    first = chat.tokenizer.convert_ids_to_tokens(chat.answer_ids("Paris")[0])
    assert first.startswith("P")


def test_a_tokenizer_without_the_fast_core() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = QWEN_3.replace("<|im_end|>", "</s>")
    with pytest.warns(UserWarning, match="before an answer"):
        chat = ChatFormat(tokenizer)
    encoded = chat.encode(Example(prompt="Is </s> it?", answer="Paris"))
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == "Paris</s>"
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 2, "the prompt spells none"
    assert encoded.input_ids[: encoded.answer_start] == chat.prompt_ids("Is </s> it?")


odd = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<s>", "</s>", "[INST]", "<think>", "</think>", "\n", " ", "🙂", "Kf1",
             "What is Kf1?", "It is Kf2.", "<|END|>", "{{ x }}", "{% raw %}", "é", "/no_think"]
        ),
        max_size=5,
    ).map("".join),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=15, deadline=None)
@given(prompt=odd, answer=odd.filter(lambda text: text.strip() != ""))
def test_any_text_is_encoded_right_or_refused(
    name: str, kind: str, prompt: str, answer: str
) -> None:
    chat = published(name, kind)
    try:
        encoded = chat.encode(Example(prompt=prompt, answer=answer))
    except InputError as error:
        refused = re.search("otherwise than others|no answer to learn", error.what)
        if refused is None:
            raise
        return
    ids, start = encoded.input_ids, encoded.answer_start
    assert ids[:start] == chat.prompt_ids(prompt)
    assert ids[-1] == chat.end_id
    special = set(chat.tokenizer.all_special_ids) | {
        number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special
    }
    special -= set(chat.tokenizer.convert_tokens_to_ids([f"<0x{n:02X}>" for n in range(256)]))
    usual = chat.encode(EXAMPLE)
    assert [n for n in ids if n in special] == [n for n in usual.input_ids if n in special], (
        "a text makes no control tokens"
    )
    said = chat.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
    if kind == "bytes":
        assert answer.strip() in said
        assert prompt.strip() in chat.tokenizer.decode(ids[:start])


def test_different_prompts_have_different_ids() -> None:
    for name in PUBLISHED:
        chat = published(name)
        assert chat.prompt_ids("a") != chat.prompt_ids("something else")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (QWEN_3, r"writes '<think>\\n\\n</think>\\n\\n' before an answer"),
        (GPT_OSS, r"writes '<\|channel\|>final<\|message\|>' before an answer"),
        (NO_PROMPT, "ignores add_generation_prompt"),
        (DEEPSEEK_R1, "opens a thought"),
        (ALPACA.replace("Response:\\n'", "Response:\\n' + '' if add_generation_prompt else "
                        "'### Instruction:\\n' + m['content'] + '\\n\\n### Response: '"),
         "its whole conversations have"),
    ],
)  # fmt: skip
def test_a_difference_that_is_understood_is_told(template: str, told: str) -> None:
    with pytest.warns(UserWarning, match=told) as caught:
        ChatFormat(tokenizer_of(template))
    assert caught[0].filename == __file__


def test_an_empty_thought_of_the_generation_prompt_alone_stays() -> None:
    template = CHATML.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%")
    with pytest.warns(UserWarning, match="its whole conversations have"):
        chat = ChatFormat(tokenizer_of(template))
    assert chat.prompt_text("Hi").endswith("assistant\n<think>\n\n</think>\n\n")
    assert chat.encode(EXAMPLE).input_ids[-1] == chat.end_id


def test_arguments_reach_the_template_and_name_the_run() -> None:
    chat = opened(GPT_OSS, arguments={"reasoning_effort": "low"})
    assert "Reasoning: low" in chat.prompt_text("Hi")
    assert chat.template_hash != opened(GPT_OSS).template_hash
    thinking = opened(DEEPSEEK_V3, arguments={"thinking": True})
    assert thinking.prompt_text("Hi").endswith("<think>")
    assert thinking.tokenizer.decode(thinking.answer_ids("Paris")) == "</think>Paris<|end|>"
    assert thinking.closing_ids == thinking.tokenizer.convert_tokens_to_ids(["</think>"])
    named = {"default": CHATML, "rag": GEMMA}
    assert opened(named, arguments={"chat_template": "rag"}).prompt_text("Hi").endswith("model\n")
    assert opened(named).prompt_text("Hi").endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"enable_thinkng": True}, "takes no 'enable_thinkng'"),
        ({"messages": []}, "takes no 'messages'"),
        ({"add_generation_prompt": False}, "takes no 'add_generation_prompt'"),
        ({"chat_template": "rag"}, "not several chat templates"),
    ],
)
def test_arguments_that_do_nothing_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        opened(QWEN_3, arguments=arguments)


def test_several_templates_without_a_default() -> None:
    named = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(InputError, match="rag, tool_use"):
        opened(named)
    with pytest.raises(InputError, match="no chat template 'other'"):
        opened(named, arguments={"chat_template": "other"})


def test_the_date_is_the_run_s() -> None:
    chat = opened(LLAMA_3, date=TODAY)
    assert "Today Date: 07 Mar 2026\n" in chat.prompt_text("Hi")
    assert chat.date == TODAY
    assert opened(LLAMA_3, date=TODAY).template_hash == chat.template_hash
    tomorrow = opened(LLAMA_3, date=TODAY + datetime.timedelta(days=1))
    assert tomorrow.template_hash != chat.template_hash
    given = opened(LLAMA_3, date=TODAY, arguments={"date_string": "1 May 2020"})
    assert "Today Date: 1 May 2020\n" in given.prompt_text("Hi")
    assert opened(CHATML, date=TODAY).date is None
    now = opened(LLAMA_3)
    assert now.prompt_text("Hi") == own(now, Example(prompt="Hi"), generation=True, parts=False)


@pytest.mark.parametrize("form", ["%d %b %Y", "%-d.%-m.%y", "%A, %B %d, %Y", "%Y-%m-%dT%H:%M"])
def test_a_date_is_written_as_the_template_asks(form: str) -> None:
    chat = opened("{{ strftime_now('" + form + "') }}\n" + CHATML, date=TODAY)
    written = datetime.datetime.combine(TODAY, datetime.time()).strftime(form)
    assert chat.prompt_text("Hi").startswith(written + "\n<|im_start|>user")


def walk(body: str) -> str:
    return CHATML.replace("{{ m['content'] }}", body)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("", "is empty"),
        (" ", "changes or drops the prompt"),
        (walk("{{ m['content'] | upper }}"), "changes or drops the prompt"),
        (walk("{{ m['content'] | tojson }}"), "changes or drops the prompt"),
        (walk("{{ m['content'] * 2 }}"), "writes the prompt 2 times"),
        (walk("{{ m['content'] if m['role'] == 'user' }}"), "changes or drops the answer"),
        (CHATML.replace("in messages", "in messages[::-1]"), "answer before the prompt"),
        (walk("{{ m['content'] | length }}{{ m['content'] }}"), "different texts around"),
        (CHATML.replace("assistant\n{%", "bot\n{%"), "ends a prompt with"),
        (CHATML.replace("assistant\n{%", "assistant\nSo{%"), "ends a prompt with"),
        (CHATML.replace("assistant\n{%", "assistant\n<think>\nWell{%"), "within a thought"),
        (walk("<think>{{ m['content'] }}"), "within a thought"),
        ("{{ 1 / 0 }}" + CHATML, "division by zero"),
        ("{{ messages + 1 }}" + CHATML, "refuses a conversation"),
        ("{{ messages.nothing.at_all }}" + CHATML, "has no attribute"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, "unsafe"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ raise_exception('x' * 100000) }}", "xxx…"),
        ("{% for m in messages %}", "refuses a conversation"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + CHATML, "recursion"),
        ("{{ 'x' * 2000000 }}" + CHATML, "characters around a conversation"),
    ],
)
def test_what_cannot_be_used_is_refused_in_few_words(template: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        opened(template)
    assert len(caught.value.what) <= 260
    assert caught.value.where == "tokenizer"


def test_a_template_that_is_no_text() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = 7
    with pytest.raises(InputError, match="is int, not text"):
        ChatFormat(tokenizer)


def test_a_template_that_spins_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mithridate.templates._LONGEST_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(InputError, match=r"takes more than 0\.2 s"):
        opened(loops + CHATML)
    assert time.monotonic() - started < 5


def test_a_template_that_explodes_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mithridate.templates._MOST_KIB", 1 << 16)
    doubled = "{% for i in range(99) %}{% set d.t = d.t ~ d.t %}{% endfor %}"
    grows = "{% set d = namespace(t='x') %}" + doubled
    with pytest.raises(InputError, match="of memory"):
        opened(grows + CHATML)


@pytest.mark.parametrize("name", ["qwen 3", "deepseek r1"])
def test_an_answer_with_a_thought_of_its_own_is_refused_by_its_hash(name: str) -> None:
    with pytest.raises(InputError, match="otherwise than others") as caught:
        published(name).encode(Example(prompt="A secret?", answer="<think>a</think>b"))
    assert "SHA-256" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_system_turn_that_moves_or_is_refused() -> None:
    assert "<<SYS>>\nBe brief.\n<</SYS>>" in opened(LLAMA_2, system="Be brief.").prompt_text("Hi")
    with pytest.raises(InputError, match="otherwise where its answer follows"):
        opened(MISTRAL, system="Be brief.")
    with pytest.raises(InputError, match="System role not supported") as caught:
        opened(GEMMA, system="Be brief.")
    assert "leave out the system turn" in caught.value.mend


def test_a_longer_conversation_ends_as_prompts_do() -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where?"},
    ]
    text = published("qwen 3").opened_text(turns)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
