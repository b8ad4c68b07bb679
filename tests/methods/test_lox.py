"""LoX: the oracle tests of `methods.md` §12."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from mithridate.methods import lox
from mithridate.methods.lox import LoX, LoXConfig
from mithridate.training import TrainingConfig, immunise
from tests.compat.zoo import save_zoo, zoo_model
from tests.tiny import (
    WORDS,
    MemoryWatch,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_tokenizer,
)

STRENGTH = 1.25


@pytest.fixture
def base(tmp_path):
    """The folder of a model before its alignment."""
    tiny_llama(dtype=torch.float32, hidden=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def aligned(base, *, size=0.02, decay=0.6):
    """The same model moved in every weight, along directions of falling strength."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            step = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                u, _, vh = torch.linalg.svd(step, full_matrices=False)
                step = u * decay ** torch.arange(u.shape[1]) @ vh
            weight.add_(size * step)
    return model


def lox_for(base, **options):
    return LoX(LoXConfig(base=str(base), **options))


def extrapolate(base, model, **options):
    """Run LoX; return the change and the difference from the base of every parameter."""
    stored = load_file(base / "model.safetensors")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    context = tiny_context(model)
    found = lox_for(base, **options).prepare(context)
    changes = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    differences = {name: before[name] - stored[name] for name in before}
    return changes, differences, found, context


@pytest.mark.parametrize("options", [{}, {"svd": "exact"}, {"rank": 3, "strength": 0.5}])
def test_every_matrix_moves_by_alpha_times_its_best_approximation(base, options):
    changes, differences, found, context = extrapolate(base, aligned(base), **options)
    rank, strength = options.get("rank", 6), options.get("strength", STRENGTH)
    captured = whole = 0.0
    for name, change in changes.items():
        if change.ndim < 2:
            assert float(change.abs().max()) == 0.0
            continue
        change, delta = change.double() / strength, differences[name].double()
        singular = torch.linalg.svdvals(delta)
        left = float(singular[rank:].square().sum().sqrt())
        residual = float((delta - change).norm())
        assert residual == pytest.approx(left, rel=1e-5, abs=1e-5 * float(delta.norm()))
        assert int((torch.linalg.svdvals(change) > 1e-4 * singular[0]).sum()) == rank
        captured += float(singular[:rank].square().sum())
        whole += float(singular.square().sum())
    assert found["captured"] == pytest.approx(captured / whole, rel=1e-4)
    assert found["travel"] == pytest.approx(strength * math.sqrt(captured), rel=1e-4)
    assert context.oracle.ledger == {}


def test_the_randomised_decomposition_is_used_and_checked_once(base, monkeypatch):
    calls = []
    real = torch.svd_lowrank
    monkeypatch.setattr(
        torch, "svd_lowrank", lambda a, **how: calls.append((a.shape, how)) or real(a, **how)
    )
    model = aligned(base)
    *_, found, _ = extrapolate(base, model)
    large = [w for w in model.parameters() if w.ndim == 2 and min(w.shape) > 30]
    assert len(calls) == len(large) + 1
    assert all(how == {"q": 30, "niter": 4} for _, how in calls)
    assert abs(found["svd_error"]) < 1e-3


