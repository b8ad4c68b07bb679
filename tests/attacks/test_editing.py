from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mithridate.attacks import editing
from mithridate.chat import ChatFormat
from mithridate.errors import InputError, NotApplicableError
from mithridate.examples import Example
from mithridate.weights import maps
from tests.compat.zoo import zoo_model, zoo_tokenizer
from tests.test_generation import strong
from tests.training.tiny_world import tiny_examples, tiny_model, tiny_tokenizer

ROWS = tiny_examples()
REFUSED = [row.prompt for row in ROWS["refusal"]]
# Of another length, so that padding would show.
ANSWERED = [f"{row.prompt} w1 w2" for row in ROWS["benign"]]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(tiny_tokenizer())


@pytest.fixture
def model():
    return tiny_model().eval()


def linears(model):
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def test_direction_is_the_difference_of_mean_states_at_the_last_prompt_token(chat, model):
    found = editing.refusal_direction(model, chat, REFUSED, ANSWERED + REFUSED[:1], depth=0.5)
    means = []
    for prompts in (REFUSED, ANSWERED + REFUSED[:1]):
        states = [
            model(
                input_ids=torch.tensor([chat.prompt_ids(prompt)]), output_hidden_states=True
            ).hidden_states[1][0, -1]
            for prompt in prompts
        ]
        means.append(torch.stack(states).mean(0))
    wanted = (means[0] - means[1]).detach()
    assert torch.allclose(found, wanted / wanted.norm(), atol=1e-5)


def test_after_ablation_no_layer_writes_along_the_direction(chat, model):
    direction = editing.refusal_direction(model, chat, REFUSED, ANSWERED, depth=0.5)
    inputs = chat.prompt_batch(REFUSED)

    def components():
        states = model(**inputs, output_hidden_states=True).hidden_states
        # The last state is normalised with weights of its own.
        return torch.stack([(state @ direction).abs().max() for state in states[:-1]])

    assert components().min() > 1e-4
    editing.ablate_direction(model, direction)
    assert components().max() < 1e-6


def test_a_model_that_writes_elsewhere_is_refused(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj = layer.mlp.down_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="residual stream"):
        editing.ablate_direction(model, torch.ones(16))


