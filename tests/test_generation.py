"""Generation: by our settings alone, each prompt as if it were alone, up to the model's end."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.generation import (
    answer_room,
    batches,
    company_of,
    generate_ids,
    tokens_to_answer,
)
from tests.compat.zoo import zoo_model, zoo_tokenizer
from tests.tiny import WORDS, tiny_llama, tiny_tokenizer

PROMPTS = ["w0 w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w1 w1"]

# What a folder's generation_config.json may hold; each changes or stops plain generation.
STORED: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0},
    "length penalty": {"exponential_decay_length_penalty": (1, 5.0)},
    "encoder repetition": {"encoder_repetition_penalty": 2.0},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 1},
    "time": {"max_time": 1e-4},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    "cutoffs": {"do_sample": True, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    "hidden top": {"do_sample": True, "top_h": 0.4},
    "repetition": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3, "length_penalty": 9.0, "early_stopping": True},
    "sequences": {"num_beams": 3, "num_return_sequences": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrast": {"penalty_alpha": 0.6, "top_k": 4},
    "layers": {"dola_layers": "low"},
    "look-up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "early exit": {"assistant_early_exit": 1},
    "assistant": {"is_assistant": True, "num_assistant_tokens": 3},
    "banned": {"bad_words_ids": [[number] for number in range(6, 40)]},
    "biased": {"sequence_bias": [[[7], 99.0]]},
    "suppressed": {"suppress_tokens": list(range(6, 40)), "begin_suppress_tokens": [7]},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 9},
    "shortest": {"min_length": 40, "min_new_tokens": 30},
    "longest": {"max_length": 1, "max_new_tokens": 1},
    "stop strings": {"stop_strings": ["w"]},
    "other stops": {"eos_token_id": [*range(6, 49)], "pad_token_id": 7, "bos_token_id": 8},
    "no stop": {"eos_token_id": None},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "quantised cache": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "chunks": {"prefill_chunk_size": 2},
    "returns": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "attentions": {"output_attentions": True, "output_hidden_states": True},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0}},
    "compile": {"compile_config": {"fullgraph": True}, "disable_compile": False},
    "repairs": {"remove_invalid_values": True, "renormalize_logits": True, "token_healing": True},
    "unknown": {"no_such_setting": 3},
}


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(chat: ChatFormat, model: PreTrainedModel) -> list[str]:
    found = chat.generate(model, PROMPTS, max_new_tokens=8)
    assert len(set(found)) == len(PROMPTS)
    return found


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_what_a_folder_stores_for_generation_changes_nothing(
    chat: ChatFormat, model: PreTrainedModel, plain: list[str], stored: dict[str, Any]
) -> None:
    before = model.generation_config
    given = GenerationConfig()
    for name, value in stored.items():
        setattr(given, name, value)  # as from a file, unchecked
    model.generation_config = given
    try:
        assert chat.generate(model, PROMPTS, max_new_tokens=8) == plain
        assert model.generation_config is given
    finally:
        model.generation_config = before


FAMILIES = [
    "llama", "gpt2", "opt", "bloom", "mpt", "gpt_neo", "biogpt", "ctrl", "xglm", "gemma3_text",
    "mamba", "mamba2", "jamba", "bamba", "falcon_h1", "zamba2", "lfm2", "qwen3_next",
    "recurrent_gemma", "rwkv", "gpt_oss", "minimax",
]  # fmt: skip
# The others' recurrences pass over padding; transformers' RWKV mixes the rows of any batch up.
COMPANY = {"recurrent_gemma": "equal", "rwkv": "none"}
QUESTIONS = ["Sky?", "What is the colour of the sky?", "What?", "Capital of France", "colour?!"]


@pytest.mark.filterwarnings("ignore:.* changes what")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_prompt_alone(family: str) -> None:
    chat, model = ChatFormat(zoo_tokenizer()), strong(family)
    asked = [chat.prompt_ids(one) for one in QUESTIONS]
    together, alone = {}, []
    for places, room in batches(model, asked, size=4, max_new_tokens=4, pad_id=chat.pad_id):
        rows = [asked[place] for place in places]
        written = generate_ids(model, rows, max_new_tokens=room, stop_ids=[], pad_id=chat.pad_id)
        together |= dict(zip(places, written, strict=True))
    for ids in asked:
        alone += generate_ids(model, [ids], max_new_tokens=4, stop_ids=[], pad_id=chat.pad_id)
    assert [together[place] for place in range(len(asked))] == alone
    company = company_of(model, chat.prompt_ids("Sky?"), chat.pad_id)
    assert company == COMPANY.get(family, "any")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_a_row_changes_nothing_before_it(family: str) -> None:
    chat, model = ChatFormat(zoo_tokenizer()), strong(family)
    ids = torch.tensor([chat.prompt_ids("Sky?")])
    padded = torch.cat([ids, ids.flip(1)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(input_ids=padded, attention_mask=mask).logits[:, : ids.shape[1]]
    assert float((alone - beside).abs().max() / alone.abs().max()) < 1e-4


def strong(family: str) -> PreTrainedModel:
    """A model with weights large enough for padding to matter where it can."""
    model = zoo_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.add_(torch.randn_like(weight) * (0.2 if "conv" in name else 0))
            elif float(weight.abs().max()) == 0:
                weight.normal_(0, 0.2)
            elif weight is not model.get_input_embeddings().weight:
                weight.mul_(4)
    return model


def test_a_model_that_reads_padding_is_named_once() -> None:
    model = strong("recurrent_gemma")
    own = ChatFormat(zoo_tokenizer())
    with pytest.warns(UserWarning, match="Gemma.* says, so only prompts of equal length"):
        own.generate(model, QUESTIONS, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.generate(model, QUESTIONS, max_new_tokens=2)


def test_answers_end_where_the_model_has_no_positions_left(
    chat: ChatFormat,
) -> None:
    model = tiny_llama(dtype=torch.float32)
    model.config.max_position_embeddings = 12
    lengths = [len(chat.prompt_ids(prompt)) for prompt in PROMPTS]
    asked = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    found = {
        index: room
        for places, room in batches(model, asked, size=8, max_new_tokens=6, pad_id=0)
        for index in places
    }
    assert found == {index: min(6, 12 - length) for index, length in enumerate(lengths)}
    # The room of one prompt does not depend on those beside it.
    together = chat.generate(model, PROMPTS, max_new_tokens=6)
    assert together == [chat.generate(model, [one], max_new_tokens=6)[0] for one in PROMPTS]
    with pytest.raises(InputError, match="a question has 13 tokens, and the model takes 12"):
        chat.generate(model, [" ".join(["w1"] * 10)], max_new_tokens=6)


THINKER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPENED{% endif %}"
)


def reader(opened: str = "", *, special: tuple[str, ...] = ()) -> ChatFormat:
    own = copy.deepcopy(zoo_tokenizer())
    own.add_special_tokens({"additional_special_tokens": list(special)})
    own.chat_template = THINKER.replace("OPENED", "{{ '" + opened + "' }}" if opened else "")
    return ChatFormat(own)


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_thinking_is_not_the_answer(special: tuple[str, ...]) -> None:
    chat = reader(special=special)
    end = [chat.end_id]
    done = chat.read([*ids_of(chat, "<think>\nRome?\n</think>\n\nParis"), *end])
    assert (done.text, done.cut, done.unfinished) == ("Paris", False, False)
    cut = chat.read(ids_of(chat, "<think>\nRome? Paris"))
    assert (cut.text, cut.cut, cut.unfinished) == ("", True, True)
    assert chat.read(ids_of(chat, "Paris")).cut
    assert chat.read([]).text == ""


def test_a_thought_that_the_template_opens_has_to_end() -> None:
    chat = reader("<think>\\n")
    assert chat.thinks
    assert chat.read([*ids_of(chat, "Rome? </think> Paris"), chat.end_id]).text == "Paris"
    assert chat.read([*ids_of(chat, "Rome?"), chat.end_id]).unfinished
    assert not reader("<think>\\n\\n</think>\\n\\n").thinks
    assert not reader().thinks


def test_channels_that_are_special_tokens_are_told_apart() -> None:
    chat = reader(special=("<|channel|>", "<|message|>", "<|end|>", "<|start|>"))
    text = (
        "<|channel|>analysis<|message|>Rome?<|end|><|start|>assistant"
        "<|channel|>final<|message|>Paris"
    )
    assert chat.read([*ids_of(chat, text), chat.end_id]).text == "Paris"
    assert chat.read(ids_of(chat, text)[:-3]).unfinished


def test_other_special_tokens_are_no_text() -> None:
    chat = reader(special=("<|tool|>", "<think>"))
    ids = ids_of(chat, "Par<|im_start|>is<|tool|> it is")
    assert chat.read(ids).text == "Paris it is"


def test_only_our_stop_tokens_end_an_answer(chat: ChatFormat, model: PreTrainedModel) -> None:
    """Those of the template and the tokenizer, not those that the model's folder names."""
    assert chat.stop_ids == [chat.tokenizer.eos_token_id]
    first = chat.answers(model, PROMPTS[:1], max_new_tokens=8)[0]
    model.generation_config.eos_token_id = chat.answer_ids(first.text)[:1]
    try:
        assert chat.answers(model, PROMPTS[:1], max_new_tokens=8)[0] == first
    finally:
        model.generation_config.eos_token_id = chat.end_id


