"""Slurm's compressed host lists, expanded without calling ``scontrol``."""

from __future__ import annotations

from collections.abc import Iterator

from everyrank.errors import LaunchEnvironmentError


def expand_hostlist(hostlist: str) -> list[str]:
    """Expand a Slurm host list to host names, in order.

    Brackets hold comma-separated numbers and ranges, whose leading zeros give the width; a name may hold several
    bracket groups, of which the last runs fastest.

    Args:
        hostlist: For example ``node[01-03,07],gpu-a[1-2]b,login1``.

    Returns:
        For example ``["node01", "node02", "node03", "node07", "gpu-a1b", "gpu-a2b", "login1"]``.

    Raises:
        LaunchEnvironmentError: The brackets do not match or a range is empty.
    """
    return [host for part in _split(hostlist) for host in _expand(part, hostlist)]


def first_host(hostlist: str) -> str | None:
    """Return the first host of a Slurm host list, or None if it is empty; later parts are not expanded."""
    for part in _split(hostlist):
        return next(_expand(part, hostlist))
    return None


def _split(hostlist: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, start = 0, 0
    for i, char in enumerate(hostlist):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise _malformed(hostlist)
        if char == "," and depth == 0:
            if hostlist[start:i].strip():
                yield hostlist[start:i].strip()
            start = i + 1
    if depth != 0:
        raise _malformed(hostlist)
    if hostlist[start:].strip():
        yield hostlist[start:].strip()


def _expand(part: str, hostlist: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, tail = rest.partition("]")
    for number in _numbers(inside, hostlist):
        for end in _expand(tail, hostlist):
            yield f"{head}{number}{end}"


def _numbers(inside: str, hostlist: str) -> Iterator[str]:
    for item in inside.split(","):
        low, dash, high = item.strip().partition("-")
        high = high if dash else low
        if not (low.isascii() and low.isdigit() and high.isascii() and high.isdigit()) or int(low) > int(high):
            raise _malformed(hostlist)
        for number in range(int(low), int(high) + 1):
            yield str(number).zfill(len(low))


def _malformed(hostlist: str) -> LaunchEnvironmentError:
    return LaunchEnvironmentError(
        f"the node list {hostlist!r} is not a Slurm host list such as 'node[01-03,07],login1'. "
        "Fix: set MASTER_ADDR to the first node's name, or unset the SLURM_ variables."
    )
