"""How long a launch takes: everyrank's drivers beside bare torchrun, mp.spawn and accelerate.

Every contender starts two ranks, joins them over gloo, sums one number and ends. They are run in turn, several rounds,
and the medians are compared, because the machine's speed drifts. Columns:

- first collective: from the start of the process until rank 0 has the sum;
- whole process: until the launching process has exited;
- ratio: whole process over bare torchrun's in the same rounds.

Usage: python benchmarks/launch.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BARE = """
    import os, sys, time
    import torch
    import torch.distributed as dist

    def main(rank=None, world_size=None, port=None):
        if rank is not None:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print("FIRST", time.time(), flush=True)
        dist.destroy_process_group()
"""
SCRIPTS = {
    "bare.py": BARE + "\n    main()\n",
    "spawned.py": BARE
    + """
    if __name__ == "__main__":
        import socket
        import torch.multiprocessing as mp
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(main, args=(2, port), nprocs=2)
""",
    "function.py": """
    import time
    import everyrank

    def first_sum():
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print("FIRST", time.time(), flush=True)
        dist.destroy_process_group()

    begin = time.time()
    everyrank.launch(first_sum, nproc_per_node=2)
    middle = time.time()
    everyrank.launch(first_sum, nproc_per_node=2)
    print("SECOND_CALL", time.time() - middle, flush=True)
""",
    "sum_app.py": """
    import time
    import torch
    import everyrank

    class App:
        def run(self, cfg):
            with everyrank.join(**cfg.distributed) as world:
                everyrank.reduce_sum(torch.ones(1))
                if world.is_main:
                    print("FIRST", time.time(), flush=True)
""",
}


def main() -> None:
    """Run the contenders in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in SCRIPTS.items():
            Path(folder, name).write_text(textwrap.dedent(text))
        contenders = _contenders(folder)
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for round_ in range(arguments.rounds + 1):
            for name, run in contenders.items():
                measured = run()
                if round_:  # the first round warms the file cache
                    figures[name].append(measured)
        _print_table(figures)
        if arguments.json:
            arguments.json.write_text(json.dumps(_medians(figures), indent=2) + "\n")


def _contenders(folder: str) -> dict[str, Callable[[], dict[str, float]]]:
    python, run = sys.executable, str(ROOT / "run.py")
    app = ["app=custom", "app._target_=sum_app.App", "driver.nproc_per_node=2", f"env.output_dir={folder}/outputs"]
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = {
        "bare torchrun": [*torchrun, f"--log-dir={folder}/logs", "bare.py"],
        "mp.spawn": [python, "spawned.py"],
    }
    if importlib.util.find_spec("accelerate"):
        commands["accelerate launch"] = [python, "-m", "accelerate.commands.launch", "--multi_gpu"]
        commands["accelerate launch"] += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
        commands["accelerate launch"] += ["--dynamo_backend=no", "--main_process_port=0", "bare.py"]
    else:
        print("accelerate launch: skipped, accelerate is not installed")
    for method in ("forkserver", "spawn", "fork"):
        commands[f"driver=torchrun ({method})"] = [
            python,
            run,
            "driver=torchrun",
            f"driver.start_method={method}",
            *app,
        ]
    commands["everyrank run -- script"] = [python, run, "-n", "2", f"env.output_dir={folder}/outputs", "--", "bare.py"]
    torchrun = [python, "-m", "everyrank", "torchrun", "--standalone", "--nproc-per-node=2"]
    commands["everyrank torchrun script"] = [*torchrun, f"--log-dir={folder}/outputs", "bare.py"]
    commands["everyrank.launch"] = [python, "function.py"]
    return {name: lambda c=command: _measure(c, folder) for name, command in commands.items()}  # type: ignore[misc]


def _measure(command: list[str], folder: str) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder, "TMPDIR": folder}
    begin = time.time()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    whole_s = time.time() - begin
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("FIRST", "SECOND_CALL"))]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    measured = {"first_s": float(lines[0][1]) - begin, "whole_s": whole_s}
    second = [float(value) for name, value in lines if name == "SECOND_CALL"]
    if second:
        measured["second_call_s"] = second[0]
        measured["whole_s"] = whole_s - second[0]
    return measured


def _medians(figures: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    rival = [run["whole_s"] for run in figures["bare torchrun"]]
    table = {}
    for name, runs in figures.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["ratio"] = statistics.median(run["whole_s"] / other for run, other in zip(runs, rival, strict=True))
        if "second_call_s" in row:
            row["second_call_ratio"] = statistics.median(
                run["second_call_s"] / other for run, other in zip(runs, rival, strict=True)
            )
        table[name] = row
    return table


def _print_table(figures: dict[str, list[dict[str, float]]]) -> None:
    table = _medians(figures)
    print(f"{'two ranks over gloo':<30}{'first collective':>18}{'whole process':>16}{'of bare torchrun':>18}")
    for name, row in table.items():
        print(f"{name:<30}{row['first_s']:>16.2f} s{row['whole_s']:>14.2f} s{row['ratio']:>18.2f}")
        if "second_call_s" in row:
            second = row["second_call_s"]
            print(f"{'  a second everyrank.launch':<30}{'':>18}{second:>14.2f} s{row['second_call_ratio']:>18.2f}")


if __name__ == "__main__":
    main()