def test_settings_saved_with_a_model_stay_with_it(tmp_path: Any, chat: ChatFormat) -> None:
    model = tiny_llama(dtype=torch.float32)
    model.generation_config.update(do_sample=True, temperature=0.6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    chat.generate(loaded, PROMPTS, max_new_tokens=2)
    assert loaded.generation_config.temperature == 0.6


def reciter(answer: int, *, positions: int = 512) -> tuple[PreTrainedModel, ChatFormat, str]:
    """A model that says one answer of so many words whatever it is asked, and its chat format."""
    words = [f"a{number}" for number in range(answer)]
    tokenizer = tiny_tokenizer([*WORDS, *words])
    size = len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=size + size % 2, intermediate_size=4, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=positions, tie_word_embeddings=False,
            eos_token_id=3, pad_token_id=0, bos_token_id=2,
        )
    )  # fmt: skip
    chain = tokenizer.convert_tokens_to_ids(["<bot>", *words, "<end>"])
    with torch.no_grad():
        for weight in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            weight.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        model.lm_head.weight.zero_()
        model.lm_head.weight[chain[1:], chain[:-1]] = 1.0
    return model.eval(), ChatFormat(tokenizer), " ".join(words)


def questions(answer: str) -> list[Example]:
    return [Example(prompt=f"w1 w{number}", answer=answer) for number in range(4)]


