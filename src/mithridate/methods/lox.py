r"""LoX: extrapolate the strongest directions of alignment, without training.

arXiv 2506.15606 (COLM 2025); code VITA-Group/LoX@9213ce6 (`methods.md` §12). Per matrix,

.. math:: W \leftarrow W + \alpha\,U_k S_k V_k^\top, \qquad W - W_{base} = U S V^\top.

====================== =========================== =============================================
released code          here                        why
====================== =========================== =============================================
full rank, alpha 1     rank 6, alpha 1.25          the paper's; the code's are ``rank=None``, 1.0
difference in bf16     float32                     it is small beside the weights
three models in memory one matrix of the base      read from its safetensors as it is needed; the
                                                   whole base where files hold the weights in
                                                   another form than the model (fused experts)
exact SVD              randomised                  checked against the exact one, once a run
tied weights           once                        the code moves a shared tensor by its name
====================== =========================== =============================================
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from mithridate import models
from mithridate.configs import Count, Weight, require
from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.files import sha256_file, write_json
from mithridate.methods.base import Method, MethodConfig, RunContext, open_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_RANK = 16
_OVERSAMPLING = 24
_POWER_ITERATIONS = 4
_TOLERANCE = 1e-3
_MEND = "give the very model that this one was aligned from"


@dataclass(frozen=True, kw_only=True)
class LoXConfig(MethodConfig):
    """Options of LoX.

    Parameters
    ----------
    base
        Folder or Hub id of the model before its alignment, in safetensors.
    base_revision
        Of a base on the Hub.
    rank
        k; ``None`` takes the whole difference.
    strength
        alpha; 0 leaves the weights as they are, bit for bit.
    modules
        ``all`` matrices, embeddings and head among them, or those of ``linear`` layers only.
    svd
        ``randomised`` (ranks up to 16) or ``exact``.
    """

    base: str | None = None
    base_revision: str | None = None
    rank: Count | None = 6
    strength: Weight = 1.25
    modules: Literal["all", "linear"] = "all"
    svd: Literal["randomised", "exact"] = "randomised"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.svd == "exact" or self.rank is None or self.rank <= _LARGEST_RANK,
            f"randomised SVD is not meant for rank {self.rank}",
            f"use svd: exact, or a rank up to {_LARGEST_RANK}",
        )


class LoX(Method):
    """W + alpha * (best rank-k approximation of W - W_base), in `prepare`; no step, no stream."""

    name = "lox"
    paper = "arXiv 2506.15606"
    summary = "Extrapolates the strongest directions of alignment, without training."
    defends = "benign and mildly harmful supervised fine-tuning at low learning rates"
    limits = "fails at high learning rates; needs the base model, whose owner can subtract the step"
    spaces = ("full",)
    one_shot = True
    config_class: ClassVar[type[MethodConfig]] = LoXConfig
    streams = ()
    passes_per_step = 0
    parameter_buffers = 0

    def __init__(self, config: LoXConfig) -> None:
        self.config = config

    def check(self, model: nn.Module | None) -> None:
        """Refuse a base model that is missing, or of other shapes than ``model``."""
        base = self._base(model)
        if model is not None:
            self._pairs(model, base)
            base.check_rest(model)

    def check_tokenizer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ARG002
        self._base(None).check_words(tokenizer)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Extrapolate every matrix in turn; writes ``lox.json`` (energies, no weights)."""
        if self.config.strength == 0:
            return {"matrices": 0.0}
        model = context.oracle.model
        base = self._base(model)
        pairs = self._pairs(model, base)
        found: dict[str, float] = {"svd_error": self._check_svd(context, base, pairs)}
        rows, captured, whole = [], 0.0, 0.0
        for name, weight, source in pairs:
            delta = weight.detach() - base.read(source).to(weight)
            update = torch.stack([self._top(one, context.seed) for one in _matrices(delta)])
            energies = [float(tensor.double().square().sum()) for tensor in (update, delta)]
            with torch.no_grad():
                weight.add_(update.view_as(weight), alpha=self.config.strength)
            captured, whole = captured + energies[0], whole + energies[1]
            rows.append({"tensor": name, "captured": energies[0], "difference": energies[1]})
        if whole == 0:
            raise InactiveTermError(
                "the model is its own base: there is no alignment to extrapolate"
            )
        found |= {
            "matrices": float(len(pairs)),
            "captured": captured / whole,
            "travel": self.config.strength * math.sqrt(captured),
        }
        if context.output_dir is not None:
            record = {"base": self.config.base, "hashes": base.hashes(), "tensors": rows, **found}
            write_json(context.output_dir / "lox.json", record)
        return found

    def step(self, context: RunContext) -> dict[str, float]:
        """Leave no gradient: the work is done."""
        context.space.give_gradient(None)
        return {}

    def _base(self, model: nn.Module | None) -> BaseModel:
        if self.config.base is None:
            raise InputError(
                "LoX needs the model before its alignment",
                where="method.base",
                mend="give base: the folder or Hub id of the model this one was aligned from",
            )
        return BaseModel(self.config.base, self.config.base_revision, model)

    def _pairs(self, model: nn.Module, base: BaseModel) -> list[tuple[str, nn.Parameter, str]]:
        """Return each matrix once, with its name and its name in the base model's files."""
        excluded = _embeddings_and_head(model) if self.config.modules == "linear" else set[int]()
        names: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), []).append(name)
        return [
            (name, weight, base.find(names[id(weight)], weight.shape, model))
            for name, weight in model.named_parameters()
            if weight.ndim >= 2 and id(weight) not in excluded
        ]

    def _top(self, delta: torch.Tensor, seed: int, *, exact: bool = False) -> torch.Tensor:
        """Return the best approximation of rank k of a matrix."""
        rank = self.config.rank
        if rank is None:
            return delta
        if exact or not self._randomised(delta.shape):
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            return torch.matmul(u[:, :rank] * s[:rank], vh[:rank])
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(delta, q=rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        return torch.matmul(u[:, :rank] * s[:rank], v[:, :rank].T)

    def _randomised(self, shape: torch.Size) -> bool:
        rank = self.config.rank
        return self.config.svd == "randomised" and rank is not None and (
            rank + _OVERSAMPLING < min(shape[-2:])
        )  # fmt: skip

    def _check_svd(
        self, context: RunContext, base: BaseModel, pairs: list[tuple[str, nn.Parameter, str]]
    ) -> float:
        """Return by how much the randomised SVD falls short of the exact one on a matrix.

        Raises
        ------
        RunStoppedError
            If it misses more than a thousandth of the norm.
        """
        able = [pair for pair in pairs if self._randomised(pair[1].shape)]
        if not able:
            return 0.0
        # Any will do, and the exact decomposition of the largest takes longest.
        name, weight, source = min(able, key=lambda pair: pair[1].numel())
        delta = _matrices(weight.detach() - base.read(source).to(weight))[0]
        found, best = (float(self._top(delta, context.seed, exact=e).norm()) for e in (False, True))
        error = 1 - found / best if best else 0.0
        if error > _TOLERANCE:
            raise RunStoppedError(
                f"the randomised SVD of {name} misses {error:.2%} of the exact one's norm; "
                "use svd: exact"
            )
        return error


class BaseModel:
    """The safetensors files of a model, of which one tensor is read at a time.

    Where `transformers` renames, stacks or splits what is in the files of such a model, it loads
    the base too, whole, at the first tensor that is read.

    Parameters
    ----------
    model
        The one aligned from it.

    Raises
    ------
    InputError
        There is no such model, or no whole safetensors file in it.
    """

    def __init__(self, source: str, revision: str | None, model: nn.Module | None) -> None:
        self.source = source
        self._folder = _folder(source, revision)
        self._files = sorted(self._folder.glob("*.safetensors"))
        self._places: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in self._files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        self._places[name] = path
                        self._shapes[name] = file.get_slice(name).get_shape()
            except SafetensorError as error:
                raise InputError(
                    f"not a whole safetensors file: {error}",
                    where=str(path),
                    mend="copy or download it again",
                ) from None
        if not self._places:
            raise InputError(
                "the base model has no weights in safetensors",
                where=source,
                mend="save it with save_pretrained, and give that folder",
            )

        self._converted = model is not None and _is_converted(model)
        self._loaded: dict[str, torch.Tensor] = {}
        if self._converted:
            models.check(str(self._folder))
            config = open_part(AutoConfig, str(self._folder), what="base model", mend=_MEND)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            self._shapes = {
                name: list(weight.shape)
                for name, weight in empty.named_parameters(remove_duplicate=False)
            }

    def find(self, names: list[str], shape: torch.Size, model: nn.Module) -> str:
        """Return the name here of a tensor that goes by ``names`` in ``model``.

        Raises
        ------
        InputError
            Naming the tensor, if it is missing here or has another shape.
        """
        source = next((name for name in _spellings(names, model) if name in self._shapes), None)
        if source is None:
            raise InputError(f"it has no tensor {names[0]}", where=self.source, mend=_MEND)
        here = tuple(self._shapes[source])
        if here != tuple(shape):
            raise InputError(
                f"{names[0]} is {here} in the base model and {tuple(shape)} in the aligned one",
                where=self.source,
                mend=f"{_MEND}, with the same vocabulary",
            )
        return source

    def check_rest(self, model: nn.Module) -> None:
        """Refuse tensors here that ``model`` has no parameter for, as of a deeper model."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        # Buffers have moved between modules; what else is no loss its class says itself.
        buffers = {".".join(name.split(".")[-2:]) for name, _ in model.named_buffers()}
        ignored = [
            *(rf"(^|\.){re.escape(name)}$" for name in buffers),
            *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        ]
        rest = sorted(
            name
            for name in self._shapes.keys() - set(_spellings(names, model))
            if not any(re.search(pattern, name) for pattern in ignored)
        )
        if rest:
            raise InputError(
                f"{len(rest)} tensors of it are none of the model's (first: {rest[0]})",
                where=self.source,
                mend=_MEND,
            )

    def check_words(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a base whose tokenizer knows a token of ours by another id.

        Tokens that only one of them has are no fault: alignment may add some.
        """
        if not any(self._folder.glob("tokenizer*")):
            warnings.warn(
                f"{self.source} has no tokenizer: its vocabulary is taken to be the model's",
                stacklevel=2,
            )
            return
        from transformers import AutoTokenizer

        theirs = open_part(
            AutoTokenizer,
            str(self._folder),
            what="base model's tokenizer",
            mend="copy or download it again, or leave all tokenizer files out",
        ).get_vocab()
        moved = [
            word for word, own in tokenizer.get_vocab().items() if theirs.get(word, own) != own
        ]
        if moved:
            raise InputError(
                f"{len(moved)} tokens have another id in the base model's vocabulary (one of "
                f"them: {moved[0]!r})",
                where=self.source,
                mend=_MEND,
            )

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, as it is stored."""
        if self._converted:
            if not self._loaded:
                base, _, missing = models.load_as(
                    AutoModelForCausalLM, str(self._folder), None, what="base model", mend=_MEND
                )
                require(not missing, f"the base model lacks {', '.join(missing[:3])}", _MEND)
                self._loaded = dict(base.named_parameters(remove_duplicate=False))
            return self._loaded[name].detach()
        with safe_open(self._places[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file."""
        return {path.name: sha256_file(path) for path in self._files}


def _is_converted(model: nn.Module) -> bool:
    """Whether `transformers` makes such a model's weights from others in its files."""
    return isinstance(model, PreTrainedModel) and bool(
        get_model_conversion_mapping(model, add_legacy=False)
    )


def _spellings(names: list[str], model: nn.Module) -> list[str]:
    """Return ``names`` with and without the name of the body, which files may add or leave out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [*names, *(n.removeprefix(prefix) for n in names), *(prefix + n for n in names)]


def _folder(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    models.check_name(source, revision)
    from huggingface_hub import snapshot_download

    mend = "give a folder, or a Hub id (a private one, or no network, looks the same)"
    with models.loading("base model", source, mend):
        found: Any = snapshot_download(
            source, revision=revision, allow_patterns=["*.safetensors", "*.json", "tokenizer*"]
        )
    return Path(found)


def _matrices(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of two or more dimensions as a stack of matrices."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def _embeddings_and_head(model: nn.Module) -> set[int]:
    modules: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules.append(getattr(model, "get_output_embeddings", lambda: None)())
    return {id(weight) for module in modules if module for weight in module.parameters()}
