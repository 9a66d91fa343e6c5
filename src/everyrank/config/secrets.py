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


def hide(resolved: Any, raw: Any, path: tuple[str, ...] = ()) -> Any:
    """A copy of a resolved configuration that is fit to be written down.

    What an interpolation read from the environment stays an interpolation, as does a variable that looks secret: a rank
    reads it from its own environment, where the launching process puts it.

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
        return [hide(value, item, path) for value, item in zip(resolved, items, strict=True)]
    if isinstance(raw, str) and _reads_environment(raw, path):
        return raw
    if path[:2] == ("env", "variables") and looks_secret(path[-1]):
        return f"${{oc.env:{path[-1]}}}"
    return resolved


def handed_over(resolved: Mapping[str, Any], raw: Any) -> dict[str, str]:
    """Variables for the ranks, by name: those of ``env.variables``, and those that a hidden interpolation reads."""
    named = resolved["env"].get("variables") or {}
    templates = raw["env"].get("variables") or {}
    found: dict[str, str] = {name: Secret(os.environ[name]) for name in _variables_in(raw, ()) if name in os.environ}
    for name, value in named.items():
        secret = looks_secret(name) or _FROM_ENVIRONMENT.search(str(templates.get(name)))
        found[name] = Secret(value) if secret else value
    return found


def _reads_environment(raw: str, path: tuple[str, ...]) -> bool:
    names = _FROM_ENVIRONMENT.findall(raw)
    # Folders and addresses of a machine belong to the plan, which people read; a password does not.
    plain = path[:1] in _OF_THE_PLAN and path[:2] != ("env", "variables")
    return bool(names) and (not plain or any(map(looks_secret, (*names, path[-1]))))


def _variables_in(raw: Any, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _variables_in(value, (*path, str(key)))
    elif isinstance(raw, list):
        for value in raw:
            yield from _variables_in(value, path)
    elif isinstance(raw, str) and _reads_environment(raw, path):
        yield from _FROM_ENVIRONMENT.findall(raw)