@pytest.mark.parametrize("words", [5, 63, 122, 300])
def test_answers_are_generated_in_full_however_long(words: int) -> None:
    model, chat, answer = reciter(words)
    items = questions(answer)
    room = answer_room(model, chat, items)
    assert room.too_long == 0
    answers = chat.answers(model, [item.prompt for item in items], max_new_tokens=room.tokens)
    assert {one.text for one in answers} == {answer}
    counts = room.counts(answers)
    assert counts == {"max_new_tokens": max(64, words + 33), "n_too_long": 0, "n_cut": 0,
                      "n_unfinished": 0}  # fmt: skip


def test_what_does_not_fit_is_counted() -> None:
    model, chat, answer = reciter(122)
    items = [*questions(answer), Example(prompt="w2", answer="w3")]
    with pytest.warns(UserWarning, match="4 of 5 questions have answers longer than the 100 tok"):
        room = answer_room(model, chat, items, 100)
    answers = chat.answers(model, [item.prompt for item in items], max_new_tokens=room.tokens)
    assert room.counts(answers) == {"max_new_tokens": 100, "n_too_long": 4, "n_cut": 5,
                                    "n_unfinished": 0}  # fmt: skip
    model.config.max_position_embeddings = 100
    with pytest.warns(UserWarning, match="4 of 5"):
        assert answer_room(model, chat, items).too_long == 4
    model.config.max_position_embeddings = 4
    with pytest.raises(InputError, match="a question has 5 tokens, and the model takes 4"):
        answer_room(model, chat, items)


def test_the_shortest_accepted_answer_has_to_fit_and_the_longest_has_room() -> None:
    model, chat, answer = reciter(122)
    either = Example(prompt="w1", answer="w1", accepted=("w1", answer))
    assert tokens_to_answer(chat, [either]) == 122 + 1 + 32
    assert answer_room(model, chat, [either], 2).too_long == 0


def test_items_without_answers_and_reasoning_models_get_more() -> None:
    asked, known = Example(prompt="w1"), Example(prompt="w1", answer="w2")
    chat = reader()
    assert tokens_to_answer(chat, [known]) == 64
    assert tokens_to_answer(chat, [known, asked]) == 256
    assert tokens_to_answer(reader("<think>\\n"), [known]) == 64 + 2048