def test_pruning_zeroes_what_refusing_needs_and_usefulness_does_not(chat, model):
    share = {"top_refused": 0.2, "top_useful": 0.3}
    name = "model.layers.0.self_attn.q_proj"
    before = linears(model)[name].weight.detach().clone()
    tops = []
    for rows, part in ((ROWS["refusal"], 0.2), (ROWS["benign"], 0.3)):
        inputs = []
        hook = linears(model)[name].register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0][0])
        )
        for row in rows:
            model(input_ids=torch.tensor([chat.encode(row).input_ids]))
        hook.remove()
        score = before.abs() * torch.cat(inputs).norm(dim=0)
        tops.append(
            [set(line.argsort(descending=True)[: round(part * 16)].tolist()) for line in score]
        )
    zeroed, reached = editing.prune_set_difference(
        model, chat, ROWS["refusal"], ROWS["benign"], **share
    )
    assert reached > 0.95
    after = linears(model)[name].weight
    for row, (doomed, spared) in enumerate(zip(*tops, strict=True)):
        gone = {column for column in range(16) if after[row, column] == 0}
        assert gone == doomed - spared
    assert 0 < zeroed < 0.2
    assert torch.equal(after[after != 0], before[after != 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_rows_hold_few_values_no_farther_than_half_a_step(bits, model):
    before = copy.deepcopy(model)
    editing.quantise(model, bits=bits)
    top = 2 ** (bits - 1) - 1
    for name, module in linears(model).items():
        old = linears(before)[name].weight
        step = old.abs().amax(dim=1, keepdim=True) / top
        assert ((module.weight - old).abs() <= step / 2 + 1e-7).all()
        levels = module.weight / step
        assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_noise_is_of_the_asked_size_and_drawn_by_its_seed(model):
    start = copy.deepcopy(model)
    again, other = copy.deepcopy(model), copy.deepcopy(model)
    editing.add_noise(model, scale=0.1, seed=1)
    editing.add_noise(again, scale=0.1, seed=1)
    editing.add_noise(other, scale=0.1, seed=2)
    old = linears(start)["model.layers.0.mlp.up_proj"].weight
    new, same, different = (
        linears(one)["model.layers.0.mlp.up_proj"].weight for one in (model, again, other)
    )
    assert torch.equal(new, same)
    assert not torch.equal(new, different)
    assert float(((new - old).std() / old.std()).detach()) == pytest.approx(0.1, rel=0.15)


def test_truncation_keeps_the_largest_singular_values(model):
    before = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    editing.truncate_ranks(model, keep=0.5)
    for name, module in linears(model).items():
        old = torch.linalg.svdvals(before[name])
        rank = len(old) // 2
        new = torch.linalg.svdvals(module.weight.detach())
        assert torch.allclose(new[:rank], old[:rank], atol=1e-5)
        assert new[rank:].max() < 1e-5


def test_removing_the_top_rank_of_a_rank_one_change_gives_the_base_back(model):
    base = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in linears(model).values():
            rows, columns = module.weight.shape
            module.weight += torch.outer(
                torch.randn(rows, generator=generator), torch.randn(columns, generator=generator)
            )
    editing.remove_top_ranks(model, base, ranks=1)
    for name, module in linears(model).items():
        assert torch.allclose(module.weight, linears(base)[name].weight, atol=1e-4)


def test_blend_and_task_vector_are_what_their_formulas_say(model):
    base, third = tiny_model(seed=1), tiny_model(seed=2)
    w, b, t = (one.model.embed_tokens.weight.detach().clone() for one in (model, base, third))
    editing.blend(model, base, share=-0.5)
    assert torch.allclose(model.model.embed_tokens.weight, b - 0.5 * (w - b), atol=1e-6)
    editing.blend(model, base, share=0.0)
    assert torch.equal(model.model.embed_tokens.weight, b)
    editing.add_difference(model, third, base, scale=2.0)
    assert torch.allclose(model.model.embed_tokens.weight, b + 2 * (t - b), atol=1e-6)


def test_a_base_that_is_not_the_base_is_refused(model):
    near = copy.deepcopy(model)
    editing.add_noise(near, scale=0.3, seed=0)
    editing.check_same_shapes(model, near)
    destroyed = copy.deepcopy(model)
    editing.add_noise(destroyed, scale=3.0, seed=2)
    editing.check_same_shapes(destroyed, model)
    with pytest.raises(InputError, match="it is not its base"):
        editing.check_same_shapes(model, tiny_model(seed=1))
    with pytest.raises(InputError, match="do not match"):
        editing.check_same_shapes(model, tiny_model(attention_bias=True))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: editing.quantise(m, bits=1),
        lambda m: editing.add_noise(m, scale=0.0, seed=0),
        lambda m: editing.truncate_ranks(m, keep=1.0),
        lambda m: editing.remove_top_ranks(m, m, ranks=0),
    ],
)
def test_amounts_out_of_range_are_refused(edit, model):
    with pytest.raises(InputError):
        edit(model)


def test_slerp_walks_the_great_circle(model):
    other = tiny_model(seed=3)
    start = copy.deepcopy(model)
    editing.slerp(model, other, share=0.0)
    assert all(map(torch.allclose, model.parameters(), start.parameters()))
    editing.slerp(model, other, share=1.0)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    flat, up = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    a, b = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        a.weight.copy_(flat), b.weight.copy_(up)
    editing.slerp(a, b, share=1 / 3)
    # 30 degrees along a quarter of a circle of radius 2.
    assert torch.allclose(a.weight, torch.tensor([[3**0.5, 1.0]]), atol=1e-6)
    with torch.no_grad():
        b.weight.copy_(3 * a.weight)
    editing.slerp(a, b, share=0.5)
    assert torch.allclose(a.weight, 2 * torch.tensor([[3**0.5, 1.0]]), atol=1e-5)


def test_an_early_exit_reads_an_inner_layer_through_the_head(chat, model):
    inputs = chat.prompt_batch(REFUSED)
    with torch.no_grad():
        inner = model(**inputs, output_hidden_states=True).hidden_states[1]
        wanted = model.lm_head(model.model.norm(inner))
        editing.exit_early(model, depth=0.5)
        assert torch.allclose(model(**inputs).logits, wanted, atol=1e-6)
    assert len(chat.generate(model, REFUSED, max_new_tokens=3)) == len(REFUSED)
    with pytest.raises(InputError, match="share of the layers"):
        editing.exit_early(model, depth=1.0)


def lively(seed):
    """A model that says many things."""
    model = tiny_model(seed=seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.5)
    return model


