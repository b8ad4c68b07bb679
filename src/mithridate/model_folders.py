"""What a model's files say of it, read before any library builds anything from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mithridate.errors import InputError
from mithridate.printable import printable

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 1 << 28
"""Bytes: the largest tokenizers and indices have a tenth of it."""

_FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types that weights are trained in, and what each is released as."""

_COUNTS = re.compile(
    r"(num|n)_\w*(layers?|blocks?|experts?|heads?|labels)|num_layers|n_(layer|head)|depths?"
    r"|\w+_layers|\w+_heads|\w+_experts|(mamba_)?chunk_size"
)
"""Settings that a library counts up to while it builds a model or runs it."""

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST = 4096
_LONGEST_LISTED = 10**7

_AGAIN = "copy or download it again"
FULL_PRECISION = "quantised weights: give the full-precision model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the weights in a model's files are.

    Attributes
    ----------
    shapes
        Of every floating-point tensor, by its name in the files.
    tensors
        How many tensors of any kind there are.
    dtype
        Name of the type that most of the weights have; double precision counts as single.
    """

    shapes: dict[str, tuple[int, ...]]
    tensors: int
    dtype: str

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(map(prod, self.shapes.values()))


def adapter_parameters(shapes: Iterable[tuple[int, ...]], rank: int) -> int:
    """Return how many weights a LoRA adapter on every matrix of these shapes has."""
    return sum(rank * prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes if len(shape) >= 2)


def check_model_folder(folder: Path) -> Stored:
    """Refuse a model folder that cannot be loaded safely; return what its weights are.

    Raises
    ------
    InputError
        Naming everything it lacks; or it holds an adapter, quantised weights, weights only as
        pickle, an index that leads elsewhere, or a damaged file.
    """
    if (folder / "adapter_config.json").is_file():
        merge = "merge it into its base model (peft: merge_and_unload) and save that"
        if not (folder / "config.json").is_file():
            raise InputError("an adapter without its model", where=str(folder), mend=merge)
        raise InputError(
            "an adapter beside a model: which of them is meant is not plain, and the adapter's "
            "base would be loaded in place of these weights",
            where=str(folder),
            mend=f"{merge}; or move adapter_config.json away to use the model without it",
        )
    faults = []
    if not (folder / "config.json").is_file():
        faults.append("no config.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        faults.append("no tokenizer (tokenizer.json)")
    mend = "save the model and its tokenizer there with save_pretrained"
    shards = _shards(folder)
    if not (folder / _WHOLE).is_file() and not shards:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            faults.append(f"weights only as pickle ({pickles[0].name}), which can run any code")
            mend = (
                "convert it where you trust its origin: load it there and save it again with "
                "save_pretrained, which writes safetensors"
            )
        else:
            faults.append(f"no weights ({_WHOLE}, or shards and their index)")
    faults += [
        f"the index names {printable(name, limit=100)}, which is not there"
        for name in shards
        if not (folder / name).is_file()
    ]
    if faults:
        raise InputError("; ".join(faults[:5]), where=str(folder), mend=mend)
    for path in sorted(folder.glob("*.json")):
        _check_place(path)
        if path.name not in ("tokenizer.json", "vocab.json", _INDEX):
            read_json(path)
    stored = _stored(folder, shards)
    check_config(read_json(folder / "config.json"), folder / "config.json", most=stored.tensors)
    return stored


def count_parameters(folder: Path) -> int:
    """Return the number of stored weights, read from the safetensors headers alone."""
    return _stored(folder, _shards(folder)).parameters


def check_config(config: Any, where: Path | str, *, most: int = 0) -> None:
    """Refuse a configuration of quantised weights, or of more parts than any model has.

    Parameters
    ----------
    config
        The content of a ``config.json``.
    most
        How many tensors there are in the model's files.

    Raises
    ------
    InputError
        Naming the setting.
    """
    place = str(where)
    if not isinstance(config, dict):
        raise InputError("not a model's configuration: no mapping", where=place, mend=_AGAIN)
    for path, value in _settings(config):
        name = path.rpartition(".")[2]
        if name in ("quantization_config", "quantization", "compression_config") and value:
            raise InputError(FULL_PRECISION, where=f"{place}: {path}", mend=_FULL)
        if name == "transformers_weights" and value is not None:
            raise InputError(
                "the configuration names weights of its own",
                where=f"{place}: {path}",
                mend=f"remove the key, and save the weights as {_WHOLE}",
            )
        if not isinstance(value, int):
            continue
        limit = max(_MOST, most) if _COUNTS.fullmatch(name) else None
        if name in _DEPTHS and most:
            limit = most  # every layer has a tensor at least
        elif name.isdigit():
            limit = _LONGEST_LISTED
        if limit is not None and value > limit:
            raise InputError(
                f"{path} is {printable(str(value), limit=40)}, which no model has",
                where=place,
                mend=_AGAIN,
            )
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        for name in _DEPTHS:
            if isinstance(one.get(name), int) and one[name] < 1:
                raise InputError(f"{name} is {one[name]}: no layers", where=place, mend=_AGAIN)


_FULL = "use the model it was made from, or save it again with its weights in float32 or bfloat16"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file from somebody else.

    Raises
    ------
    InputError
        It is not JSON, or too large or too deeply nested to be read.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is too large")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot be read as JSON: {printable(str(error), limit=150)}",
            where=str(path),
            mend=_AGAIN,
        ) from None


def _settings(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every setting of a configuration with its dotted path; a list's by their number."""
    if depth > 20:
        return
    rows: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        rows = iter(value.items())
    elif isinstance(value, list):
        rows = iter(enumerate(value))
    else:
        return
    for name, inner in rows:
        place = printable(f"{path}.{name}" if path else str(name), limit=100)
        yield place, inner
        yield from _settings(inner, place, depth + 1)


