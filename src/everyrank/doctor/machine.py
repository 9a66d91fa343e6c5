"""Cores, memory, limits, and the disk of the run's folder."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from everyrank.doctor.check import Check, may_bite
from everyrank.elastic.machine import num_cpus

_GIB = 2**30
_LEAST_SHM, _LEAST_DISK, _LEAST_FILES = 1 * _GIB, 5 * _GIB, 4096
_NETWORK_DISKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "ceph", "fuse.sshfs")


def check_machine(environ: Mapping[str, str]) -> Iterator[Check]:
    """Cores and threads, memory, shared memory and limits."""
    cores, usable = os.cpu_count() or 1, num_cpus()
    yield may_bite(
        "CPU",
        f"{usable} of {cores} cores; OMP_NUM_THREADS={environ.get('OMP_NUM_THREADS', 'not set')}",
        usable == 1 and cores > 1,
        "the launcher binds each rank to one core: mpirun --bind-to none, srun --cpus-per-task",
    )
    yield _memory()
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        fix = "loader workers pass batches through it: docker run --shm-size=8g, or num_workers: 0"
        yield may_bite("/dev/shm", f"{free / _GIB:.1f} GiB free", free < _LEAST_SHM, fix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {_LEAST_FILES} before the start"
    yield may_bite("open files", f"{soft} (hard limit {hard})", 0 <= soft < _LEAST_FILES, fix)


def check_disk(folder: Path) -> Iterator[Check]:
    """The disk of the runs: space, kind, and whether locks and renames work there.

    Args:
        folder: Where runs live; it, or the nearest folder above it that exists.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    kind, free = _file_system(place), shutil.disk_usage(place).free
    fix = "checkpoints need room: set env.output_dir to another disk"
    yield may_bite("disk of the runs", f"{place} on {kind}, {free / _GIB:.0f} GiB free", free < _LEAST_DISK, fix)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".everyrank-doctor-") as scratch:
            _try_locks_and_renames(Path(scratch))
    except OSError as error:
        shared = " It is a network disk: mount it with locks (nfs: not nolock)." if kind in _NETWORK_DISKS else ""
        yield Check(
            "locks and renames",
            "wrong",
            f"{type(error).__name__}: {error.strerror} in {place}",
            f"set env.output_dir to a folder that can be written to and locked.{shared}",
        )
    else:
        yield Check("locks and renames", "ok", f"work in {place}")


def _try_locks_and_renames(scratch: Path) -> None:
    with open(scratch / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(lock, fcntl.LOCK_UN)
    (scratch / "new").write_text("new")
    (scratch / "old").write_text("old")
    os.replace(scratch / "new", scratch / "old")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = next((found for path in _LIMIT_FILES if (found := _number(path)) is not None), None)
    text = f"{total / _GIB:.0f} GiB" + (f", limited to {limit / _GIB:.1f} GiB" if limit and limit < total else "")
    return Check("memory", "ok", text)


_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _file_system(place: Path) -> str:
    """Return the kind of the file system that ``place`` is on, as the kernel's table of mounts has it."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, found, *_ = line.split()
        if (place == Path(point) or Path(point) in place.parents) and len(point) >= len(best):
            best, kind = point, found
    return kind
