"""An encoder's folder is somebody else's: no code of its runs, and its faults are named."""

from __future__ import annotations

import json

import pytest
from transformers import BertConfig, BertModel

from mithridate.embeddings import load_encoder
from mithridate.errors import InputError
from tests.training.tiny_world import tiny_tokenizer

pytest.importorskip("sentence_transformers")


@pytest.fixture
def folder(tmp_path):
    config = BertConfig(
        vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    name_modules(tmp_path, "sentence_transformers.models.Transformer")
    return tmp_path


def name_modules(folder, first):
    kinds = [(first, ""), ("sentence_transformers.models.Pooling", "1_Pooling")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": kind}
        for n, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_whole_folder_encodes(folder):
    assert load_encoder(str(folder))(["w1 w2", "w3"]).shape == (2, 16)


@pytest.mark.parametrize("kind", ["evil.Module", "os.path", "subprocess.Popen"])
def test_classes_of_its_own_are_refused(folder, kind):
    mark = folder / "ran"
    name_modules(folder, kind)
    with pytest.raises(InputError, match="brings code of its own"):
        load_encoder(str(folder))
    name_modules(folder, "sentence_transformers.models.Transformer")
    (folder / "1_Pooling" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(InputError, match="brings code of its own"):
        load_encoder(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", "{"),
        ("config.json", "{"),
        ("config.json", '{"model_type": "nothing-known"}'),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "no"),
        ("1_Pooling/config.json", "[]"),
    ],
)
def test_a_damaged_folder_is_an_input_error(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_encoder(str(folder))
    assert len(caught.value.what) < 300


def test_weights_as_pickle_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=r"safetensors"):
        load_encoder(str(folder))


def test_a_slip_in_a_path_is_told_at_once(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load_encoder(str(tmp_path / "modle"))
