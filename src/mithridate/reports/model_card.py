"""The model card of an immunised model: what was done to it, and what nobody has shown yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from mithridate import __version__
from mithridate.files import write_atomic
from mithridate.methods import METHODS

_TEXT = """---
{metadata}
---

# A model immunised with {method}

{summary} Source of the method: {paper}. Planted with mithridate {version} in {space},
seed {seed}, {steps} optimiser steps; the weights are stored in {dtype}.

- Meant against: {defends}.
- Known limits: {limits}.

**Nothing here says that it holds.** This card was written when planting ended, before any attack.
Attack this model and the model it was made from with `mithridate attack`, and read what the report
says it does not show. A collapse trap is no access control: whoever holds a model from before
immunisation is not stopped by it.

## Configuration

```yaml
{settings}
```
"""


def write_model_card(run_dir: Path, *, base: str, revision: str | None = None) -> Path:
    """Write ``model/README.md`` into the folder of a finished immunisation; return its path.

    Parameters
    ----------
    base, revision
        What the model was made from. A path of this machine is nobody else's business and is
        left out.
    """
    settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    training = settings["training"]
    method = METHODS.load(settings["method"]["name"])
    public = None if Path(base).is_dir() else base
    metadata = ModelCardData(
        base_model=public,
        base_model_relation="finetune" if public else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mithridate", method.name],
    )
    if public and revision:
        settings = {"revision": revision, **settings}
    text = _TEXT.format(
        metadata=metadata.to_yaml(),
        method=method.name,
        summary=method.summary,
        paper=method.paper,
        version=__version__,
        space="all weights" if training["lora_rank"] is None else "a LoRA adapter, since merged",
        seed=training["seed"],
        steps=0 if method.one_shot else training["steps"],
        dtype=training["save_dtype"],
        defends=method.defends,
        limits=method.limits,
        settings=yaml.safe_dump(_public(settings), sort_keys=False).rstrip(),
    )
    path = run_dir / "model" / "README.md"
    write_atomic(path, text)
    return path


def _public(value: Any) -> Any:
    """Return settings with every path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value