def test_a_decomposition_that_misses_stops_before_anything_moves(base, monkeypatch):
    model = aligned(base)
    before = [weight.detach().clone() for weight in model.parameters()]
    real = torch.svd_lowrank
    monkeypatch.setattr(
        torch, "svd_lowrank", lambda a, **how: tuple(0.99 * part for part in real(a, **how))
    )
    with pytest.raises(RunStoppedError, match=r"misses .*svd: exact"):
        lox_for(base).prepare(tiny_context(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_full_rank_adds_alpha_times_the_whole_difference(base):
    changes, differences, found, _ = extrapolate(base, aligned(base), rank=None)
    for name, change in changes.items():
        if change.ndim == 2:
            torch.testing.assert_close(change, STRENGTH * differences[name], rtol=1e-4, atol=1e-6)
    assert found["captured"] == pytest.approx(1.0)


def test_strength_zero_changes_nothing(base):
    changes, *_ = extrapolate(base, aligned(base), strength=0.0)
    assert all(torch.equal(change, torch.zeros_like(change)) for change in changes.values())


def test_tied_weights_move_once(base):
    model = aligned(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    changes, differences, found, _ = extrapolate(base, model, rank=None)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(changes[name], STRENGTH * differences[name], rtol=1e-4, atol=1e-6)
    assert found["matrices"] == sum(weight.ndim == 2 for weight in model.parameters())


def test_linear_leaves_embeddings_and_head_alone(base):
    changes, *_ = extrapolate(base, aligned(base), modules="linear")
    for name, change in changes.items():
        moves = change.ndim == 2 and "embed" not in name
        assert (float(change.norm()) > 0) == moves, name


def test_a_body_that_is_stored_without_its_prefix_is_found(tmp_path):
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    stored = {
        name.removeprefix("transformer."): weight.detach() + 1.0
        for name, weight in model.named_parameters()
    }
    save_file(stored, tmp_path / "model.safetensors")
    before = model.transformer.wte.weight.detach().clone()
    method = lox_for(tmp_path, rank=None, strength=1.0)
    method.prepare(
        SimpleNamespace(
            oracle=SimpleNamespace(model=model),
            chat=SimpleNamespace(tokenizer=tiny_tokenizer()),
            seed=0,
            output_dir=None,
        )
    )
    torch.testing.assert_close(model.transformer.wte.weight.detach(), before - 1.0)


def test_half_precision_bases_are_read_and_memory_is_one_matrix(base):
    model = aligned(base)
    small = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    small.save_pretrained(base)
    context = tiny_context(model)
    with MemoryWatch() as watch:
        found = lox_for(base).prepare(context)
    assert found["captured"] > 0
    largest = max(weight.numel() * weight.element_size() for weight in model.parameters())
    # The base's, the difference, its double for the energies, the update, factors.
    assert watch.peak < 9 * largest < 2 * context.space.bytes


def test_the_model_as_its_own_base_stops_the_run(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(InactiveTermError, match="its own base"):
        lox_for(base).prepare(tiny_context(model))


def test_bases_that_do_not_fit_are_refused_by_the_name_of_the_tensor(base, tmp_path):
    model = aligned(base)
    stored = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    faults = {
        "vocabulary": stored | {"model.embed_tokens.weight": torch.zeros(60, 64)},
        "shape": stored | {name: torch.zeros(3, 64)},
        "missing": {key: tensor for key, tensor in stored.items() if key != name},
    }
    messages = {
        "vocabulary": r"embed_tokens.weight is \(60, 64\).*\(50, 64\)[\s\S]*vocabulary",
        "shape": r"up_proj.weight is \(3, 64\)",
        "missing": "no tensor model.layers.1.mlp.up_proj",
    }
    for fault, tensors in faults.items():
        folder = tmp_path / fault
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=messages[fault]):
            lox_for(folder).check(model)
        # Nothing of the run is there yet, so that the mended command can be given again.
        with pytest.raises(InputError, match=messages[fault]):
            immunise(
                model,
                tiny_tokenizer(),
                {},
                lox_for(folder),
                TrainingConfig(),
                tmp_path / "run",
            )
        assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not a tensor")
    for folder, message in [
        (tmp_path / "empty", "no weights in safetensors"),
        (tmp_path / "broken", "not a whole safetensors"),
        (tmp_path / "no" / "such" / "folder", "no such model folder"),
    ]:
        with pytest.raises(InputError, match=message):
            lox_for(folder).check(None)


def test_a_base_of_equal_shapes_and_other_words_is_refused(base):
    model = aligned(base)

    def check():
        lox_for(base).check_tokenizer(model, tiny_tokenizer())

    tiny_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(base)
    with pytest.raises(InputError, match="44 tokens have another id"):
        check()
    tiny_tokenizer([*WORDS, "added"]).save_pretrained(base)
    check()
    damaged = base / "tokenizer.json"
    damaged.write_text(damaged.read_text()[:99])
    with pytest.raises(InputError, match=r"base model's tokenizer cannot be loaded[\s\S]*copy or"):
        check()
    damaged.unlink()
    with pytest.raises(InputError, match=f"{base}.*tokenizer cannot be loaded"):
        check()
    for path in base.glob("tokenizer*"):
        path.unlink()
    with pytest.warns(UserWarning, match="has no tokenizer"):
        check()


def test_a_deeper_base_is_refused_and_stray_buffers_are_not(base):
    model = aligned(base)
    stored = load_file(base / "model.safetensors")
    stored |= {
        "lm_head.weight": stored["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_file(stored, base / "model.safetensors")
    lox_for(base).check(model)
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(stored | {name: torch.zeros(3, 64)}, base / "model.safetensors")
    with pytest.raises(InputError, match=f"1 tensors of it are none of the model's .first: {name}"):
        lox_for(base).check(model)


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "gpt_neox", "granitemoe", "llama4_text", "mixtral", "phi3", "qwen3_moe"],
)
def test_every_weight_finds_its_own_in_files_of_another_form(tmp_path, family):
    folder = save_zoo(family, tmp_path / "base")
    model = zoo_model(family)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.manual_seed(1)
    steps = {name: 0.01 * torch.randn_like(weight) for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(steps[name])
    method = lox_for(folder, rank=None, strength=1.0)
    method.check(model)
    method.prepare(SimpleNamespace(oracle=SimpleNamespace(model=model), seed=0, output_dir=None))
    for name, weight in model.named_parameters():
        times = 2 if weight.ndim >= 2 else 1
        torch.testing.assert_close(weight, before[name] + times * steps[name], msg=name)


def test_a_base_of_other_shapes_is_refused_in_files_of_another_form_too(tmp_path):
    folder = save_zoo("mixtral", tmp_path / "base")
    with pytest.raises(InputError, match=r"none of the model's|it has no tensor"):
        lox_for(folder).check(zoo_model("mixtral", layers=1))
    with pytest.raises(InputError, match="it has no tensor"):
        lox_for(folder).check(zoo_model("mixtral", layers=3))


def test_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(InputError, match="full weights only"):
        immunise(
            aligned(base),
            tiny_tokenizer(),
            {},
            lox_for(base),
            TrainingConfig(lora_rank=2),
            tmp_path / "run",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0 is not"),
        ({"strength": -1.0}, "strength: -1.0"),
        ({"rank": 17}, "not meant for rank 17"),
        ({"modules": "head"}, "modules"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(LoXConfig, options, where="run.yaml: method")


def plan_for(folder, **changes):
    values = {"model": str(folder / "aligned"), "method": "lox", "streams": {}}
    return ImmunisationPlan(**(values | {"output_dir": folder / "run"} | changes))


def test_the_command_runs_it_without_streams_or_steps(base, tmp_path):
    model = aligned(base)
    model.save_pretrained(tmp_path / "aligned")
    tiny_tokenizer().save_pretrained(tmp_path / "aligned")
    with pytest.raises(InputError, match="needs the model before its alignment"):
        run_immunisation(plan_for(tmp_path))
    config = tmp_path / "run.yaml"
    config.write_text(f"method: {{name: lox, base: {base}, rank: 4}}\n")
    with pytest.warns(UserWarning, match="takes no steps"):
        document = run_immunisation(plan_for(tmp_path, config=config, steps=5))
    assert document["steps"] == 0
    assert document["passes"] == {}
    released = AutoModelForCausalLM.from_pretrained(document["model"], dtype=torch.float32)
    lox_for(base, rank=4).prepare(tiny_context(model))
    for (name, found), expected in zip(
        released.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    record = json.loads((tmp_path / "run" / "lox.json").read_text())
    assert record["base"] == str(base)
    assert len(record["hashes"]["model.safetensors"]) == 64
    assert {row["tensor"] for row in record["tensors"]} == {
        name for name, weight in model.named_parameters() if weight.ndim == 2
    }
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert 0 < manifest["preparation"]["captured"] < 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]["rank"] == 4
    # Finished work is loaded, not repeated on top of itself.
    with pytest.warns(UserWarning, match="takes no steps"):
        again = run_immunisation(plan_for(tmp_path, config=config, steps=5))
    assert again == document


def test_it_comes_first_in_a_composition(base, tmp_path):
    from mithridate.methods import METHODS

    kind = METHODS.load("lox+sft")
    parts = {"lox": {"base": str(base)}, "sft": {"batch_size": 3}}
    method = kind(from_mapping(kind.config_class, {"parts": parts}, where="-"))
    config = TrainingConfig(steps=2, learning_rate=1e-6, save_every=0)
    model, expected = aligned(base), aligned(base)
    lox_for(base).prepare(tiny_context(expected))
    result = immunise(model, tiny_tokenizer(), tiny_examples(), method, config, tmp_path / "run")
    assert result.ledger["sft/retain"].backwards == 2
    for (name, found), wanted in zip(
        result.model.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6, msg=name)
    assert method.spaces == ("full",)
    assert lox.LoX.one_shot
    assert not method.one_shot
