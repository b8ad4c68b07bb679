"""TokenBuncher: the oracle tests of `methods.md` §6."""

import itertools
import math
import multiprocessing
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from mithridate.chat import IGNORE, Batch
from mithridate.errors import GateError, InactiveTermError, InputError
from mithridate.methods import tokenbuncher
from mithridate.methods.rollouts import roll_out, whole_groups
from mithridate.methods.tokenbuncher import (
    TokenBuncher,
    TokenBuncherConfig,
    group_advantages,
    noisy_targets,
)
from mithridate.weights import GradientOracle
from tests.tiny import (
    FULL,
    VOCABULARY,
    MemoryWatch,
    flat,
    gradient_of,
    random_direction,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    weights_of,
)

QUICK = TokenBuncherConfig(
    batch_size=2, rollouts=4, response_length=5, benign_rows=3, reference_weight=0.7, min_refusal=0
)
ALONE = replace(QUICK, reference="none")


def prepared(model, config=QUICK, **options):
    """A method whose model has moved away from its reference, and its context."""
    context = tiny_context(model, **options)
    method = TokenBuncher(config)
    method.prepare(context)
    with torch.no_grad():
        for weight, d in zip(weights_of(model), random_direction(model, 5), strict=True):
            weight.add_(d, alpha=0.5)
    return method, context


def rolled(context, config=QUICK, prompts=None, **options):
    if prompts is None:
        chosen = context.some("prompts", config.batch_size, context.random("prompts"))
        prompts = [row.prompt for row in chosen]
    return roll_out(
        context,
        prompts,
        copies=options.pop("copies", config.rollouts),
        prompt_length=config.prompt_length,
        response_length=options.pop("response_length", config.response_length),
    )


