"""What a method says of itself: needs, cost, and its options with their values and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from mithridate.configs import describe as describe_values
from mithridate.methods.base import Method, MethodConfig

_PARAMETERS = re.compile(r"\nParameters\n-+\n(.*?)(?=\n\S+\n-+\n|\Z)", re.DOTALL)


def describe(method_class: type[Method]) -> dict[str, Any]:
    """Return a method's description, with the needs and cost of its default configuration."""
    make: Any = method_class
    method: Method = make(method_class.config_class())
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "streams": list(method.streams),
        "spaces": list(method.spaces),
        "passes_per_step": method.passes_per_step,
        "parameter_buffers": method.parameter_buffers,
        "defends": method.defends,
        "limits": method.limits,
        "options": options_of(method_class.config_class),
    }


def options_of(config_class: type[MethodConfig]) -> list[dict[str, Any]]:
    """Return each option's name, default, the values that it takes, and help, in order."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    told = help_of(config_class)
    default = config_class()
    return [
        {
            "name": field.name,
            "default": _plain(getattr(default, field.name)),
            "values": describe_values(hints[field.name]),
            "help": told.get(field.name, ""),
        }
        for field in dataclasses.fields(config_class)
    ]


def help_of(config_class: type[MethodConfig]) -> dict[str, str]:
    """Return what the docstrings of a configuration and of its bases say of each option."""
    found: dict[str, str] = {}
    for kind in reversed(config_class.__mro__):
        section = _PARAMETERS.search(inspect.cleandoc(kind.__doc__ or ""))
        names: list[str] = []
        for line in section[1].splitlines() if section else ():
            if line.startswith(" "):
                words = line.strip().replace("``None``", "null").replace("``", "")
                for name in names:
                    found[name] = f"{found[name]} {words}".strip()
            else:
                names = line.split(", ")
                found |= dict.fromkeys(names, "")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
