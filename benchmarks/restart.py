"""How long a killed rank holds a training up: everyrank's restart beside ``torchrun --max-restarts``, same script.

Two ranks train a small DDP model and save a checkpoint after every step with ``torch.save``. At a step in the middle,
rank 1 notes the time and sends itself SIGKILL; the launcher starts the group again, the ranks load the checkpoint, and
rank 0 notes the time after its next optimizer step. The contenders run in turn, several rounds, and medians are
compared, because the machine's speed drifts.

torchrun of torch 2.13 often reconnects to the dead ranks' addresses and fails; it gets the variable
``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, which cures that. Runs that end without a next step are counted, not timed.

Usage: python benchmarks/restart.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
    import os, signal, sys, time
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def main(folder):
        dist.init_process_group("gloo")
        rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)))
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint, step = os.path.join(folder, "checkpoint.pt"), 0
        if os.path.exists(checkpoint):
            saved = torch.load(checkpoint)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        while step < 20:
            optimizer.zero_grad()
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
            step += 1
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, checkpoint + ".new")
                os.replace(checkpoint + ".new", checkpoint)
                if attempt == 1:
                    tell(folder, "next")
                    attempt = 2
            if attempt == 0 and step == 10 and rank == 1:
                tell(folder, "kill")
                os.kill(os.getpid(), signal.SIGKILL)
        dist.destroy_process_group()

    def tell(folder, name):
        with open(os.path.join(folder, name), "w") as file:
            file.write(repr(time.time()))

    class App:
        def run(self, cfg):
            main(cfg.app.folder)

    if __name__ == "__main__":
        main(sys.argv[1])
"""


def main() -> None:
    """Run the contenders in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, list[float | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kill_train.py").write_text(textwrap.dedent(SCRIPT))
        for round_ in range(arguments.rounds + 1):
            for name, command in _contenders().items():
                held_up_s = _measure(command, folder, f"{name}-{round_}")
                if round_:  # the first round warms the file cache
                    figures.setdefault(name, []).append(held_up_s)
    table = _table(figures)
    print(f"{'SIGKILL of a rank to the next step':<36}{'median':>10}{'of torchrun':>14}{'failed':>12}")
    for name, row in table.items():
        print(f"{name:<36}{row['median_s']:>8.2f} s{row['ratio']:>14.2f}{row['failed']:>7.0f} of {arguments.rounds}")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")


def _contenders() -> dict[str, list[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = [sys.executable, str(ROOT / "run.py"), "driver=torchrun", "driver.max_restarts=1", "app=custom"]
    ours += ["app._target_=kill_train.App", "+app.folder=FOLDER", "env.output_dir=FOLDER/outputs"]
    return {
        "torchrun --max-restarts=1": [*torchrun, "--max-restarts=1", "--log-dir=FOLDER", "kill_train.py", "FOLDER"],
        "driver=torchrun": ours,
    }


def _measure(command: list[str], home: str, name: str) -> float | None:
    """Return the seconds from the kill to the next step, or None if there was none."""
    folder = Path(home, name.replace(" ", "-").replace("=", "-").replace(",", ""))
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home, "TMPDIR": home}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [part.replace("FOLDER", str(folder)) for part in command]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=120, check=False)
    if not (folder / "kill").exists():
        raise SystemExit(f"no rank was killed in {time.monotonic() - begin:.0f} s:\n{done.stdout}\n{done.stderr}")
    if not (folder / "next").exists():
        return None
    return float((folder / "next").read_text()) - float((folder / "kill").read_text())


def _table(figures: dict[str, list[float | None]]) -> dict[str, dict[str, float]]:
    rival = next(iter(figures.values()))
    table = {}
    for name, runs in figures.items():
        pairs = [(run, other) for run, other in zip(runs, rival, strict=True) if run is not None and other is not None]
        whole = [run for run in runs if run is not None]
        table[name] = {
            "median_s": statistics.median(whole) if whole else float("nan"),
            "ratio": statistics.median(run / other for run, other in pairs) if pairs else float("nan"),
            "failed": sum(run is None for run in runs),
        }
    return table


if __name__ == "__main__":
    main()
