"""What a user wants to be run: a Python script, a module, or any other program; looked at before anything starts."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everyrank.errors import ConfigError, did_you_mean

SCRIPT, MODULE, EXECUTABLE = "script", "module", "executable"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and its arguments.

    Attributes:
        kind: ``script`` (a file of Python, or a folder or archive with a ``__main__``), ``module`` (``python -m``) or
            ``executable`` (anything else, run as it is).
        argv: The file, module or executable, and its arguments.
        local_rank_option: How a script that mentions it spells ``--local-rank``; None for all others.
    """

    kind: str
    argv: tuple[str, ...]
    local_rank_option: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The program as it was typed: ``-m module arguments``, or ``file arguments``."""
        return ("-m", *self.argv) if self.kind == MODULE else self.argv

    def as_mapping(self) -> dict[str, Any]:
        """The program as plain values, for the configuration file of the run."""
        return {"kind": self.kind, "argv": list(self.argv), "local_rank_option": self.local_rank_option}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Program:
        """The program of a run's configuration file."""
        argv = tuple(str(word) for word in values["argv"])
        return cls(kind=str(values["kind"]), argv=argv, local_rank_option=values["local_rank_option"])


def read_program(words: Sequence[str], *, no_python: bool = False) -> Program:
    """Tell what kind of program a command is.

    ``python train.py`` with this very Python is the script: it then starts from the one import of torch.

    Args:
        words: What stands behind ``--``.
        no_python: The first word is an executable, also where it ends in ``.py``.

    Raises:
        ConfigError: There is no program in it.
    """
    words = list(words)
    if not no_python and len(words) > 1 and _is_this_python(words[0]):
        rest = words[2:] if words[1] == "-u" else words[1:]
        if rest and (rest[0] == "-m" or not rest[0].startswith("-")):
            words = rest
    if words and words[0] == "-m" and not no_python:
        if len(words) == 1:
            raise ConfigError("-m was given without a module. Fix: everyrank run -- -m package.module ARGUMENTS.")
        return Program(kind=MODULE, argv=tuple(words[1:]), local_rank_option=_local_rank_option(_module_file(words[1])))
    if not words or not words[0]:
        raise ConfigError("-- was given without a program. Fix: everyrank run -- train.py ARGUMENTS.")
    if not no_python and _is_python(words[0]):
        return Program(kind=SCRIPT, argv=tuple(words), local_rank_option=_local_rank_option(words[0]))
    return Program(kind=EXECUTABLE, argv=tuple(words))


def check_program(program: Program) -> None:
    """Find out, without running any of it, that a program can start.

    Raises:
        ConfigError: There is no such file or module, it is not executable, or it does not parse.
    """
    name = program.argv[0]
    if program.kind == EXECUTABLE:
        _check_executable(name)
    elif program.kind == MODULE:
        file = _module_file(name)
        if file is None:
            raise ConfigError(
                f"-m {name} was given, but this Python finds no module {name} that can be run (looked in {os.getcwd()} "
                "first). Fix: run from the folder that holds it, or install it; a package needs a __main__.py."
            )
        _check_syntax(file)
    elif not os.path.exists(name):
        raise ConfigError(_missing(name))
    elif os.path.isfile(name) and not zipfile.is_zipfile(name):
        _check_syntax(name)


def _is_python(name: str) -> bool:
    if name.endswith((".py", ".pyc", ".pyz")):
        return True
    return os.path.isdir(name) and os.path.exists(os.path.join(name, "__main__.py"))


def _is_this_python(word: str) -> bool:
    if not re.fullmatch(r"python[\d.]*", os.path.basename(word)):
        return False
    found = shutil.which(word)
    # Not by what the links point to: each virtual environment has a link to the same interpreter.
    return found is not None and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)


def _check_executable(name: str) -> None:
    if os.sep not in name:
        if shutil.which(name) is None:
            beside = f" There is a file {name} here: ./{name} names it." if os.path.exists(name) else ""
            raise ConfigError(f"{name} was to be run, but there is no such program on the PATH.{beside}")
    elif not os.path.exists(name):
        raise ConfigError(_missing(name))
    elif os.path.isdir(name):
        raise ConfigError(f"{name} was to be run, but it is a folder without a __main__.py.")
    elif not os.access(name, os.X_OK):
        raise ConfigError(f"{name} was to be run, but it is not executable. Fix: chmod +x {name}")


def _missing(name: str) -> str:
    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder):
        return f"{name} was to be run, but there is no folder {folder}."
    hint = did_you_mean(os.path.basename(name), sorted(os.listdir(folder)))
    return f"{name} was to be run, but there is no such file in {os.path.abspath(folder)}.{hint}"


def _check_syntax(file: str) -> None:
    if not file.endswith(".py"):
        return
    try:
        with open(file, "rb") as source:
            compile(source.read(), file, "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{file} was to be run, but it cannot be read: {error.strerror}.") from error
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        line = f"\n  {error.text.rstrip()}" if isinstance(error, SyntaxError) and error.text else ""
        raise ConfigError(f"{file} was to be run, but it does not parse: {where}{what}.{line}") from error


def _module_file(name: str) -> str | None:
    """The file that ``python -m name`` would run, found without importing a parent package; None if there is none."""
    path: Sequence[str] | None = [os.getcwd(), *sys.path]
    parts = name.split(".")
    for at in range(len(parts) + 1):
        part = ".".join(parts[: at + 1]) if at < len(parts) else f"{name}.__main__"
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return None
        if at >= len(parts) - 1 and spec.submodule_search_locations is None:
            return spec.origin
        path = spec.submodule_search_locations
    return None


def _local_rank_option(file: str | None) -> str | None:
    if file is None or not file.endswith(".py") or not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8", errors="replace") as source:
        found = re.search(r"""['"](--local[-_]rank)['"]""", source.read())
    return found[1] if found else None
