"""Several hosts on one machine: network namespaces, each with its own address, host name and hosts file.

Nothing outside the namespaces is touched: the switch has a namespace of its own, and everything is gone when the
processes that hold the namespaces end, which they do with the test process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import warm_start

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ("ip", "nft", "nsenter", "unshare")


def missing(*further: str) -> str:
    """Why there can be no hosts here, or an empty string.

    Args:
        further: Programs that are needed besides, such as ``tc``.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in (*NEEDED, *further) if find_tool(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (scripts/install_cluster_tools.sh installs them)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this machine does not allow network namespaces"


def find_tool(name: str) -> str | None:
    """Path of a program, also where a plain user's PATH does not lead."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: Its host name.
        address: Its IPv4 address, on ``eth0``.
        holder: The process that keeps its namespaces.
    """

    name: str
    address: str
    holder: subprocess.Popen[bytes]

    def command(self, argv: Sequence[str], cwd: str | Path = "/") -> list[str]:
        """``argv`` as it is started on this host; the process keeps its pid through all of it."""
        return warm_start.on_host(self.holder.pid, argv, cwd)

    def run(self, *argv: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        command = self.command(argv)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)

    def must(self, *argv: str) -> str:
        """Run a command that must succeed and return its output."""
        done = self.run(*argv)
        assert done.returncode == 0, f"{argv} on {self.name}: {done.stderr}"
        return done.stdout

    def start(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> warm_start.Started:
        """Start a command on this host, its two outputs in one."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support"), **(env or {})}
        return warm_start.start(argv, cwd=cwd, env=environment, host=self.holder.pid)

    def limit(self, rate_mbit: int) -> None:
        """Let this host send no more than so many Mbit/s."""
        tc = find_tool("tc")
        assert tc is not None
        self.must(tc, *f"qdisc replace dev eth0 root tbf rate {rate_mbit}mbit burst 64kb latency 100ms".split())

    def cut(self) -> None:
        """Lose every packet to and from this host, silently, as a pulled cable does."""
        self._filter(
            "chain in { type filter hook input priority 0; iif lo accept; drop; }",
            "chain out { type filter hook output priority 0; oif lo accept; drop; }",
        )

    def drop(self, port: int) -> None:
        """Drop what comes in for one TCP port, as a firewall does."""
        self._filter(f"chain in {{ type filter hook input priority 0; tcp dport {port} drop; }}")

    def _filter(self, *chains: str) -> None:
        rules = "table inet cut { " + " ".join(chains) + " }"
        self.must("nft", rules.replace("{ ", "{\n").replace("; ", ";\n").replace("}", "\n}\n"))

    def mend(self) -> None:
        """Undo ``cut``, ``drop`` and ``limit``."""
        self.run("nft", "delete table inet cut")
        self.run(find_tool("tc") or "tc", "qdisc", "del", "dev", "eth0", "root")


@contextlib.contextmanager
def network(num_hosts: int, folder: Path) -> Iterator[list[Host]]:
    """Hosts ``node0``, ``node1`` ... at 10.77.0.1, 10.77.0.2 ..., joined by one switch.

    Args:
        num_hosts: How many.
        folder: Where the hosts file is written.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        switch = _hold(holders, "--net")
        _ip(switch, "link add br0 type bridge", "link set br0 up")
        names = [f"node{i}" for i in range(num_hosts)]
        addresses = [f"10.77.0.{i + 1}" for i in range(num_hosts)]
        table = folder / "hosts"
        lines = [f"{address} {name}" for address, name in zip(addresses, names, strict=True)]
        table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        hosts = []
        for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
            holder = _hold(holders, "--net", "--uts", "--mount")
            host = Host(name, address, holder)
            host.must("hostname", name)
            host.must("mount", "--bind", str(table), "/etc/hosts")
            _ip(holder, "link set lo up", f"link add eth0 type veth peer name port{i} netns {switch.pid}")
            _ip(switch, f"link set port{i} master br0", f"link set port{i} up")
            _ip(holder, f"addr add {address}/24 dev eth0", "link set eth0 up")
            hosts.append(host)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _hold(holders: list[subprocess.Popen[bytes]], *namespaces: str) -> subprocess.Popen[bytes]:
    """Start a process that keeps new namespaces until it is killed, or this process ends."""
    die = "import ctypes, signal, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); print(flush=True); signal.pause()"
    command = (
        ["unshare", *namespaces, "--propagation", "private"] if "--mount" in namespaces else ["unshare", *namespaces]
    )
    holder = subprocess.Popen([*command, sys.executable, "-I", "-S", "-c", die], stdout=subprocess.PIPE, env={})
    holders.append(holder)
    assert holder.stdout is not None
    assert holder.stdout.readline(), "the namespaces could not be made"
    holder.stdout.close()
    return holder


def _ip(holder: subprocess.Popen[bytes], *commands: str) -> None:
    ip = find_tool("ip")
    assert ip is not None
    for command in commands:
        subprocess.run(["nsenter", f"--target={holder.pid}", "--net", ip, *command.split()], check=True)
