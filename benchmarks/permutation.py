"""How long until the first sample of an epoch is known, and how much memory that takes, beside DistributedSampler.

    python benchmarks/permutation.py

Each measurement runs in a process of its own: the time of the second epoch's first index (the first epoch pays for
imports and allocations), and how far the peak of resident memory rises above that of the process before.
DistributedSampler builds a list of all indices, which at n = 10^9 needs some 50 GB; where the machine has less, that is
said and left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch.utils.data import Dataset, DistributedSampler

from everyrank import GlobalBatchSampler

SIZES = [10**3, 10**6, 10**9, 10**12]
# The permutation as an int64 tensor, and the list of Python integers made of it.
BYTES_PER_INDEX = 8 + 8 + 32
GOAL_S, GOAL_BYTES = 0.010, 10 * 2**20


class Numbers(Dataset):
    """A dataset of which only the length matters."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples


def measure(which: str, num_samples: int) -> dict[str, float]:
    """Start two epochs in this process; return seconds of the second and bytes of both."""
    if which == "everyrank":
        sampler: GlobalBatchSampler | DistributedSampler = GlobalBatchSampler(
            num_samples, global_batch_size=32, rank=1, world_size=2
        )
    else:
        sampler = DistributedSampler(Numbers(num_samples), num_replicas=2, rank=1)
    torch.randperm(10)  # the first call of it loads code
    before = peak_bytes()
    seconds = 0.0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        start = time.perf_counter()
        next(iter(sampler))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak_bytes() - before}


def peak_bytes() -> int:
    """Return the largest resident size this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    parser.add_argument("--measure", nargs=2, metavar=("WHICH", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    print(f"{'n':>6}  {'sampler':<20} {'first index':>12} {'peak memory':>12}")
    table: dict[str, dict[str, dict[str, float]]] = {}
    for num_samples in SIZES:
        row = table.setdefault(f"10^{len(str(num_samples)) - 1}", {})
        for which in ("everyrank", "DistributedSampler"):
            label = f"10^{len(str(num_samples)) - 1:<3}  {which:<20}"
            needed = num_samples * BYTES_PER_INDEX
            if which == "DistributedSampler" and needed > psutil.virtual_memory().available:
                print(f"{label} left out: its list needs about {needed / 2**30:,.0f} GiB")
                row[which] = {"needed_bytes": needed}
                continue
            command = [sys.executable, __file__, "--measure", which, str(num_samples)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(args.repeats)]
            seconds = statistics.median(run["seconds"] for run in runs)
            size = statistics.median(run["bytes"] for run in runs)
            row[which] = {"seconds": seconds, "bytes": size}
            print(f"{label} {seconds * 1e3:>9.2f} ms {size / 2**20:>8.1f} MiB")
            if which == "everyrank" and num_samples == SIZES[-1]:
                met = seconds <= GOAL_S and size <= GOAL_BYTES
                print(f"goal at 10^12: 10 ms and 10 MiB: {'reached' if met else 'missed'}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
