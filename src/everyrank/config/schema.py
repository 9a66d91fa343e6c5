"""Turning a mapping into a frozen dataclass: every mistake at once, each with its path and the nearest valid name.

A schema is a pydantic dataclass made by ``section``; it sits beside what it configures. Fields carry their
documentation (``field(..., doc="...")``), from which the reference page is generated.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from everyrank.config.resolve import import_object
from everyrank.errors import ConfigError, did_you_mean

T = TypeVar("T")

_FORBID = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

# Strict: `true` is no number, and "4" is text.
Int = Annotated[int, pydantic.Strict()]
Float = Annotated[float, pydantic.Strict()]
Bool = Annotated[bool, pydantic.Strict()]
_MISSING = dataclasses.MISSING


def field(*, doc: str, default: Any = _MISSING, factory: Any = _MISSING, **constraints: Any) -> Any:
    """Declare a documented field of a section.

    Args:
        doc: What the key does, one or two sentences, for the reference page.
        default: Its default; without one (and without ``factory``) the key is required.
        factory: Makes the default, for mutable values and nested sections.
        constraints: Passed to ``pydantic.Field``: ``ge``, ``gt``, ``le``, ...
    """
    if factory is not _MISSING:
        return pydantic.Field(default_factory=factory, description=doc, **constraints)
    if default is not _MISSING:
        return pydantic.Field(default=default, description=doc, **constraints)
    return pydantic.Field(description=doc, **constraints)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def section(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only section of a configuration; keys it does not have are mistakes."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=_FORBID)(cls)  # type: ignore[return-value]


def _resolve(value: Any) -> Any:
    if isinstance(value, str):
        try:
            # A bare name is one of everyrank's own: GNNModel, DefaultEarlyStopping.
            return import_object(value if "." in value else f"everyrank.{value}")
        except ConfigError as error:
            raise ValueError(str(error)) from error
    if not callable(value):
        raise ValueError(
            f"found {_shown(value)}, but it must be a class or function: !pyobject package.module.name, or that name as"
            " text."
        )
    return value


# A class or function, given as the object itself (from `!pyobject`) or as its full dotted name.
ObjectRef = Annotated[Any, pydantic.BeforeValidator(_resolve), "class or function"]


def build(
    schema: type[T], values: Any, *, what: str = "configuration", checks: Callable[[T], list[str]] | None = None
) -> T:
    """Return ``values`` as a ``schema``, or raise one ConfigError that lists every mistake.

    Args:
        schema: A class made by ``section``.
        values: A mapping of plain values, lists, mappings and objects.
        what: What the message calls it.
        checks: Called with the result; returns further problems, those between several keys.

    Raises:
        ConfigError: Its ``problems`` say for each mistake the path, what was found and what is allowed.
    """
    if isinstance(values, schema):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"The {what} must be a mapping of keys to values, but {_shown(values)} was found.")
    try:
        result = pydantic.TypeAdapter(schema).validate_python(_as_meant(schema, _plain(values)))
    except pydantic.ValidationError as error:
        raise _config_error(_problems(schema, error.errors()), what) from None
    problems = checks(result) if checks is not None else []
    if problems:
        raise _config_error(problems, what)
    return result


def as_mapping(config: Any) -> dict[str, Any]:
    """Return a section as nested plain dictionaries, objects left as they are."""
    return {f.name: _as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _as_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and hasattr(value, "__pydantic_fields__"):
        return as_mapping(value)
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_plain(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Return mappings and sequences of any kind (OmegaConf's too) as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value


# What YAML 1.1 makes of these words, which Hydra and PyYAML follow, cannot be told from true and false afterwards.
_WORDS = {True: ("on", "yes"), False: ("off", "no")}


def _as_meant(annotation: Any, value: Any) -> Any:
    """Return values with `on`, `off`, `yes` and `no` as words again where a key or a choice of the schema is one.

    YAML 1.1 reads ``on: rank0`` as a key true, and ``progress: off`` as false.
    """
    if isinstance(value, bool):
        choices = _choices(annotation)
        return next((word for word in _WORDS[value] if word in choices), value)
    schema = section_of(annotation)
    if schema is None or not isinstance(value, dict):
        return value
    hints: dict[Any, Any] = typing.get_type_hints(schema)
    named = {_as_word(key, hints) if isinstance(key, bool) else key: item for key, item in value.items()}
    return {key: _as_meant(hints.get(key), item) for key, item in named.items()}


def _as_word(key: bool, names: Mapping[str, Any]) -> object:
    return next((word for word in _WORDS[key] if word in names), key)


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the words that an annotation such as ``Literal["a", "b"] | None`` takes."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(word for part in typing.get_args(annotation) for word in _choices(part))
    return ()


def _config_error(problems: list[str], what: str) -> ConfigError:
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return ConfigError(f"The {what} has {count}:", problems)


_NUMBER_FOR_TEXT = re.compile(r"found (\S+) \((?:int|float|bool)\), but it must be text\.$")


def _problems(schema: Any, items: list[Any]) -> list[str]:
    """Return one line per key: what a union's branches each ask for is joined by "or"."""
    lines: dict[str, str] = {}
    for item in items:
        if item["type"] == "bool_type" and isinstance(item["input"], dict):
            continue  # a section that may also be true or false: what is wrong lies in the section
        if item["type"] == "too_short" and item["input"]:
            continue  # a list whose items are all wrong, each of which is told
        location = [str(part) for part in item["loc"] if not _is_union_branch(part)]
        path = ".".join(location) or "(top level)"
        line = _problem(schema, path, location, item)
        earlier, mark = lines.get(path, ""), ", but it must be "
        allowed = line.partition(mark)[2]
        if mark in earlier and allowed:
            lines[path] = earlier if allowed in earlier else f"{earlier.removesuffix('.')} or {allowed}"
        else:
            lines.setdefault(path, line)
    return [_NUMBER_FOR_TEXT.sub(r"""\g<0> Fix: put it in quotes: "'\1'".""", line) for line in lines.values()]


