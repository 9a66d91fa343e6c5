"""``everyrank run [-n N] [key=value ...] -- PROGRAM ...``: where the configuration ends and a user's program begins."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from everyrank.errors import ConfigError

SCRIPT_APP = "everyrank.apps.script.Script"


def split_program(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Take apart what is ours and what is the program's.

    Returns:
        The settings, in Hydra's grammar, and the program's words, which nobody reads; None without ``--``.

    Raises:
        ConfigError: The program is missing, or set twice, or stands in front of the ``--``.
    """
    settings, words = list(argv), None
    if "--" in settings:
        at = settings.index("--")
        settings, words = settings[:at], settings[at + 1 :]
        if not words:
            raise ConfigError("-- was given without a program. Fix: everyrank run -- train.py ARGUMENTS.")
    stray = next((word for word in settings if _looks_like_a_script(word)), None)
    if stray is not None:
        raise ConfigError(f"{stray} stands among the settings. Fix: put -- before a program: everyrank run -- {stray}")
    settings = _num_ranks(settings)
    if words is not None:
        app = next((word for word in settings if word.startswith("app=")), "app=script")
        if app != "app=script":
            raise ConfigError(f"{app} was set together with a program behind --. Fix: leave one of the two out.")
        if any(word.lstrip("+").startswith("app.command=") for word in settings):
            raise ConfigError("app.command was set together with a program behind --. Fix: leave one of the two out.")
        settings = [*(word for word in settings if word != app), "app=script", "app.command=set"]
    return settings, words


def _looks_like_a_script(word: str) -> bool:
    return "=" not in word and not word.startswith("-") and (word.endswith(".py") or os.path.isfile(word))


def _num_ranks(settings: list[str]) -> list[str]:
    """``-n N`` is N ranks on a node, by torchrun unless another driver is set."""
    rest, number = [], None
    words = iter(settings)
    for word in words:
        if word == "-n":
            number = next(words, "")
        elif word.startswith("-n") and word[2:].isdigit():
            number = word[2:]
        else:
            rest.append(word)
    if number is None:
        return rest
    if number not in ("auto", "gpu", "cpu") and not (number.isdigit() and int(number) > 0):
        raise ConfigError(f"-n {number} was given; it is the number of ranks on a node, or auto, gpu, cpu.")
    driver = next((word.partition("=")[2] for word in rest if word.startswith("driver=")), None)
    key = "driver.num_workers" if driver == "ray" else "driver.nproc_per_node"
    other = next((word for word in rest if word.lstrip("+").startswith(f"{key}=")), None)
    if driver == "local" or other is not None:
        raise ConfigError(f"-n {number} was given together with {other or 'driver=local'}. Fix: leave one of them out.")
    return [*([] if driver else ["driver=torchrun"]), *rest, f"{key}={number}"]


def script_words(app: Mapping[str, Any]) -> list[str]:
    """The words of ``app.command``; a single text is split as a shell would.

    Raises:
        ConfigError: It is neither a text nor a list of words.
    """
    words = app["command"]
    try:
        words = shlex.split(words) if isinstance(words, str) else words
    except ValueError as error:
        raise ConfigError(f"app.command={words} was set, which no shell can split: {error}.") from error
    if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words):
        raise ConfigError(
            f"app.command={words} was set; it is a program and its arguments, as a text or a list. "
            "Fix: app.command='train.py --epochs 3', or app.command=[train.py,--epochs,3]."
        )
    return [str(word) for word in words]


def name_script(app: dict[str, Any]) -> None:
    """Name a run of ``app=script`` after its program: ``train`` for ``train.py`` and for ``-m package.train``.

    Raises:
        ConfigError: There is no program in its command.
    """
    if app.get("_target_") != SCRIPT_APP:
        return
    words = script_words(app)
    named = next((w for w in words if not w.startswith("-") and not os.path.basename(w).startswith("python")), "")
    stem = named.rpartition(".")[2] if "-m" in words[:3] else os.path.splitext(os.path.basename(named.rstrip("/")))[0]
    if not app.get("name") and stem:
        app["name"] = stem
