"""Write docs/images/kill.svg: a rank is killed, the verdict names it, and the same command goes on to the same end.

    python scripts/record_start_page.py      about a minute

Three real runs: one that nobody disturbs, one whose rank 1 is killed, and that one again. What the picture shows is
what they printed (lines are left out; times and the folder's place are cut off), the losses they recorded, and whether
both ended with the same weights, bit by bit. Exit code 1, and no picture, if they did not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from everyrank.certification.trial import ranks

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "kill.svg"
SETTINGS = ("driver=torchrun", "app=causal_sets", "driver.nproc_per_node=2")
SMALL = ("app.data.kwargs.num_samples=3000", "app.training.num_epochs=4", "+app.training.log_every_steps=2")
SAVING = ("+app.training.checkpoint_every_steps=25",)
KILL_AT_STEP, HEIGHT, TIMEOUT_S = 70, 9, 300.0
TOLD = re.compile(r"(?:resum|going on|continu|Epoch \d|from step|checkpoint)", re.IGNORECASE)
STAMP = re.compile(r"^\[RANK (\d+)\] \S+ \S+ INFO everyrank\.\w+: ")


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the training in a folder of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *SETTINGS, *SMALL, *SAVING]
    command += [f"env.output_dir={folder}", f"env.data_dir={folder.parent / 'data'}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a run and return the lines it printed."""
    return process.communicate(timeout=TIMEOUT_S)[0].splitlines()


def losses(folder: Path) -> dict[int, float]:
    """Step and loss, as far as the run has recorded them."""
    found = {}
    for path in folder.glob("*/history.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            row: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
            if row.get("kind") == "step":
                found[row["step"]] = row["loss"]
    return found


def kill_rank_1(process: subprocess.Popen[str], folder: Path) -> tuple[int, dict[int, float]]:
    """Kill rank 1 when the history has come to a step; return its process id and the history at that moment."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        before = losses(folder)
        if max(before, default=0) >= KILL_AT_STEP:
            (run,) = folder.iterdir()
            pid = next(pid for pid in ranks(process.pid, run) if _writes(pid, run / "logs" / "rank-1.log"))
            os.kill(pid, signal.SIGKILL)
            return pid, before
        time.sleep(0.02)
    raise SystemExit("The run ended before its rank could be killed:\n" + "\n".join(finish(process)))


def _writes(pid: int, log: Path) -> bool:
    return any(os.readlink(f"/proc/{pid}/fd/{fd}") == str(log.resolve()) for fd in os.listdir(f"/proc/{pid}/fd"))


def draw_curve(console: Console, whole: dict[int, float], killed: dict[int, float], again: dict[int, float]) -> None:
    """Draw the losses as dots: what both runs recorded, what was lost, and, if anywhere, where they differ."""
    low, high = min(whole.values()), max(whole.values())
    columns = sorted(whole)
    rows = [[" "] * len(columns) for _ in range(HEIGHT)]
    for column, step in enumerate(columns):
        height = round((HEIGHT - 1) * (high - whole[step]) / (high - low))
        rows[height][column] = "•" if again.get(step) == whole[step] else "×"
    mark = columns.index(max(step for step in columns if step <= max(killed)))
    console.print(Text(f"  loss {high:.2f}", style="dim"))
    for row in rows:
        line = Text("  │" + "".join(row))
        line.stylize("red", 3 + mark, 4 + mark)
        console.print(line)
    console.print(Text(f"  └{'─' * len(columns)} step {columns[-1]}", style="dim"))
    same = sum(again.get(step) == whole[step] for step in columns)
    told = f"{same} of {len(columns)} losses are bit by bit those of a run that nobody killed"
    console.print(Text(f"  killed after step {max(killed)}; {told}"))


def main() -> None:
    """Make the three runs and the picture."""
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed, disturbed = (Path(scratch, name) for name in ("undisturbed", "outputs"))
        finish(start(undisturbed))
        first = start(disturbed)
        pid, killed = kill_rank_1(first, disturbed)
        printed = finish(first)
        again = finish(start(disturbed))
        (run,) = disturbed.iterdir()
        weights = [json.loads(path.read_text())["weights"] for path in Path(scratch).glob("*/*/result.json")]
        if len(weights) != 2 or weights[0] != weights[1]:
            raise SystemExit(f"The runs ended with other weights: {weights}.\n" + "\n".join(again[-30:]))
        console = Console(record=True, width=108, file=open(os.devnull, "w"))  # noqa: SIM115

        def show(lines: list[str]) -> None:
            for line in lines:
                console.print(Text(line.replace(str(run), f"outputs/{run.name}").replace(f"{ROOT}/", "")))

        command = Text(f"$ python run.py {' '.join((*SETTINGS, *SMALL, *SAVING))}", style="bold green")
        console.print(command)
        show([STAMP.sub("", line) for line in printed if "Epoch" in line][-2:])
        console.print(Text(f"$ kill -9 {pid}        # rank 1, from another terminal", style="bold red"))
        begin = max(number for number, line in enumerate(printed) if line.startswith("error: "))
        show(printed[begin:])
        console.print(command)
        show([STAMP.sub("", line) for line in again if STAMP.match(line) and TOLD.search(line)][:4])
        draw_curve(console, losses(undisturbed), killed, losses(disturbed))
        console.print(Text(f"  weights at the end, of both runs: {weights[0][:32]}", style="bold"))
    svg = console.export_svg(title="a rank is killed, named, and made good")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")  # fetches nothing
    print(PICTURE)


if __name__ == "__main__":
    main()