def _shards(folder: Path) -> list[str]:
    """Return the names of the files that the index of weights names, each once."""
    index = folder / _INDEX
    if not index.is_file():
        return []
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError("not an index of weights", where=str(index), mend=_AGAIN)
    names = sorted(set(places.values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise InputError(
                f"the index names {printable(name, limit=100)}: only safetensors files are read",
                where=str(index),
                mend="save the model again with save_pretrained, which writes safetensors",
            )
        if Path(name).name != name:
            raise InputError(
                f"the index leads out of its folder ({printable(name, limit=100)})",
                where=str(index),
                mend="put the shards beside the index",
            )
    return names


def _stored(folder: Path, shards: list[str]) -> Stored:
    # As transformers chooses: other safetensors files, as consolidated ones, are not read.
    names = [_WHOLE] if (folder / _WHOLE).is_file() else shards
    shapes: dict[str, tuple[int, ...]] = {}
    weights: dict[str, int] = {}
    tensors = 0
    for name in names:
        _check_place(folder / name)
        for tensor, (kind, shape) in _header(folder / name).items():
            tensors += 1
            if kind in _FLOATS:
                shapes[tensor] = shape
                weights[_FLOATS[kind]] = weights.get(_FLOATS[kind], 0) + prod(shape)
            elif len(shape) >= 2 and tensor.rpartition(".")[2].startswith(_PACKED):
                where = f"{folder / name}: {printable(tensor, limit=80)} ({kind})"
                raise InputError(FULL_PRECISION, where=where, mend=_FULL)
    dtype = max(weights, key=weights.__getitem__, default="float32")
    return Stored(shapes=shapes, tensors=tensors, dtype=dtype)


_PACKED = ("weight", "qweight", "down_proj", "gate_up_proj", "gate_proj", "up_proj")
"""How names of matrices begin that only quantised checkpoints keep as anything but floats."""


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {
                name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"not a whole safetensors file: {printable(str(error), limit=150)}",
            where=str(path),
            mend=_AGAIN,
        ) from None


def _check_place(path: Path) -> None:
    """Refuse a link that leads out of the folder, but for the cache of the Hub, made of links."""
    if not path.is_symlink():
        return
    target, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs"
    if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
        raise InputError(
            "a link that leads out of the folder",
            where=str(path),
            mend="copy the file there, or give the folder that holds it",
        )
