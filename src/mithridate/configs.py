"""Configurations: frozen keyword-only dataclasses, read from mappings, all errors at once."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from mithridate.errors import InputError, shortened
from mithridate.printable import quoted

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """What a value must be beside its type, within `typing.Annotated`.

    Attributes
    ----------
    told
        For a reader, for example ``"above 0"``.
    admits
        Whether a value of the type is within.
    """

    told: str
    admits: Callable[[Any], bool]


LARGEST_SEED = 2**32 - 1
"""NumPy's generator and the Trainer take none above it."""

Seed = Annotated[int, Limit(f"0 to {LARGEST_SEED}", lambda n: 0 <= n <= LARGEST_SEED)]
Natural = Annotated[int, Limit("0 or more", lambda n: n >= 0)]
Count = Annotated[int, Limit("1 or more", lambda n: n >= 1)]
Weight = Annotated[float, Limit("0 or more", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Limit("above 0", lambda x: 0 < x < math.inf)]
Share = Annotated[float, Limit("0 to 1", lambda x: 0 <= x <= 1)]
Steps = Annotated[tuple[int, int], Limit("1 <= low <= high", lambda pair: 1 <= pair[0] <= pair[1])]
Range = Annotated[
    tuple[float, float], Limit("0 < low <= high", lambda pair: 0 < pair[0] <= pair[1] < math.inf)
]


_BYTES_A_VALUE = 52
_MOST_DEPTH = 32
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield the nodes that a list or a mapping is made of."""
    if not isinstance(node, yaml.ScalarNode):
        for part in node.value:
            yield from part if isinstance(part, tuple) else (part,)


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` for plain values, bounded, and not silent about keys given twice.

    Counted is what the document says with its aliases written out: a few lines of them can stand
    for more than any memory holds.
    """

    def __init__(self, stream: bytes, most_values: int) -> None:
        super().__init__(stream)
        self._most_values = most_values
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse what is too deep or too large before it is built."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._values += 1
        if self._depth > _MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is too deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
        elif node is not None and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(
                None, None, "the alias stands within what it names", mark
            )
        if max(self._values, self._sizes.get(id(node), 0)) > self._most_values:
            raise yaml.composer.ComposerError(
                None, None, f"it stands for more than {self._most_values} values", mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {quoted(key.value)} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# A date stays the text that it is; sets, binary values and other objects are refused.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: function
    for tag, function in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}


# YAML 1.1 reads 1e-4, the usual way to write a learning rate, as text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def from_mapping(cls: type[C], values: Mapping[str, Any], *, where: str) -> C:
    """Build the dataclass ``cls`` from ``values``; unknown keys and wrong values are errors.

    Parameters
    ----------
    cls
        A keyword-only dataclass; its ``__post_init__`` may raise `InputError` for ranges.
    values
        For example one section of a YAML file.
    where
        Shown in error messages, for example ``"run.yaml: method"``.

    Raises
    ------
    InputError
        Naming every faulty key together.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"{quoted(values)} is not a mapping", where=where, mend="use key: value lines"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    faults = []
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(quoted(key).strip("'"), fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            faults.append(f"unknown key {quoted(key)}{hint}")
        elif not _fits(value, hints[key]):
            faults.append(f"{key}: {quoted(value)} is not {_due(value, hints[key])}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and name not in values
    ]
    faults += [f"missing key {name!r}" for name in missing]
    if faults:
        named = missing or values.keys() - fields.keys()
        mend = f"known keys: {', '.join(fields)}" if named else "correct what is named"
        raise InputError("; ".join(faults), where=where, mend=mend)
    converted = {key: _convert(value, hints[key]) for key, value in values.items()}
    try:
        return cls(**converted)
    except InputError as error:
        raise InputError(error.what, where=where, mend=error.mend) from None


def check_values(config: Any) -> None:
    """Raise `InputError` naming every field of a dataclass that is not as its annotation says."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    faults = [
        f"{field.name}: {quoted(value)} is not {_due(value, hints[field.name])}"
        for field in dataclasses.fields(config)
        if not _fits(value := getattr(config, field.name), hints[field.name])
    ]
    require(not faults, "; ".join(faults), "correct what is named")