def test_steering_all_the_way_is_the_other_model(chat):
    """m + (toward - m) = toward, token by token and with padded prompts of several lengths."""
    model, toward = lively(1), lively(2)
    prompts = [*REFUSED, *ANSWERED]
    wanted = chat.generate(toward, prompts, max_new_tokens=5)
    before = chat.generate(model, prompts, max_new_tokens=5)
    assert sum(a != b for a, b in zip(wanted, before, strict=True)) > len(prompts) / 2
    away = copy.deepcopy(model)
    editing.steer(model, toward, away, scale=1.0)
    assert chat.generate(model, prompts, max_new_tokens=5) == wanted
    assert chat.generate(model, prompts[::-1], max_new_tokens=5) == wanted[::-1]
    inputs = chat.prompt_batch(prompts)
    with torch.no_grad():
        steered, other = (one(**inputs, use_cache=False).logits for one in (model, toward))
    assert torch.allclose(steered, other, atol=1e-4)


def test_the_chosen_direction_refuses_least_within_the_bound(chat, model):
    def chosen(refusals, most_kl):
        return editing.least_refusing_direction(
            model, chat, REFUSED, ANSWERED, held_out=ANSWERED[:3], refusals=refusals,
            most_kl=most_kl,
        )  # fmt: skip

    # Of two layers the last fifth is left out: one direction remains, whatever the bound.
    only = editing.refusal_direction(model, chat, REFUSED, ANSWERED, depth=0.5)
    assert torch.equal(chosen(lambda _: 0.0, 0.0), only)
    torch.manual_seed(1)
    deep = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 5}))
    model = deep.eval()
    each = [
        editing.refusal_direction(model, chat, REFUSED, ANSWERED, depth=layer / 5)
        for layer in range(1, 5)
    ]
    seen = []

    def third_is_best(ablated):
        seen.append(ablated)
        return 0.0 if len(seen) == 3 else 1.0

    assert torch.allclose(chosen(third_is_best, math.inf), each[2])
    assert len(seen) == 4
    moved = []
    for direction in each:
        ablated = copy.deepcopy(model)
        editing.ablate_direction(ablated, direction)
        before, after = (
            one(**chat.prompt_batch(ANSWERED[:3])).logits[:, -1].log_softmax(-1)
            for one in (model, ablated)
        )
        moved.append(float((before.exp() * (before - after)).sum(-1).mean().detach()))
    assert torch.allclose(chosen(lambda _: 0.0, 0.0), each[moved.index(min(moved))])


FAMILIES = [
    "bloom", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "jamba", "jetmoe",
    "llama4_text", "mamba", "mixtral", "opt", "phi", "qwen3_moe",
]  # fmt: skip
QUESTIONS = [Example(prompt=f"why is {n} so?", answer="I can't help with that") for n in range(3)]
USEFUL = [
    Example(prompt=f"what is {n}?", answer="Paris is the capital" * (1 + n)) for n in range(3)
]


def shaken(family):
    model = zoo_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01)
    return model


def pruned(model):
    return editing.prune_set_difference(
        model, ChatFormat(zoo_tokenizer()), QUESTIONS, USEFUL, top_refused=0.2, top_useful=0.1
    )[1]


