"""Command-line options that older launchers and scripts put in front of a program's own."""

from __future__ import annotations

from collections.abc import Sequence

_LOCAL_RANK = ("--local-rank", "--local_rank")


def local_rank_argument(argv: Sequence[str]) -> int | None:
    """Return N of ``--local-rank=N``, ``--local_rank=N`` or the same with a space, or None if there is none."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in _LOCAL_RANK:
            value = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
            if value.strip().isdigit():
                return int(value)
    return None


def strip_legacy_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the options that launching once needed and the environment now tells.

    ``--dist``, ``--launcher X`` and ``--local-rank N`` (also ``--local_rank``, also with ``=``) are accepted and
    ignored: the world size alone decides whether a run is distributed.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The other arguments in their order, and one notice for each kind of option that was removed.
    """
    clean: list[str] = []
    notices: dict[str, None] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if name == "--dist":
            if not equals and rest and rest[0].lower() in ("true", "false", "0", "1"):
                rest.pop(0)
            notices["--dist is ignored: a run is distributed exactly if its launcher started more than one process"] = (
                None
            )
        elif name in ("--launcher", *_LOCAL_RANK):
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            if name == "--launcher":
                notices["--launcher is ignored: the launcher is recognised by the variables it sets"] = None
            # --local-rank is put there by torch.distributed.launch, not by a person: nothing to say about it
        else:
            clean.append(argument)
    return clean, list(notices)
