"""How ranks ended, by the last words of the launchers that know it: torch's, Open MPI's and Slurm's.

A rank that is killed, or that ends by ``os._exit``, leaves no record; only its parent knows how it ended.
"""

from __future__ import annotations

import re
import signal

_TORCH = re.compile(r"^\s*rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+) ", re.MULTILINE)
_MPI_SIGNAL = re.compile(r"process rank (\d+) with PID \d+ on node \S+ exited on\s+signal (\d+)")
_MPI_CODE = re.compile(r"Process name: \[\[\d+,\d+\],(\d+)\]\s+Exit code:\s+(\d+)")
_SLURM = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
_SLURM_CODE = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): int(number) for number in signal.valid_signals() if signal.strsignal(number)}


def exit_codes(text: str) -> dict[int, int]:
    """Exit codes by rank, negative for a signal, as far as a launcher named them.

    Args:
        text: What the launcher printed. Open MPI names only the first rank that failed; under Slurm a task is a rank.
    """
    codes = {int(rank): int(code) for rank, code in _TORCH.findall(text)}
    codes |= {int(rank): -int(signum) for rank, signum in _MPI_SIGNAL.findall(text)}
    codes |= {int(rank): int(code) for rank, code in _MPI_CODE.findall(text)}
    for ranks, how in _SLURM.findall(text):
        if (code := _slurm_code(how)) is not None:
            codes |= dict.fromkeys(_numbers(ranks), code)
    return codes


def _slurm_code(how: str) -> int | None:
    exited = _SLURM_CODE.search(how)
    if exited:
        return int(exited[1])
    return -_SIGNALS[how] if how in _SIGNALS else None


def _numbers(ranges: str) -> list[int]:
    """``0-2,5`` as numbers."""
    numbers: list[int] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