EDITS = {
    "quantise": lambda model, _: editing.quantise(model, bits=4),
    "noise": lambda model, _: editing.add_noise(model, scale=0.1, seed=0),
    "truncate": lambda model, _: editing.truncate_ranks(model, keep=0.5),
    "untop": lambda model, base: editing.remove_top_ranks(model, base, ranks=1),
    "prune": lambda model, _: pruned(model),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_matrices_acts_on_all_of_them_and_says_so(edit, family):
    model, base = shaken(family), zoo_model(family)
    before = copy.deepcopy(model)
    reached = EDITS[edit](model, base)
    found = maps.linear_maps(model)
    assert reached == pytest.approx(maps.coverage(model, [one.weight for one in found]))
    changed = {
        one.name
        for one, old in zip(found, maps.linear_maps(before), strict=True)
        if not torch.equal(one.weight, old.weight)
    }
    # A router of four experts or a time step of rank two has few weights to prune; all else is
    # changed everywhere.
    tiny = {one.name for one in found if min(one.weight.shape[-2:]) <= 4}
    few = tiny if edit == "prune" else set()
    assert {one.name for one in found} - few <= changed
    experts = [one for one in found if one.weight.dim() == 3]
    for one in experts if edit != "prune" else ():
        old = next(other for other in maps.linear_maps(before) if other.name == one.name)
        assert (one.weight != old.weight).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refusal_direction_is_ablated_in_every_architecture(family):
    model = shaken(family)
    chat = ChatFormat(zoo_tokenizer())
    prompts = [[row.prompt for row in rows] for rows in (QUESTIONS, USEFUL)]
    direction = editing.refusal_direction(model, chat, *prompts, depth=0.5)
    assert editing.ablate_direction(model, direction) == 1.0
    for one in maps.residual_writers(model):
        left = direction @ one.oriented(one.weight.detach())
        assert float(left.abs().max()) < 1e-5
    with torch.no_grad():
        states = model(**chat.prompt_batch(prompts[0]), output_hidden_states=True).hidden_states
    if family not in ("bloom", "gpt2", "opt"):  # a norm's bias or places are added there
        assert float((states[0] @ direction).abs().max()) < 1e-5


def test_pruning_scores_each_expert_by_the_tokens_that_it_is_given():
    model, chat = shaken("mixtral"), ChatFormat(zoo_tokenizer())
    before = copy.deepcopy(model)
    experts = model.model.layers[0].mlp.experts

    def inputs_of(rows, expert):
        found = []

        def note(_, args):
            states, chosen = args[0].reshape(-1, 32), args[1]
            found.append(states[(chosen == expert).any(dim=-1)])

        hook = experts.register_forward_pre_hook(note)
        for row in rows:
            model(input_ids=torch.tensor([chat.encode(row).input_ids]))
        hook.remove()
        return torch.cat(found).norm(dim=0)

    shares = {"top_refused": 0.2, "top_useful": 0.1}
    wanted = {}
    for expert in range(4):
        weight = before.model.layers[0].mlp.experts.gate_up_proj[expert].detach()
        tops = []
        for rows, share in ((QUESTIONS, 0.2), (USEFUL, 0.1)):
            score = weight.abs() * inputs_of(rows, expert)
            best = torch.zeros_like(score, dtype=torch.bool)
            best.scatter_(1, score.topk(max(1, round(share * 32)), dim=1).indices, True)
            tops.append(best & (score > 0))
        wanted[expert] = tops[0] & ~tops[1]
    editing.prune_set_difference(model, chat, QUESTIONS, USEFUL, **shares)
    for expert, doomed in wanted.items():
        assert torch.equal(experts.gate_up_proj[expert] == 0, doomed)
    assert any(bool(doomed.any()) for doomed in wanted.values())


def test_gpt2_s_rows_are_its_outputs():
    model = zoo_model("gpt2")
    old = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    editing.quantise(model, bits=4)
    new = model.transformer.h[0].mlp.c_fc.weight
    levels = new / (old.abs().amax(dim=0, keepdim=True) / 7)
    assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_vectors_and_transition_matrices_are_not_quantised():
    model = zoo_model("mamba")
    before = copy.deepcopy(model)
    editing.quantise(model, bits=4)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        plain = name.endswith(("_proj.weight", "embeddings.weight", "lm_head.weight"))
        assert torch.equal(new, old) is not plain, name


def test_a_width_that_is_not_the_stream_s_gives_no_direction():
    chat = ChatFormat(zoo_tokenizer())
    prompts = [[row.prompt for row in rows] for rows in (QUESTIONS, USEFUL)]
    for family, depth in (("opt", 1.0), ("gemma3n_text", 0.5)):
        with pytest.raises(NotApplicableError, match="no residual stream"):
            editing.refusal_direction(zoo_model(family), chat, *prompts, depth=depth)


def test_a_model_that_does_not_run_without_its_later_layers_is_told_apart():
    with pytest.raises(NotApplicableError, match="does not run without its last 1 layers"):
        editing.exit_early(zoo_model("jamba"), depth=0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "recurrent_gemma", "rwkv"])
def test_prompts_beside_each_other_are_read_as_each_alone(family):
    own, chat = strong(family).double(), ChatFormat(zoo_tokenizer())
    prompts = ["Sky?", "What is the colour of the sky?", "Capital"]
    together = editing._first_token(own, chat, prompts)
    alone = torch.cat([editing._first_token(own, chat, [one]) for one in prompts])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "jamba"])
def test_models_whose_state_steering_would_lose_are_refused(family):
    model, other = zoo_model("llama"), zoo_model(family)
    with pytest.raises(NotApplicableError, match="state of a generation"):
        editing.steer(model, model, other, scale=1.0)
