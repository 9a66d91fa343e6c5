"""How long ``everyrank check`` takes over 1,000 files, beside ruff and what else of linters is installed.

    python benchmarks/check.py [--num-files 1000] [--rounds 3] [--corpus FOLDER]

The files are copies of the Python files of a folder (this repository by default), each with lines of its own, three in
ten of them with the beginning of a distributed program so that the rules have work to do. The linters take turns; each
number is the median of whole processes, with the start of the interpreter and no cache: seconds on the clock, and
seconds of processor time, which say more where the machine has other work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_DISTRIBUTED = """
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def start_{number}():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    model = DistributedDataParallel(torch.nn.Linear(2, 2).cuda(), device_ids=[rank])
    torch.save(model.state_dict(), "model_{number}.pt")
"""


def main() -> None:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-files", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corpus", type=Path, default=ROOT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_lines = _make(Path(folder), arguments.corpus, arguments.num_files)
        print(f"{arguments.num_files} files, {num_lines} lines, {len(os.sched_getaffinity(0))} cores")
        _measure(Path(folder), arguments.rounds)


def _make(folder: Path, corpus: Path, num_files: int) -> int:
    """Write the files; returns their number of lines."""
    sources = [
        path
        for path in sorted(corpus.rglob("*.py"))
        if not {".venv", ".git"} & set(path.parts) and 2_000 < path.stat().st_size < 60_000
    ]
    num_lines = 0
    for number in range(num_files):
        text = sources[number % len(sources)].read_text(encoding="utf-8", errors="replace")
        text += f"\nNUMBER = {number}\n"
        if number % 10 < 3:
            text += _DISTRIBUTED.format(number=number)
        target = folder / f"package_{number % 20}" / f"module_{number}.py"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
        num_lines += text.count("\n")
    return num_lines


def _measure(folder: Path, rounds: int) -> None:
    linters = {
        "everyrank check": [sys.executable, "-m", "everyrank", "check", "--no-config", str(folder)],
        "everyrank check --jobs=1": [
            sys.executable,
            "-m",
            "everyrank",
            "check",
            "--no-config",
            "--jobs=1",
            str(folder),
        ],
        "ruff check": [
            str(Path(sys.executable).parent / "ruff"),
            "check",
            "--no-cache",
            "--isolated",
            "-q",
            str(folder),
        ],
    }
    for module in ("flake8", "pylint", "torchfix"):
        if importlib.util.find_spec(module):
            linters[module] = [sys.executable, "-m", module, str(folder)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in linters}
    for _ in range(rounds):
        for name, command in linters.items():
            start, used = time.perf_counter(), _processor_s()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, cwd=folder)
            times[name].append((time.perf_counter() - start, _processor_s() - used))
    print(f"\n{'linter':<26}{'clock s':>10}{'processor s':>13}{'ratio':>8}")
    first = statistics.median(used for _, used in times["everyrank check"])
    for name, values in times.items():
        clock, used = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:<26}{clock:>10.2f}{used:>13.2f}{used / first:>8.2f}")


def _processor_s() -> float:
    """Processor time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