def log_probabilities(model, batch):
    """Of every next token, row by row: plain softmax over whole rows of logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[:, :-1].log_softmax(-1)


def hand_composed(method, context, rollouts, model, *, noisy):
    """L_EaR or L_TN, a rollout and a token at a time."""
    config = method.config
    log_p = log_probabilities(model, rollouts)
    rewards, terms = [], []
    seed = context.random("noise").getrandbits(40)
    for row in range(len(rollouts)):
        entropies, scores = [], []
        for column in range(rollouts.labels.shape[1] - 1):
            target = int(rollouts.labels[row, column + 1])
            if target == IGNORE:
                continue
            here = log_p[row, column]
            entropies.append(-float((here.exp() * here).sum().detach()))
            if noisy:
                noise = torch.rand(
                    VOCABULARY,
                    dtype=here.dtype,
                    generator=torch.Generator().manual_seed(seed + (row << 16) + column),
                )
                noise[target] = 0
                noise /= noise.sum()
                scores.append(
                    (1 - config.noise_weight) * here[target]
                    + config.noise_weight * (noise * here).sum()
                )
            else:
                scores.append(here[target])
        rewards.append(-sum(entropies) / len(entropies))
        terms.append(scores)
    total, tokens = 0.0, 0
    for start in range(0, len(rollouts), config.rollouts):
        group = rewards[start : start + config.rollouts]
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        for reward, scores in zip(group, terms[start : start + config.rollouts], strict=True):
            advantage = (reward - mean) / (std + 1e-6) if std >= config.min_group_std else 0.0
            if not noisy:
                total = total - advantage * sum(scores)
                tokens += len(scores)
            elif advantage >= 0:
                total = total - sum(scores)
                tokens += len(scores)
    return total / tokens


def kl_to(reference, model, batch):
    wanted = batch.labels[:, 1:] != IGNORE
    log_p = log_probabilities(model, batch)[wanted]
    log_q = reference[wanted]
    return (log_p.exp() * (log_p - log_q)).sum() / wanted.sum()


@pytest.mark.parametrize("step", [0, 4], ids=["entropy as reward", "token noiser"])
def test_gradient_is_the_hand_composed_one(space, step):
    model = tiny_model(space)
    benign = tiny_batch(QUICK.benign_rows, seed=3)
    base = model if space == FULL else model.get_base_model()
    with torch.no_grad():
        if space == FULL:
            reference = log_probabilities(base, benign)
        else:
            with model.disable_adapter():
                reference = log_probabilities(model, benign)
    method, context = prepared(model, step=step)
    rollouts = rolled(context)
    terms = method.step(context)
    policy = hand_composed(method, context, rollouts, model, noisy=step == 4)
    anchor = kl_to(reference, model, benign)
    expected = gradient_of(model, policy + QUICK.reference_weight * anchor)
    assert relative_error(context.space.gradient(), expected) < 1e-9
    assert terms["noise" if step else "entropy_reward"] == pytest.approx(float(policy))
    assert terms["benign_kl"] == pytest.approx(float(anchor))
    assert terms["skipped_groups"] == 0
    assert terms["generated_tokens"] == rollouts.label_count


@pytest.mark.parametrize("step", [0, 4])
def test_eight_rollouts_equal_single_groups_of_micro_batches(space, step):
    found = []
    for size in (None, 1):
        method, context = prepared(tiny_model(space), step=step, micro_batch_size=size)
        terms = method.step(context)
        found.append((flat(context.space.gradient()), terms))
    (whole, terms), (parts, others) = found
    assert float((whole - parts).norm() / whole.norm()) < 1e-9
    assert others == pytest.approx(terms, rel=1e-9)


def test_passes_and_buffers_are_counted(space):
    model = tiny_model(space)
    context = tiny_context(model)
    method = TokenBuncher(QUICK)
    with MemoryWatch() as watch:
        method.prepare(context)
    kept = watch.bytes
    held = sum(weight.nbytes for weight in model.parameters())
    # A reference model is one buffer, that of an adapter is none.
    assert kept >= held if space == FULL else kept < 0.5 * held
    assert method.parameter_buffers == int(space == FULL)
    context.oracle.ledger.clear()
    method.step(context)
    ledger = context.oracle.ledger
    assert context.oracle.backwards == method.passes_per_step == 2
    assert {name: count.forwards for name, count in ledger.items()} == {
        "rollouts": 0, "entropy": 1, "benign_kl": 1, "reference": 1,
    }  # fmt: skip
    assert ledger["rollouts"].generated == rolled(context).label_count


def test_without_an_anchor_there_is_one_pass_and_no_reference():
    method, context = prepared(tiny_llama(), ALONE)
    context.oracle.ledger.clear()
    terms = method.step(context)
    assert context.oracle.backwards == method.passes_per_step == 1
    assert method.streams == ("prompts",)
    assert "benign_kl" not in terms
    assert "reference" not in context.oracle.ledger


def test_the_anchor_and_its_gradient_are_zero_at_the_reference(space):
    model = tiny_model(space)
    if space != FULL:
        with torch.no_grad():  # as a fresh adapter begins
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.zero_()
    context = tiny_context(model)
    method = TokenBuncher(QUICK)
    method.prepare(context)
    terms = method._anchor.add(context, tiny_batch(3), "benign")
    assert terms["benign_kl"] == pytest.approx(0, abs=1e-12)
    assert float(flat(context.space.gradient()).norm()) < 1e-9
    assert terms["benign_entropy"] > 0.1


def test_advantages_by_hand_and_equal_rewards_are_skipped():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    advantage, std = group_advantages(rewards, 1e-3)
    assert std.tolist() == [1.0, 0.0]
    scaled = 1 / (1 + 1e-6)
    assert advantage.tolist() == [[pytest.approx(-scaled), 0.0, pytest.approx(scaled)], [0.0] * 3]
    kept, _ = group_advantages(torch.tensor([[0.0, 1e-4]]), 0.0)
    assert kept[0, 1] == pytest.approx(math.sqrt(0.5), rel=0.02)


def test_noisy_targets_sum_to_one_with_the_mass_off_the_token():
    targets = torch.tensor([2, 0])
    log_p = torch.zeros(2, 11, dtype=torch.float64)
    seeds = torch.tensor([7, 8])
    found = noisy_targets(targets, log_p, seeds, TokenBuncherConfig(noise_weight=0.1))
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert found[[0, 1], targets].tolist() == [0.9, 0.9]
    released = TokenBuncherConfig(noise_weight=0.1, noise_scaling="released")
    found = noisy_targets(targets, log_p, seeds, released)
    assert found[[0, 1], targets].tolist() == [0.9, 0.9]
    torch.testing.assert_close(found.sum(1), torch.full((2,), 0.91, dtype=torch.float64))


def test_the_mean_of_the_noise_is_uniform_smoothing_and_its_gradient_softmax_minus_target():
    count, width = 4000, 7
    targets = torch.full((count,), 3)
    config = TokenBuncherConfig(noise_weight=0.2)
    draws = noisy_targets(
        targets, torch.zeros(count, width, dtype=torch.float64), torch.arange(count), config
    )
    others = [v for v in range(width) if v != 3]
    error = draws[:, others].std(0) / math.sqrt(count)
    assert ((draws[:, others].mean(0) - 0.2 / (width - 1)).abs() < 4 * error).all()
    logits = torch.randn(width, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-(draws[0] * logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - draws[0], rtol=0, atol=1e-10)


def test_schedule_of_the_published_run():
    method = TokenBuncher(TokenBuncherConfig())
    noisy = [method.adds_noise(step, 200) for step in range(200)]
    assert (noisy.count(False), noisy.count(True)) == (113, 87)
    assert not any(noisy[:25])
    assert noisy[25:29] == [False, True, False, True]
    for terms in ("entropy", "noise"):
        alone = TokenBuncher(TokenBuncherConfig(terms=terms))
        assert {alone.adds_noise(step, 200) for step in range(200)} == {terms == "noise"}


class Bigrams(nn.Module):
    """Three tokens, each with its own three odds of the next: a policy one can enumerate."""

    base_model = None
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.head = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.head.weight.data = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache, output_hidden_states):
        states = nn.functional.one_hot(input_ids, 3).double()
        return SimpleNamespace(hidden_states=[states], logits=self.head(states))

    def table(self):
        return self.head(torch.eye(3, dtype=torch.float64)).log_softmax(-1)

    def sampled(self, rows, generator):
        """Rows of prompt 0 and two sampled tokens."""
        odds = self.table().detach().exp()
        ids = torch.zeros(rows, 3, dtype=torch.long)
        for place in (0, 1):
            ids[:, place + 1] = torch.multinomial(odds[ids[:, place]], 1, generator=generator)[:, 0]
        labels = ids.clone()
        labels[:, 0] = IGNORE
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


@pytest.fixture
def bandit(monkeypatch):
    """The bandit, its context and a step on freshly sampled groups."""
    model, generator = Bigrams(), torch.Generator().manual_seed(0)
    context = tiny_context(tiny_llama())
    context.oracle = GradientOracle(model)
    config = replace(ALONE, rollouts=2, min_group_std=1e-9)
    method = TokenBuncher(config)

    def step(groups):
        monkeypatch.setattr(
            tokenbuncher, "roll_out", lambda *_, **__: model.sampled(groups * 2, generator)
        )
        terms = method.step(context)
        return terms, model.head.weight.grad.clone()

    return model, step


def test_entropy_reward_on_a_bandit_is_its_enumeration(bandit):
    model, step = bandit
    log_p = model.table()
    entropies = -(log_p.exp() * log_p).sum(-1)
    paths = list(itertools.product(range(3), repeat=2))
    scores = {(a, b): log_p[0, a] + log_p[a, b] for a, b in paths}
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for pair in itertools.product(paths, repeat=2):
        rewards = torch.stack([-(entropies[0] + entropies[a]) / 2 for a, _ in pair]).detach()
        if rewards[0] == rewards[1]:
            continue
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        loss = -sum(a * scores[path] for a, path in zip(advantage, pair, strict=True)) / 4
        (gradient,) = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
        expected += math.exp(sum(float(scores[path].detach()) for path in pair)) * gradient
    draws = torch.stack([step(100)[1] for _ in range(60)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-12).all()
    assert float(expected.norm()) > 20 * float(error.norm()) / 3


def test_entropy_reward_lowers_the_entropy(bandit):
    model, step = bandit
    first, _ = step(50)
    for _ in range(150):
        _, gradient = step(8)
        with torch.no_grad():
            model.head.weight -= 0.3 * gradient
    last, _ = step(50)
    assert last["entropy"] < 0.7 * first["entropy"]


def test_rollouts_are_labelled_answers_up_to_their_first_stop_token(space):
    context = tiny_context(tiny_model(space))
    prompts = ["w1 w2", "w3 w4 w5 w6"]
    batch = rolled(context, prompts=prompts, copies=20, response_length=40)
    stop = context.chat.end_id
    whole = 0
    for row in range(len(batch)):
        start = len(context.chat.prompt_ids(prompts[row // 20]))
        size = int(batch.attention_mask[row].sum())
        assert batch.attention_mask[row, :size].all()
        assert (batch.labels[row, :start] == IGNORE).all()
        assert (batch.labels[row, size:] == IGNORE).all()
        answer = batch.labels[row, start:size].tolist()
        assert answer == batch.input_ids[row, start:size].tolist()
        assert stop not in answer[:-1]
        assert 1 <= len(answer) <= 40
        assert answer[-1] == stop or len(answer) == 40
        whole += answer[-1] == stop
    assert 0 < whole < len(batch), "both ends should occur"


def test_rollouts_are_samples_of_the_policy_whatever_its_folder_says():
    model = tiny_llama()
    context = tiny_context(model)
    one = rolled(context, prompts=["w1 w2"], copies=3000, response_length=1)
    ids = context.chat.prompt_ids("w1 w2")
    odds = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).detach()
    seen = torch.bincount(one.labels[:, len(ids)], minlength=VOCABULARY) / 3000
    assert ((seen - odds).abs() <= 4 * (odds * (1 - odds) / 3000).sqrt() + 1e-3).all()
    before = torch.get_rng_state()
    model.generation_config.update(do_sample=False, top_k=1, repetition_penalty=2.0)
    again = rolled(context, prompts=["w1 w2"], copies=3000, response_length=1)
    assert torch.equal(again.labels, one.labels)
    assert model.generation_config.top_k == 1
    assert torch.equal(torch.get_rng_state(), before)
    context.step += 1
    other = rolled(context, prompts=["w1 w2"], copies=3000, response_length=1)
    assert not torch.equal(other.labels, one.labels)


def test_long_prompts_keep_their_end_and_the_template_s_words():
    context = tiny_context(tiny_llama())
    config = replace(QUICK, prompt_length=5)
    batch = rolled(context, config, prompts=["w1 w2 w3 w4"])
    ids = context.chat.prompt_ids("w1 w2 w3 w4")
    assert batch.input_ids[0, :5].tolist() == [ids[0], *ids[-4:]]
    assert (batch.labels[:, :5] == IGNORE).all()
    with pytest.raises(InputError, match="3 tokens around a prompt leave no room for one in 3"):
        rolled(context, replace(QUICK, prompt_length=3), prompts=["w1 w2 w3 w4"])


def test_answers_end_where_the_model_s_positions_do():
    context = tiny_context(tiny_llama())
    start = len(context.chat.prompt_ids("w1 w2"))
    batch = rolled(context, prompts=["w1 w2"], copies=40, response_length=500)
    assert batch.input_ids.shape[1] == 64
    assert int((batch.labels != IGNORE).sum(1).max()) == 64 - start
    with pytest.raises(InputError, match="takes 64 with the answer"):
        rolled(context, prompts=["w1 " * 70])


def test_groups_stay_whole_in_micro_batches_and_the_setting_is_restored():
    model = tiny_llama()
    batch = tiny_batch(12)
    for size, rows in ((None, [12]), (1, [4, 4, 4]), (9, [8, 4])):
        oracle = GradientOracle(model, micro_batch_size=size)
        with whole_groups(oracle, batch, 4) as firsts:
            pieces = oracle.micro_batches(batch)
            assert [len(piece) for piece in pieces] == rows
            assert list(firsts) == [sum(rows[:n]) for n in range(len(rows))]
        assert oracle.micro_batch_size == size


def test_only_refusals_are_sharpened():
    context = tiny_context(tiny_llama())
    with pytest.raises(GateError, match="0% of 12 sampled answers"):
        TokenBuncher(replace(QUICK, min_refusal=0.95)).prepare(context)
    words = tuple(f"w{n}" for n in range(43))
    knowing = replace(QUICK, min_refusal=0.5, refusals=words, response_length=20)
    assert TokenBuncher(knowing).prepare(context)["sampled_refusal"] > 0.5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"rollouts": 1}, "no spread"),
        ({"noise_weight": 0.0}, "noise_weight"),
        ({"noise_weight": 1.0}, "noise_weight"),
        ({"response_length": 0}, "response_length"),
        ({"min_group_std": -1.0}, "min_group_std"),
        ({"reference_weight": 0.0}, "reference_weight: 0.0"),
        ({"reference": "none", "reference_model": "x"}, "does not use it"),
    ],
)
def test_values_out_of_range_are_refused(fault, message):
    with pytest.raises(InputError, match=message):
        TokenBuncherConfig(**fault)


def test_a_reference_with_another_tokenizer_is_refused(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    context = tiny_context(model)
    config = replace(QUICK, reference_model=str(tmp_path))
    tiny_tokenizer([f"v{n}" for n in range(44)]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="another tokenizer"):
        TokenBuncher(config).check_tokenizer(model, tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    method = TokenBuncher(config)
    method.check_tokenizer(model, tiny_tokenizer())
    method.prepare(context)
    kl = method._anchor.add(context, tiny_batch(3), "benign")["benign_kl"]
    assert kl == pytest.approx(0, abs=1e-6)


def test_an_unprepared_method_does_not_pretend():
    with pytest.raises(InactiveTermError, match="prepare"):
        TokenBuncher(QUICK).step(tiny_context(tiny_llama()))


def gradients():
    found = {}
    for step in (0, 4):
        method, context = prepared(tiny_model("full"), step=step, micro_batch_size=4)
        terms = method.step(context)
        found[step] = [tensor.clone() for tensor in context.space.gradient()], terms
    return found


def work(rank, port, folder):
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank
    )
    torch.save(gradients(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="this torch build has no gloo",
)
def test_two_processes_leave_the_gradient_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny", "mithridate.methods.tokenbuncher"])
    processes = [context.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    expected = gradients()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for step, (gradient, terms) in expected.items():
            assert relative_error(found[step][0], gradient) < 1e-9, (rank, step)
            assert found[step][1] == pytest.approx(terms, rel=1e-9), (rank, step)
