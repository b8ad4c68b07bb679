"""Opening a model that a user named, with every fault found before any work is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mithridate.errors import InputError
from mithridate.model_folders import Stored, check_config, check_model_folder
from mithridate.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GIB = 1024**3
_GROUP = Path("/sys/fs/cgroup")
_BYTES = 4  # float32 weights, gradients and optimiser state (`style.md`, trap 6)
_LARGEST_BUFFERS = 2 * _GIB
_OLD_BUFFERS = {"inv_freq", "masked_bias", "position_ids"}
_FILES = {".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors"}
_TEXT = "What is 12 + 3?\nÉté, 中文 \u05d0 🙂 w1"
"""Of several scripts: a tokenizer that lacks its unknown token fails on some only."""

_TRIED = 8
"""Tokens that a model is tried on."""

_HUB_MEND = (
    "give a folder that from_pretrained loads, or a Hub id with a causal language model in "
    "safetensors (a private or missing one, or no network, looks the same)"
)
_NEWER = "pip install -U transformers tokenizers, if a newer version has written it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a planned run needs at its peak, in bytes.

    Attributes
    ----------
    memory
        Where the model is trained: on the accelerator, or else on the machine itself.
    host
        On the machine itself where an accelerator trains: the weights pass through it.
    """

    memory: int
    disk: int
    host: int


def check(source: str, revision: str | None = None) -> Stored | None:
    """Refuse a folder or Hub id that no model can be loaded from, before anything is loaded.

    Returns
    -------
    Stored or None
        What the weights of a folder are; ``None`` for a Hub id, of which only the configuration
        is looked at.

    Raises
    ------
    InputError
        The folder lacks something or its weights cannot be used (`check_model_folder`); the path
        or the id does not exist.
    """
    folder = Path(source)
    if source and folder.is_dir():
        return check_model_folder(folder)
    check_name(source, revision)
    from transformers import PreTrainedConfig

    with loading("model", source, _HUB_MEND):
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    check_config(config, source)
    return None


def check_name(source: str, revision: str | None = None) -> None:
    """Refuse what is no folder and can be no Hub id, or is a slip in a path.

    Raises
    ------
    InputError
        Without asking the Hub, which takes most of a minute to say so.
    """
    folder = Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    mend = "check the path; a Hub id is name or owner/name"
    if folder.exists() or folder.suffix in _FILES:
        raise InputError("a model is a folder, not a file", where=_named(source), mend=mend)
    try:
        validate_repo_id(source)
        cached = try_to_load_from_cache(source, "config.json", revision=revision) is not None
    except (HFValidationError, OSError, ValueError):
        raise InputError("no such model folder", where=_named(source), mend=mend) from None
    if not cached and "/" in source and folder.parent.is_dir():
        raise InputError(
            f"no such model folder: {folder.parent} has no {folder.name}",
            where=_named(source),
            mend=f"{mend}, asked for where no folder {folder.parent} is",
        )


