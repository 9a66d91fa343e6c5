"""What the drivers of clusters share: the programs they need, and how a run that is elsewhere ended."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from everyrank.config.secrets import Secret
from everyrank.diagnosis.outcome import RankFailure
from everyrank.diagnosis.rank_files import existing, log_file, read_error
from everyrank.drivers.driver import LaunchRequest
from everyrank.errors import EXIT_OK, DriverError

_KEPT_BYTES = 1 << 16
_PIPE_S = 2.0


@dataclass(frozen=True)
class Launcher:
    """A launcher outside of everyrank.

    Attributes:
        name: The driver that uses it.
        program: Its program, or its Python package.
        is_package: It is a Python package.
        install: What a person installs to have it.
    """

    name: str
    program: str
    is_package: bool
    install: str

    @property
    def found(self) -> bool:
        """Whether this machine has it."""
        if self.is_package:
            return importlib.util.find_spec(self.program) is not None
        return shutil.which(self.program) is not None

    def require(self) -> None:
        """Raise DriverError if this machine does not have it."""
        if not self.found:
            what = "the Python package" if self.is_package else "the program"
            raise DriverError(
                f"driver={self.name} was set, but {what} {self.program} is not installed here. Install {self.install}."
            )


SLURM = Launcher(
    "slurm", "sbatch", False, "Slurm's client (Debian: slurm-client), or start from a login node that has it"
)
MPI = Launcher("mpi", "mpirun", False, "Open MPI (Debian: openmpi-bin), or load its module")
RAY = Launcher("ray", "ray", True, "it with: pip install 'everyrank[ray]'")
SSH = Launcher("torchrun", "ssh", False, "an SSH client (Debian: openssh-client)")


_HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%@\[\]-]*")


def check_hosts(hosts: Iterable[str]) -> None:
    """Raise DriverError for what is no host: the programs that take it would read it as an option, or as several."""
    for host in hosts:
        if not _HOST.fullmatch(str(host)):
            raise DriverError(
                f"driver.hosts has {host!r}, which is no host. Fix: write NAME, USER@NAME or an address, one for each "
                "entry; options have keys of their own (driver.ssh_args, driver.mpi_args)."
            )


class LastWords:
    """Passes a launcher's standard error on as it comes, and keeps the end of it.

    Args:
        process: The launcher, started with ``stderr=subprocess.PIPE``.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._pipe = process.stderr
        self._kept = b""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._kept = (self._kept + chunk)[-_KEPT_BYTES:]
                os.write(2, chunk)

    def text(self) -> str:
        """The last words of a launcher that has ended."""
        self._thread.join(timeout=_PIPE_S)  # a child that outlives it may hold the pipe
        return self._kept.decode(errors="replace")


def recorded_failures(log_dir: str, codes: Mapping[int, int] | None = None) -> tuple[RankFailure, ...]:
    """The ranks that left a record of an exception in the run's logs, and those whose end their launcher tells.

    Args:
        log_dir: Folder of the logs.
        codes: Exit codes by rank, where the launcher tells them.
    """
    failures = {failure.rank: failure for failure in _failures(log_dir)}
    for rank, code in (codes or {}).items():
        if rank not in failures and code != EXIT_OK:
            log = existing(log_file(log_dir, rank))
            failures[rank] = RankFailure(rank=rank, exit_code=code, log_file=log)
    return tuple(failure for _, failure in sorted(failures.items()))


def _failures(log_dir: str) -> Iterator[RankFailure]:
    for name in sorted(os.listdir(log_dir)) if os.path.isdir(log_dir) else ():
        error = read_error(os.path.join(log_dir, name)) if name.endswith(".error.json") else None
        if error is not None:
            log = existing(os.path.join(log_dir, name.replace(".error.json", ".log")))
            yield RankFailure(rank=int(error["rank"]), exit_code=int(error["exit_code"]), error=error, log_file=log)


def secrets_of(env: Mapping[str, str]) -> dict[str, str]:
    """The secrets among variables: they travel by environment or a pipe, never on a command line or in a file."""
    return {name: str(value) for name, value in env.items() if isinstance(value, Secret)}


def exports(env: dict[str, str], request: LaunchRequest) -> list[str]:
    """Lines of a shell script that set variables but secrets, and let Python find an app in the working directory."""
    public = {name: value for name, value in env.items() if not isinstance(value, Secret)}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(public.items())]
    if request.program is None:
        lines.append(f'export PYTHONPATH={shlex.quote(request.cwd)}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return lines


def node_command(python: str, request: LaunchRequest, *flags: str) -> tuple[str, ...]:
    """What one node runs to start its ranks with torch's engine; see ``node.py``."""
    return (python, "-m", "everyrank.drivers.node", f"--config={request.config_file}", *flags)