def _problem(schema: Any, path: str, location: list[str], item: Any) -> str:
    kind, found = item["type"], item.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = sorted(fields_at(schema, location[:-1]))
        hint = did_you_mean(location[-1], allowed)
        return f"{path}: unknown key.{hint} Allowed here: {', '.join(allowed)}."
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: missing; this key is required."
    if kind == "value_error":
        return f"{path}: {item['ctx']['error']}"
    allowed_text = _allowed(item)
    hint = (
        did_you_mean(found, item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        if (kind == "literal_error" and isinstance(found, str))
        else ""
    )
    return f"{path}: found {_shown(found)}, but {allowed_text}{'' if hint else '.'}{hint and '.' + hint}"


def _allowed(item: Any) -> str:
    context = item.get("ctx", {})
    if item["type"] == "literal_error":
        return f"it must be one of {context['expected']}"
    if item["type"].endswith("_type") or item["type"].startswith("dataclass"):
        name = item["type"].replace("_type", "").replace("dataclass", "mapping of keys").replace("dict", "mapping")
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
        return f"it must be {words.get(name, 'a ' + name.replace('_', ' '))}"
    return item["msg"].replace("Input should", "it must")


def _is_union_branch(part: Any) -> bool:
    # pydantic puts the tried branch of a union into the path; its names contain characters no key has.
    return isinstance(part, str) and (
        any(mark in part for mark in "[](),'-") or part in _BRANCHES or part.endswith("Config")
    )


_BRANCHES = frozenset({"str", "int", "float", "bool", "none", "dict", "list"})


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def fields_at(schema: Any, path: list[str]) -> list[str]:
    """Return the names of the keys a schema has under ``path``."""
    is_key = False
    for part in path:
        if part.isdigit() or is_key:  # an item of a list, or of a mapping, of sections
            is_key = False
            continue
        annotation = typing.get_type_hints(schema).get(part)
        is_key = typing.get_origin(annotation) is dict
        nested = section_of(typing.get_args(annotation)[1] if is_key else annotation)
        if nested is None:
            return []
        schema = nested
    return [f.name for f in dataclasses.fields(schema)]


def section_at(schema: Any, name: str) -> Any:
    """Return the section class of a schema's key, or None if it has none."""
    return section_of(typing.get_type_hints(schema).get(name))


def section_of(annotation: Any) -> Any:
    """Return the section class within an annotation such as ``Section | None``, or None."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple):
        return next((found for arg in typing.get_args(annotation) if (found := section_of(arg)) is not None), None)
    return None
