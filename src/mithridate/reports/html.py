"""From a template to a page that needs nothing else: autoescaped, under a strict policy."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from mithridate import __version__
from mithridate.printable import printable


def render(template: str, charts: Mapping[str, Any], **context: Any) -> str:
    """Return the page of a template, with its style, its script and what its charts show.

    Parameters
    ----------
    charts
        The numbers behind each chart, by the chart's name.
    """
    style, script = _asset("report.css"), _asset("report.js")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("mithridate.reports"),
        trim_blocks=True,
    )
    return environment.get_template(template).render(
        **context,
        script=Markup(script),
        script_hash=_csp_hash(script),
        style=Markup(style),
        style_hash=_csp_hash(style),
        version=__version__,
        chart_data=_embedded(charts),
    )


def printable_lines(text: str) -> str:
    """Return ``text`` with `printable` applied to each line."""
    return "\n".join(printable(line) for line in text.splitlines())


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf of a document with the path to it, both fit to show."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix} · {key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value, start=1):
            yield from flat(inner, f"{prefix} {index}")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield printable(prefix), printable(text, limit=400)


def _asset(name: str) -> str:
    return (files("mithridate.reports") / "templates" / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _embedded(value: Any) -> Markup:
    """Return JSON that no content can end the surrounding script element from."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