def load(
    source: str, *, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the float32 model and tokenizer at a folder or Hub id; no code of theirs is run.

    The model is tried once: what it answers to a few tokens must be numbers, and must not hang on
    the tokens after them. Beside its text part, which alone is trained, it may keep frozen towers
    for images or sound.

    Raises
    ------
    InputError
        The folder lacks something, the weights are pickled, quantised, damaged or do not fit, the
        model is no causal language model, or there is no such model.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer, missing = load_as(
        AutoModelForCausalLM, source, revision, what="model", mend=_HUB_MEND
    )
    with loading("model", source, _HUB_MEND):
        _check_fit(source, model, tokenizer, missing)
        _freeze_towers(model)
    return model, tokenizer


def load_as(
    kind: Any, source: str, revision: str | None, *, what: str, mend: str
) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """Return a float32 model and its tokenizer, and the names of weights that no file holds.

    Parameters
    ----------
    kind
        One of `transformers`' Auto classes.
    what, mend
        For the message: what was to be loaded, and what to give instead.

    Raises
    ------
    InputError
        The weights are pickled, quantised, damaged or do not fit, some have no place in the
        model, or there is no such model.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    stored = check(source, revision)
    own = {"revision": revision, "trust_remote_code": False}
    folder = Path(source)
    with loading(what, source, mend):
        config = AutoConfig.from_pretrained(source, **own)
        causal = kind.__name__ == "AutoModelForCausalLM"
        if type(config) not in kind._model_mapping or (causal and config.is_encoder_decoder):
            several = config.get_text_config() is not config
            raise InputError(
                f"a model of type {config.model_type} "
                + ("takes more than text" if several else "is of another kind"),
                where=_named(source),
                mend=f"{mend}; of a model that sees or hears, the text part saved on its own"
                if several
                else mend,
            )
        if stored:
            _check_size(kind, config, stored, folder)
    with loading(f"{what}'s tokenizer", source, f"{_NEWER}, or {mend}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **own)
    with loading(what, source, mend):
        model, report = kind.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **own
        )
        _check_left_out(source, model, report["unexpected_keys"])
        _check_finite(source, model)
    return model, tokenizer, sorted(report["missing_keys"])


def stored_dtype(source: str, revision: str | None = None) -> str:
    """Return the name of the type of a model's weights in its files; `load` must have run."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(source, "config.json", revision=revision, local_files_only=True)
        assert found is not None, "the model has been loaded"
        folder = Path(found).parent
    return check_model_folder(folder).dtype


def positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens ``model`` takes at a time, where its configuration says so."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def requirements(
    parameters: int, *, copies: int, checkpoints: int, adapter: int | None = None
) -> Requirements:
    """Return what training ``parameters`` weights in float32 needs at its peak.

    Parameters
    ----------
    copies
        Parameter-sized buffers in all: AdamW on all weights takes four (weights, gradient, two
        moments) and a method's own on top; an adapter leaves one.
    checkpoints
        Checkpoints kept at a time, each with the trained weights and their optimiser state, beside
        the final model.
    adapter
        Weights of the adapter that is trained, and kept too, in place of the model's.

    Notes
    -----
    Activations of a small batch are allowed a fifth of that, and the libraries 1 GiB.
    """
    size = parameters * _BYTES
    trained = size if adapter is None else adapter * _BYTES
    small = 0 if adapter is None else trained
    return Requirements(
        memory=int((size * copies + 4 * small) * 1.2) + _GIB,
        disk=size + small + 3 * trained * checkpoints,
        host=int(size * 1.2) + _GIB,
    )


def check_room(needed: Requirements, output_dir: Path) -> None:
    """Refuse a run that there is too little memory or disk for.

    Memory is the accelerator's where there is one, and the machine's for loading the model.

    Raises
    ------
    InputError
        Naming what is needed and what is free; or nothing can be written there at all.
    """
    place = _existing(output_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"nothing can be written there: {place} is "
            + ("not writable" if place.is_dir() else "not a folder"),
            where=str(output_dir),
            mend="choose another --output-dir",
        )
    device = accelerator_memory()
    host = needed.memory if device is None else needed.host
    rooms = [("memory", host, available_memory())]
    if device is not None:
        rooms.append(("memory on the accelerator", needed.memory, device))
    for kind, wanted, free in rooms:
        if wanted > free:
            raise InputError(
                f"too little {kind}: this run needs about {wanted / _GIB:.1f} GiB, "
                f"{free / _GIB:.1f} GiB are free",
                mend="end other programs, use a smaller model, set lora_rank in the configuration, "
                "or use a larger machine",
            )
    free_disk = free_space(output_dir)
    if needed.disk > free_disk:
        raise InputError(
            f"too little disk: this run needs about {needed.disk / _GIB:.1f} GiB, "
            f"{free_disk / _GIB:.1f} GiB are free",
            where=str(output_dir),
            mend="free some space or choose another --output-dir",
        )


def accelerator_memory() -> int | None:
    """Return the bytes that are free on the accelerator; ``None`` where it has none of its own."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0])


def available_memory() -> int:
    """Return the bytes of memory that can still be used, within the control group's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        rows = (line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # The group's account includes the file cache, which is given up on demand.
        cache = next(int(value) for name, value in rows if name == "file")
    except (OSError, ValueError, StopIteration):
        return free
    return min(free, limit - used + cache)


def free_space(path: Path) -> int:
    """Return the free bytes of the file system that ``path`` is or will be on."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def loading(what: str, source: str, mend: str) -> Iterator[None]:
    """Turn whatever the libraries raise over somebody's files into an input error.

    Parameters
    ----------
    what, source
        For the message: what is loaded, and from where.
    mend
        What to give instead.

    Raises
    ------
    InputError
        With the first line of what was raised, cut to 200 characters.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # transformers, tokenizers, safetensors, the Hub's client and Jinja raise what they like over a
    # damaged file, and a panic in Rust is no Exception.
    except BaseException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0].strip() if lines else type(error).__name__
        raise InputError(
            f"this {what} cannot be loaded: {printable(reason, limit=200)}",
            where=_named(source),
            mend=mend,
        ) from error


