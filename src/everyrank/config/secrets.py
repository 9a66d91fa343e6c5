"""Values that are nobody's business: kept out of files, consoles and command lines, handed over by environment only."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
_SECRET_WORDS = frozenset(
    {"KEY", "KEYS", "APIKEY", "TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PAT"}
    | {"CREDENTIAL", "CREDENTIALS", "AUTH", "DSN"}
)
# Of a key of a configuration more is asked: `target_key` and `pad_token` are no secrets.
_SECRET_KEYS = frozenset(
    {"PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "SECRETS", "CREDENTIAL", "CREDENTIALS", "APIKEY"}
)
_KEY_OR_TOKEN = frozenset({"KEY", "KEYS", "TOKEN", "TOKENS"})
_OF_AN_ACCOUNT = frozenset(
    {"API", "ACCESS", "PRIVATE", "AUTH", "BEARER", "HF", "HUB", "WANDB", "AWS", "AZURE", "GITHUB"}
)
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")


_OF_THE_PLAN = (("run",), ("env",), ("driver",), ("distributed",))


class Secret(str):
    """A text that is shown as ``***``."""

    def __repr__(self) -> str:
        return repr(MASK)


def shown(value: str) -> str:
    """What a person may see of a variable's value, quoted for a shell."""
    return MASK if isinstance(value, Secret) else shlex.quote(value)


def looks_secret(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: ``WANDB_API_KEY`` does, ``MONKEY`` does not."""
    return any(word in _SECRET_WORDS for word in re.split(r"[^A-Za-z0-9]+", name.upper()))


def is_secret_key(name: str) -> bool:
    """Whether a key of a configuration holds a secret by its name: ``api_key`` does, ``target_key`` does not."""
    words = set(re.split(r"[^A-Za-z0-9]+", name.upper()))
    return bool(words & _SECRET_KEYS) or bool(words & _KEY_OR_TOKEN and words & _OF_AN_ACCOUNT)


def masked(value: Any, name: str = "") -> Any:
    """A copy of plain values in which a text under a key that holds a secret is ``***``."""
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item, name) for item in value]
    return MASK if isinstance(value, str) and value and is_secret_key(name) else value


def hide(resolved: Any, raw: Any, path: tuple[str, ...] = ()) -> Any:
    """A copy of a resolved configuration that is fit to be written down.

    What an interpolation read from the environment stays an interpolation. A variable that looks secret, and a text
    that stands in the app under a key that does, become one: a rank reads it from its own environment, where the
    launching process puts it.

    Args:
        resolved: The configuration with all values.
        raw: The same one before interpolations were resolved.
        path: Keys that lead to this part.
    """
    if isinstance(resolved, Mapping):
        parts = raw if isinstance(raw, Mapping) else {}
        return {key: hide(value, parts.get(key), (*path, str(key))) for key, value in resolved.items()}
    if isinstance(resolved, list):
        items = raw if isinstance(raw, list) and len(raw) == len(resolved) else [None] * len(resolved)
        return [hide(value, item, (*path, str(n))) for n, (value, item) in enumerate(zip(resolved, items, strict=True))]
    if isinstance(raw, str) and _reads_environment(raw, path):
        return raw
    if path[:2] == ("env", "variables") and looks_secret(path[-1]):
        return f"${{oc.env:{path[-1]}}}"
    if _is_literal(resolved, path):
        return f"${{oc.env:{_variable_of(path)}}}"
    return resolved


def handed_over(resolved: Mapping[str, Any], raw: Any) -> dict[str, str]:
    """Variables for the ranks, by name: those of ``env.variables``, and those that a hidden interpolation reads."""
    named = resolved["env"].get("variables") or {}
    templates = raw["env"].get("variables") or {}
    texts = {path: text for path, text in _leaves(raw) if isinstance(text, str) and _reads_environment(text, path)}
    read = (name for text in texts.values() for name in _FROM_ENVIRONMENT.findall(text))
    found: dict[str, str] = {name: Secret(os.environ[name]) for name in read if name in os.environ}
    for path, value in _leaves(resolved):
        if _is_literal(value, path) and path not in texts:
            found[_variable_of(path)] = Secret(value)
    for name, value in named.items():
        secret = looks_secret(name) or _FROM_ENVIRONMENT.search(str(templates.get(name)))
        found[name] = Secret(value) if secret else value
    return found


def _is_literal(value: Any, path: tuple[str, ...]) -> bool:
    return isinstance(value, str) and bool(value) and path[0] == "app" and is_secret_key(_name_of(path))


def _name_of(path: tuple[str, ...]) -> str:
    """The key that leads to a value, also where that stands in a list."""
    return next((part for part in reversed(path) if not part.isdigit()), "")


def _variable_of(path: tuple[str, ...]) -> str:
    return "EVERYRANK_SECRET_" + "_".join(re.sub(r"[^A-Za-z0-9]", "_", part).upper() for part in path)


def _leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value that is no mapping and no list, with the keys that lead to it."""
    if isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, values


def _reads_environment(raw: str, path: tuple[str, ...]) -> bool:
    names = _FROM_ENVIRONMENT.findall(raw)
    # Folders and addresses of a machine belong to the plan, which people read; a password does not.
    plain = path[:1] in _OF_THE_PLAN and path[:2] != ("env", "variables")
    return bool(names) and (not plain or any(map(looks_secret, (*names, _name_of(path)))))