def read_yaml(path: Path, *, most_values: int = 20_000) -> dict[str, Any]:
    """Read a YAML mapping of plain values; anything else is an `InputError`.

    Unlike with `yaml.safe_load`, a key given twice is an error.

    Parameters
    ----------
    most_values
        Bound on the values that the file stands for, its aliases written out; a bound on its bytes
        follows from it.
    """
    where = str(path)
    try:
        loader = _Loader(_bounded(path, most_values * _BYTES_A_VALUE), most_values)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("no such file", where=where, mend="check the path") from None
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=where, mend="check the path"
        ) from None
    # Text that looks like a number and is none (0x_) is a plain ValueError there.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"not valid YAML: {shortened(str(error), 400)}", where=where, mend="correct the file"
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError("the top level is not a mapping", where=where, mend="use key: value lines")
    return value


def _bounded(path: Path, most_bytes: int) -> bytes:
    fault = ""
    if path.is_fifo() or path.is_char_device():
        fault = "is no regular file"
    else:
        with path.open("rb") as handle:
            data = handle.read(most_bytes + 1)
        if len(data) <= most_bytes:
            return data
        fault = f"holds more than {most_bytes >> 10} KiB"
    raise InputError(fault, where=str(path), mend="give a YAML file")


def require(condition: bool, what: str, mend: str) -> None:
    """Raise `InputError` unless ``condition`` holds; for ranges in ``__post_init__``."""
    if not condition:
        raise InputError(what, mend=mend)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for option in _alternatives(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            kind, limit = arguments
            if _fits(value, kind) and limit.admits(_convert(value, kind)):
                return True
        elif option is Any:
            return True
        if option is None or option is type(None):
            if value is None:
                return True
        elif origin is typing.Literal:
            if any(value == known and type(value) is type(known) for known in arguments):
                return True
        elif origin in (tuple, list):
            if isinstance(value, (list, tuple)):
                inner = arguments[0] if arguments else Any
                if origin is tuple and arguments and arguments[-1] is not Ellipsis:
                    if len(value) == len(arguments) and all(
                        _fits(item, kind) for item, kind in zip(value, arguments, strict=True)
                    ):
                        return True
                elif all(_fits(item, inner) for item in value):
                    return True
        elif origin is dict:
            if isinstance(value, dict) and all(
                _fits(key, kind) and _fits(item, inner)
                for kind, inner in (arguments or (Any, Any),)
                for key, item in value.items()
            ):
                return True
        elif option is float:
            # NaN passes every comparison with a bound that is written the wrong way round.
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
                return True
            if isinstance(value, str) and _EXPONENT.fullmatch(value):
                return True
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(option, type) and isinstance(value, option):
            return True
    return False


def _convert(value: Any, hint: Any) -> Any:
    options = [_bare(option) for option in _alternatives(hint) if _fits(value, option)]
    for option in options:
        arguments = typing.get_args(option)
        if typing.get_origin(option) is tuple:
            kinds = itertools.repeat(arguments[0]) if arguments[-1] is Ellipsis else arguments
            return tuple(map(_convert, value, kinds))
        if typing.get_origin(option) is dict and arguments:
            return {key: _convert(item, arguments[1]) for key, item in value.items()}
        if option is float and not {int, str} & set(options):
            return float(value)
    return value


def _due(value: Any, hint: Any) -> str:
    """Return what ``value`` should have been: the limit, where its type is right."""
    for option in _alternatives(hint):
        if typing.get_origin(option) is Annotated and _fits(value, _bare(option)):
            told: str = typing.get_args(option)[1].told
            return told
    return describe(hint)


def _bare(option: Any) -> Any:
    return typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option


def describe(hint: Any) -> str:
    """Return what a value with this annotation may be, for a reader."""
    words = []
    for option in _alternatives(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            kind, limit = arguments
            words.append(f"{describe(kind)} ({limit.told})")
        elif origin is typing.Literal:
            known = [repr(value) for value in arguments]
            words.append("one of " * (len(known) > 1) + ", ".join(known))
        elif origin in (tuple, list):
            inner = [describe(kind) for kind in arguments if kind is not Ellipsis]
            several = origin is list or Ellipsis in arguments
            words.append(f"list of {inner[0]}" if several else f"[{', '.join(inner)}]")
        elif origin is dict:
            words.append(f"mapping to {describe(arguments[1])}")
        elif option is type(None):
            words.append("null")
        else:
            words.append(getattr(option, "__name__", str(option)))
    return " or ".join(words)