def _named(source: str) -> str:
    return printable(source, limit=200)


def _check_size(kind: Any, config: Any, stored: Stored, folder: Path) -> None:
    """Refuse a configuration of a larger model than the files hold, before any of it is made."""
    import torch

    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.float32)
    weights = sum(weight.numel() for weight in model.parameters())
    # A few that are missing are named once all are loaded.
    if weights > 2 * stored.parameters:
        raise InputError(
            f"the configuration describes {weights} weights, the files hold {stored.parameters}",
            where=str(folder),
            mend="give the folder of the whole model, with its causal language model head, and "
            "the configuration that belongs to it",
        )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > _LARGEST_BUFFERS + _BYTES * stored.parameters:
        raise InputError(
            f"the configuration asks for {buffers / _GIB:.0f} GiB beside the weights",
            where=str(folder / "config.json"),
            mend="give the configuration that belongs to these weights",
        )


def _freeze_towers(model: PreTrainedModel) -> None:
    if model.config.get_text_config() is model.config:
        return
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(weight) for part in parts for weight in part.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in text)


def _check_left_out(source: str, model: PreTrainedModel, names: Collection[str]) -> None:
    """Refuse weights that the model has no place for: saved again, it would lack them."""
    # Buffers that are computed now stand in older files.
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | _OLD_BUFFERS
    lost = sorted(name for name in names if name.rpartition(".")[2] not in buffers)
    if lost:
        raise InputError(
            f"{type(model).__name__} has no place for {len(lost)} weights of the files (first: "
            f"{printable(lost[0], limit=100)}), and saving it would lose them",
            where=_named(source),
            mend="give a text model alone, with the configuration that belongs to its weights",
        )


def _check_finite(source: str, model: PreTrainedModel) -> None:
    import torch

    for name, weight in model.named_parameters():
        if weight.numel() and not all(torch.isfinite(end) for end in torch.aminmax(weight)):
            raise InputError(
                f"the weights {name} hold NaN or infinity",
                where=_named(source),
                mend="give a model that answers: copy or download it again",
            )


def _check_fit(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    missing: list[str],
) -> None:
    import torch

    if missing:
        # `transformers` fills them with random numbers and only warns.
        raise InputError(
            f"{len(missing)} weights of the model are not in its files (first: {missing[0]})",
            where=source,
            mend="give the folder of the whole model, with its causal language model head",
        )
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor), "a causal language model embeds token ids"
    rows = embedding.shape[0]
    words = tokenizer.get_vocab()
    needed = max(len(tokenizer), 1 + max(words.values(), default=-1))
    if needed > rows:
        raise InputError(
            f"the tokenizer has {needed} tokens, the model only {rows}",
            where=source,
            mend="give the tokenizer that belongs to this model",
        )
    if not words or not tokenizer(_TEXT, add_special_tokens=False).input_ids:
        raise InputError(
            "the tokenizer makes no tokens of text",
            where=source,
            mend="give the tokenizer that belongs to this model",
        )
    _check_answers(source, model, sorted(words.values()))


@contextmanager
def _still(model: PreTrainedModel) -> Iterator[None]:
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _check_answers(source: str, model: PreTrainedModel, ids: list[int]) -> None:
    """Try the model once: it gives numbers, and none that hang on what comes later."""
    import torch

    # From the middle of the vocabulary, away from tokens that stand for padding or an image.
    plain = ids[len(ids) // 2 :][: _TRIED + 1]
    row = (plain * _TRIED)[: max(2, min(_TRIED, positions(model) or _TRIED))]
    other = [*row[:-1], plain[-1]]
    with _still(model):
        first, second = (
            model(input_ids=torch.tensor([one], device=model.device)).logits for one in (row, other)
        )
    if not first.isfinite().all():
        raise InputError(
            "the model answers with NaN or infinity",
            where=source,
            mend="give a model that answers: copy or download it again",
        )
    moved = (first - second)[:, :-1].abs().amax()
    if moved > 1e-5 * first.abs().amax():
        raise InputError(
            f"{type(model).__name__} looks at later tokens too: it is no causal language model",
            where=source,
            mend="give a model that was trained to go on with a text",
        )
