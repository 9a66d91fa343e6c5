"""Hydra's and OmegaConf's complaints in everyrank's form: what was set, what was found, how to mend it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from everyrank.diagnosis.classify import chain
from everyrank.errors import ConfigError, did_you_mean


def explain(error: BaseException) -> ConfigError:
    """Turn an error of composing a configuration into one message with the nearest valid name."""
    links: list[Any] = list(chain(error))
    for link in links:
        if hasattr(link, "missing_cfg_file") and getattr(link, "options", None) is not None:
            return _no_such_option(str(link.missing_cfg_file), list(link.options))
    for link in links:
        parent, key = getattr(link, "parent_node", None), getattr(link, "key", None)
        if key is not None and isinstance(parent, Mapping):
            full_key = getattr(link, "full_key", None) or key
            return _bad_key(link, str(full_key), str(key), [str(k) for k in parent])
    text = str(error)
    if "You must specify" in text:
        group = text.split("'")[1]
        options = [line.strip() for line in text.splitlines()[1:] if line.strip() and ":" not in line]
        return ConfigError(f"no {group} was chosen. Set {group}=NAME, one of: {', '.join(options)}.")
    if bare := re.match(r"Error parsing override '([^'=]+)'\s+missing EQUAL", text):
        return ConfigError(
            f"{bare[1]} was given, but a setting is key=value. "
            "Fix: put a command first (everyrank --help lists them), and a program behind --."
        )
    return ConfigError("the command line was not understood: " + " ".join(text.split()))


def _no_such_option(missing: str, options: list[str]) -> ConfigError:
    group, _, name = missing.rpartition("/")
    shown = [option for option in options if not option.startswith("_")]
    return ConfigError(
        f"{group or 'config'}={name} was set, but there is no such {group or 'config'}. "
        f"There are: {', '.join(shown)}.{did_you_mean(name, shown)}"
    )


def _bad_key(error: BaseException, full_key: str, key: str, choices: list[str]) -> ConfigError:
    text = str(error).split("\n")[0]
    if "not in struct" in text or "not in" in text:
        where = full_key.rpartition(".")[0] or "the configuration"
        return ConfigError(
            f"{full_key} was set, but {where} has no key {key!r}.{did_you_mean(key, choices)} "
            f"Its keys are: {', '.join(sorted(choices))}."
        )
    return ConfigError(f"{full_key}: {text}")
