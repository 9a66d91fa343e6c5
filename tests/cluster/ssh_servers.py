"""sshd on the hosts of ``hosts.py``, with keys of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.hosts import Host, find_tool

SERVER = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
AcceptEnv PYTHONPATH EVERYRANK_TEST_SESSION OMP_NUM_THREADS TMPDIR TORCHINDUCTOR_CACHE_DIR
"""
CLIENT = """\
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile {folder}/known_hosts
LogLevel ERROR
SendEnv PYTHONPATH EVERYRANK_TEST_SESSION OMP_NUM_THREADS TMPDIR TORCHINDUCTOR_CACHE_DIR
"""


def missing() -> str:
    """Why there can be no sshd here, or an empty string."""
    absent = [tool for tool in ("sshd", "ssh", "ssh-keygen") if find_tool(tool) is None]
    return f"{', '.join(absent)} not installed (scripts/install_cluster_tools.sh installs them)" if absent else ""


@contextlib.contextmanager
def servers(hosts: Sequence[Host], folder: Path) -> Iterator[Path]:
    """Start sshd on each host; yields a configuration for ssh that may log in to all of them."""
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    os.makedirs("/run/sshd", exist_ok=True)  # sshd of Debian insists on it
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EVERYRANK_")}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for host in hosts:
            sshd = str(find_tool("sshd"))
            command = host.command([sshd, "-D", "-e", "-f", str(folder / "sshd_config")])
            started.append(subprocess.Popen(command, env=clean, stderr=subprocess.DEVNULL))
        login = ["ssh", "-F", str(folder / "ssh_config"), "-o", "ConnectTimeout=2"]
        deadline = time.monotonic() + 20
        for host in hosts:
            while hosts[0].run(*login, host.name, "true").returncode:
                if time.monotonic() > deadline:
                    pytest.fail(f"no login to {host.name}: {hosts[0].run(*login, host.name, 'true').stderr}")
                time.sleep(0.1)
        yield folder / "ssh_config"
    finally:
        for server in started:
            server.kill()
            server.wait()
