"""Slurm's host lists, against an independent way to write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everyrank.errors import LaunchEnvironmentError
from everyrank.launch_env.hostlist import expand_hostlist, first_host

KNOWN = {
    "login1": ["login1"],
    "node[1-3]": ["node1", "node2", "node3"],
    "node[01-03,07],gpu-a[1-2]b,login1": ["node01", "node02", "node03", "node07", "gpu-a1b", "gpu-a2b", "login1"],
    "r[1-2]n[08-09]": ["r1n08", "r1n09", "r2n08", "r2n09"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "a.b-c[5].d,e": ["a.b-c5.d", "e"],
    "": [],
}


@pytest.mark.parametrize("hostlist", KNOWN)
def test_expands(hostlist: str) -> None:
    assert expand_hostlist(hostlist) == KNOWN[hostlist]
    assert first_host(hostlist) == (KNOWN[hostlist] or [None])[0]


@pytest.mark.parametrize("hostlist", ["n[1-3", "n1-3]", "n[3-1]", "n[a-b]", "n[]", "n[1[2]]", "n[1-2-3]"])
def test_refuses(hostlist: str) -> None:
    with pytest.raises(LaunchEnvironmentError, match="MASTER_ADDR"):
        expand_hostlist(hostlist)


text = st.text("abcxyz-.", max_size=4)


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One part of a host list and the hosts it stands for."""
    written, hosts = "h" + draw(text), [""]
    hosts = [written]
    for _ in range(draw(st.integers(0, 2))):
        items, numbers = [], []
        for _ in range(draw(st.integers(1, 3))):
            width, low, count = draw(st.integers(1, 4)), draw(st.integers(0, 120)), draw(st.integers(1, 4))
            run = [f"{n:0{width}d}" for n in range(low, low + count)]
            items.append(run[0] if count == 1 else f"{run[0]}-{run[-1]}")
            numbers += run
        tail = draw(text)
        written += f"[{','.join(items)}]{tail}"
        hosts = [host + number + tail for host in hosts for number in numbers]
    return written, hosts


@given(st.lists(parts(), max_size=4))
def test_expands_whatever_can_be_written(drawn: list[tuple[str, list[str]]]) -> None:
    hostlist = ",".join(written for written, _ in drawn)
    hosts = [host for _, part in drawn for host in part]
    assert expand_hostlist(hostlist) == hosts
    assert first_host(hostlist) == (hosts[0] if hosts else None)
