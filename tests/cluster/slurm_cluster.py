"""A real Slurm on the hosts of ``hosts.py``: the controller on node0, a daemon on node1 and one on node2.

It has its own munge, its own configuration and its own folder, and knows nothing of a Slurm of the machine's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.hosts import Host, find_tool

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

# cred_expire: how long a requeued job waits before it starts again (Slurm's default: two minutes).
CONFIGURATION = """\
ClusterName=everyrank
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=10
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
NodeName=node[1-2] CPUs=4 State=UNKNOWN
PartitionName=work Nodes=node[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=node[1-2] MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here, or an empty string."""
    absent = [tool for tool in NEEDED if find_tool(tool) is None]
    return f"{', '.join(absent)} not installed (scripts/install_cluster_tools.sh installs them)" if absent else ""


@contextlib.contextmanager
def slurm(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """Start it; yields the variables under which its commands find it."""
    daemons: list[subprocess.Popen[str]] = []
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    folder.chmod(0o755)  # munge refuses a socket in a folder that others can write to
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munge += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--foreground", "--force"]

    def start(host: Host, *argv: str) -> None:
        tool = find_tool(argv[0])
        assert tool is not None
        log = open(folder / f"{argv[0]}.{host.name}.out", "w")  # noqa: SIM115 - the daemon keeps it
        command = host.command([tool, *argv[1:]], folder)
        clean = {k: v for k, v in os.environ.items() if k != "EVERYRANK_TEST_SESSION"}
        daemons.append(subprocess.Popen(command, env={**clean, **env}, stdout=log, stderr=log, text=True))
        log.close()

    try:
        start(hosts[0], "munged", *munge)
        _wait_for(folder, "the socket of munge", lambda: (folder / "munge.socket").exists())
        start(hosts[0], "slurmctld", "-D", "-i")
        for host in hosts[1:3]:
            start(host, "slurmd", "-D", "-N", host.name)
        idle = ["env", f"SLURM_CONF={env['SLURM_CONF']}", "sinfo", "-h", "-p", "work", "-t", "idle", "-o", "%D"]
        _wait_for(folder, "two idle nodes", lambda: hosts[0].run(*idle).stdout.strip() == "2")
        yield env
    finally:
        _cancel_jobs(hosts[0], env)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def _cancel_jobs(host: Host, env: dict[str, str]) -> None:
    """End what a failed test has left running: without its daemons nobody would end it."""
    configured = ["env", f"SLURM_CONF={env['SLURM_CONF']}", "timeout", "5"]
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not host.run(*configured, "squeue", "--noheader").stdout.strip():
            return
        host.run(*configured, "scancel", "--signal=KILL", "--full", "--user=root")
        host.run(*configured, "scancel", "--user=root")


def _wait_for(folder: Path, what: str, condition: object) -> None:
    deadline = time.monotonic() + 30
    assert callable(condition)
    while not condition():
        if time.monotonic() > deadline:
            files = [path for path in folder.iterdir() if path.suffix in (".log", ".out")]
            logs = "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in files)
            pytest.fail(f"Slurm did not start: no {what}\n{logs}")
        time.sleep(0.1)
