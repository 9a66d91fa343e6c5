"""A campaign of faults: is the guilty rank named, with its cause and its line, and how soon?

``python benchmarks/verdicts.py --num 200 --jobs 4`` injects faults of 25 kinds at random steps, in random ranks, at
world sizes 2 and 3, in a program that imports only torch (``faulty_program.py``) and in one that trains by TrainerDDP
(``faulty_trainer.py``), under torchrun, spawn, launch and mpi; and such faults under bare torchrun beside it. Writes
``results/verdicts.json`` and prints a table. ``--drivers ray hosts slurm`` does the same under Ray, on two hosts and
under Slurm (hosts of ``tests/cluster/hosts.py``: as root, one run at a time). ``--healthy MINUTES`` runs healthy
programs with slow phases instead, and counts what is said about them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROGRAMS = {"torch": HERE / "faulty_program.py", "trainer": HERE / "faulty_trainer.py"}
RESULTS = HERE / "results" / "verdicts.json"
# The cause that is right for each kind; more than one where two words are both true.
KINDS: dict[str, set[str]] = {
    "raise": {"raised"},
    "slow_cleanup": {"raised"},
    "wrapped": {"raised"},
    "raising_loader": {"raised"},
    "killed_worker": {"raised"},
    "out_of_memory": {"out_of_memory"},
    "exit": {"exited"},
    "hard_exit": {"exited"},
    "left_early": {"left_early"},
    "killed": {"killed"},
    "terminated": {"killed"},
    "segfault": {"killed"},
    "stopped": {"stopped"},
    "loop": {"stuck_in_python"},
    "holds_lock": {"stuck_in_python"},
    "asleep": {"stuck_in_python"},
    "blocked_read": {"stuck_in_io"},
    "stuck_loader": {"stuck_in_data_loading"},
    "skipped": {"skipped_collective"},
    "extra_collective": {"mismatched_collective", "skipped_collective"},
    "other_collective": {"mismatched_collective", "skipped_collective"},
    "wrong_shape": {"mismatched_collective"},
    "wrong_type": {"mismatched_collective"},
    "silent_type": {"mismatched_collective"},
    "silent_reduction": {"mismatched_collective"},
}
# What a program that trains by TrainerDDP can do wrong; its collectives are the trainer's own, and told by SIGTERM it
# saves and ends in good order.
OF_TRAINER = sorted(
    set(KINDS)
    - {"wrapped", "skipped", "other_collective", "wrong_shape", "wrong_type", "terminated"}
    - {
        "silent_type",
        "silent_reduction",
        "slow_cleanup",
        "extra_collective",
    }
)
DRIVERS = (*["torchrun"] * 9, "spawn", "launch", "mpi")
LIMIT_S = 600.0


def faults(num: int, seed: int, kinds: list[str], drivers: list[str], **limits: int) -> list[dict[str, Any]]:
    """``num`` faults, each kind as often as the others; ``limits`` are settings of ``watch``."""
    random_ = random.Random(seed)
    made = []
    for number in range(num):
        kind = kinds[number % len(kinds)]
        size = random_.choice((2, 2, 3))
        made.append(
            {
                "kind": kind,
                "size": size,
                "rank": random_.randrange(size),
                "step": random_.randrange(4, 30),
                "driver": random_.choice(drivers),
                **limits,
                "program": "trainer" if kind in OF_TRAINER and random_.random() < 0.3 else "torch",
            }
        )
    return sorted(made, key=lambda fault: fault["driver"] != "torchrun")  # the cheap ones first


_serving = threading.local()


def serve() -> None:
    """Run commands of ``everyrank run`` that come by standard input, in one process that keeps its engine.

    An engine that has imported torch and its compiler once takes one fault after another, in a second or two each.
    """
    from everyrank.cli.main import run

    for line in sys.stdin:
        order = json.loads(line)
        os.chdir(order["folder"])
        os.environ["FAULT_STAMP"] = order["stamp"]
        with open(os.path.join(order["folder"], "said"), "w") as said:
            for fd in (1, 2):
                os.dup2(said.fileno(), fd)
        code = run(order["argv"])
        Path(order["folder"], "code").write_text(str(code))


def run_served(argv: list[str], folder: Path, stamp: Path) -> int | None:
    """One command in this thread's serving process; None if it did not end in time."""
    server = getattr(_serving, "process", None)
    if server is None or server.poll() is not None:
        command = [sys.executable, __file__, "--serve"]
        server = _serving.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        _servers.append(server)
    order = {"argv": argv, "folder": str(folder), "stamp": str(stamp)}
    print(json.dumps(order), file=server.stdin, flush=True)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        if (folder / "code").exists():
            return int((folder / "code").read_text() or 1)
        time.sleep(0.1)
    server.kill()
    return None


_servers: list[subprocess.Popen[str]] = []


CLUSTERS = ("ray", "hosts", "slurm")
_cluster = threading.Lock()


def run_on_cluster(fault: dict[str, Any], folder: Path, stamp: Path, words: list[str]) -> tuple[int, str]:
    """Run a program under Ray here, or with its ranks on two hosts; returns exit code and output."""
    driver, size = fault["driver"], fault["size"]
    end_after_s = fault["end_after_s"] + 5  # the host that can look at the process is to come first
    limits = [f"watch.stall_s={fault['stall_s']}", f"watch.end_after_s={end_after_s}"]
    run = [
        sys.executable,
        "-m",
        "everyrank",
        "run",
        *limits,
        f"env.variables.FAULT_STAMP={stamp}",
        "run.dir=outputs/run",
    ]
    with _cluster:
        if driver == "ray":
            command = [*run, "driver=ray", f"driver.num_workers={size}", "driver.cpus_per_worker=0.5", "--", *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            return done.returncode, done.stdout + done.stderr
        sys.path.insert(0, str(HERE.parent / "tests"))
        from cluster.hosts import network
        from cluster.slurm_cluster import slurm

        with contextlib.ExitStack() as stack:
            nodes = stack.enter_context(network(3, folder))
            if driver == "slurm":
                base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
                env = stack.enter_context(slurm(nodes, base))
                how = ["driver=slurm", f"driver.nproc_per_node={size}", "driver.poll_s=0.2", "driver.task_per=rank"]
                jobs = [nodes[0].start([*run, *how, "--", *words], folder, env)]
            else:
                how = ["driver=torchrun", "driver.nnodes=2", "driver.master_addr=node0", "driver.master_port=29500"]
                shares = (size - 1, 1)
                jobs = [
                    nodes[n].start(
                        [*run, *how, f"driver.nproc_per_node={shares[n]}", f"driver.node_rank={n}", "--", *words],
                        folder,
                    )
                    for n in (0, 1)
                ]
            said = [job.communicate(timeout=LIMIT_S)[0] for job in jobs]
        return jobs[0].returncode, "".join(said)


def run_ours(fault: dict[str, Any]) -> dict[str, Any]:
    """Inject one fault under everyrank and read the verdict."""
    folder = Path(tempfile.mkdtemp(prefix="verdict-"))
    stamp = folder / "stamp"
    words = [str(PROGRAMS[fault["program"]]), fault["kind"], str(fault["rank"]), str(fault["step"])]
    settings = [f"driver={fault['driver']}", f"driver.nproc_per_node={fault['size']}"]
    limits = [f"watch.{name}={fault[name]}" for name in ("stall_s", "end_after_s")]
    command = [sys.executable, "-m", "everyrank", "run", *settings, *limits, "--", *words]
    began_s = time.time()
    row = dict(fault)
    if fault["driver"] in CLUSTERS:
        row["code"], said = run_on_cluster(fault, folder, stamp, words)
        return read_verdict(row, folder, stamp, began_s, said)
    if fault["driver"] == "torchrun":
        settings[0] = "driver='torchrun'"  # in quotes, which keeps the engine of this process
        argv = [
            *settings,
            *limits,
            "app=script",
            "--",
            *words,
        ]
        row["code"] = run_served(argv, folder, stamp)
        said = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
        return read_verdict(row, folder, stamp, began_s, said)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "FAULT_STAMP": str(stamp)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
        row["code"], said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        row["code"], said = None, str(error.stdout)
    return read_verdict(row, folder, stamp, began_s, said)


def read_verdict(row: dict[str, Any], folder: Path, stamp: Path, began_s: float, said: str) -> dict[str, Any]:
    """Add to a row what ``verdict.json`` says, and remove the run."""
    path = next(folder.glob("outputs/*/verdict.json"), None)
    verdict = json.loads(path.read_text()) if path else {}
    row.update(
        {key: verdict.get(key) for key in ("cause", "where", "said", "detected_after_s")}, named=verdict.get("rank")
    )
    row["total_s"] = round(time.time() - began_s, 1)
    if path and stamp.exists():
        row["seconds"] = round(path.stat().st_mtime - float(stamp.read_text()), 1)
    row["judged"], row["told"] = judge(row), said[-3000:]
    shutil.rmtree(folder, ignore_errors=True)
    return row


def judge(row: dict[str, Any]) -> str:
    """``right``, ``wrong cause``, ``undecided``, ``wrong rank`` or ``nothing``."""
    if row.get("cause") is None:
        return "nothing"
    if row["named"] is None:
        return "undecided"
    if row["named"] != row["rank"]:
        return "wrong rank"
    return "right" if row["cause"] in KINDS[row["kind"]] else "wrong cause"


def names_the_line(row: dict[str, Any]) -> bool:
    """Whether the verdict names the line that is marked with the fault's kind."""
    match = re.match(r"(.+):(\d+) in ", row.get("where") or "")
    if not match or not os.path.exists(match[1]):
        return False
    lines = Path(match[1]).read_text().splitlines()
    return f"# fault: {row['kind']}" in lines[int(match[2]) - 1] or row["kind"] in lines[int(match[2]) - 1].split()


def run_bare(fault: dict[str, Any]) -> dict[str, Any]:
    """The same fault under bare torchrun: which rank does it call the root cause?"""
    folder = Path(tempfile.mkdtemp(prefix="verdict-"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={fault['size']}"]
    words = [str(PROGRAMS["torch"]), fault["kind"], str(fault["rank"]), str(fault["step"]), "20"]
    process = subprocess.Popen(
        [*launcher, f"--log-dir={folder}", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    row = dict(fault, program="torch", driver="bare torchrun")
    try:
        said = process.communicate(timeout=LIMIT_S)[0]
        found = re.search(r"Root Cause.*?rank\s*: (\d+)", said, re.DOTALL)
        named = int(found[1]) if found else None
        row["judged"] = "nothing" if named is None else "right" if named == fault["rank"] else "wrong rank"
    except subprocess.TimeoutExpired:
        row["judged"] = "nothing"
        os.killpg(process.pid, 9)
        process.communicate()
    shutil.rmtree(folder, ignore_errors=True)
    return row


def run_healthy(number: int) -> dict[str, Any]:
    """A program without a fault but with a slow phase: whatever is concluded about it is a false alarm."""
    folder = Path(tempfile.mkdtemp(prefix="verdict-"))
    # A collective's own timeout is ten minutes: on a loaded machine a slow phase may take longer than one.
    words = [str(PROGRAMS["torch"]), ("slow_step", "slow_validation")[number % 2], str(number % 2), "9", "600"]
    command = [sys.executable, "-m", "everyrank", "run", "driver=torchrun", "driver.nproc_per_node=2", "--", *words]
    began_s = time.time()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    alarm = done.returncode != 0 or bool(list(folder.glob("outputs/*/verdict.json")))
    notices = done.stderr.count("notice: no rank has gone on")
    shutil.rmtree(folder, ignore_errors=True)
    told = done.stderr[-3000:] if alarm else ""
    return {"minutes": (time.time() - began_s) / 60, "alarm": alarm, "notices": notices, "told": told}


def summary(rows: list[dict[str, Any]], bare: list[dict[str, Any]]) -> str:
    """The table, a line for each kind."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    theirs: dict[str, list[str]] = defaultdict(list)
    for row in bare:
        theirs[row["kind"]].append(row["judged"])
    lines = ["| fault | runs | rank and cause | wrong rank | undecided | line | named after | bare torchrun |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in (k for k in KINDS if by_kind[k]):
        some = by_kind[kind]
        judged = Counter(row["judged"] for row in some)
        seconds = sorted(row["seconds"] for row in some if row.get("seconds") is not None)
        after = f"{seconds[len(seconds) // 2]:.1f} s" if seconds else ""
        lined = sum(names_the_line(row) for row in some)
        their = ", ".join(f"{number} {word}" for word, number in Counter(theirs[kind]).items())
        cells = (kind, len(some), judged["right"], judged["wrong rank"], judged["undecided"], lined, after, their)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    judged = Counter(row["judged"] for row in rows)
    lines.append(f"\n{len(rows)} faults: {dict(judged)}; bare torchrun: {dict(Counter(r['judged'] for r in bare))}")
    by_driver = Counter((row["driver"], row["judged"] == "right") for row in rows)
    lines.append(
        "by driver: "
        + ", ".join(
            f"{name} {by_driver[(name, True)]} of {by_driver[(name, True)] + by_driver[(name, False)]}"
            for name in dict.fromkeys((*DRIVERS, *CLUSTERS))
            if (name, True) in by_driver or (name, False) in by_driver
        )
    )
    return "\n".join(lines)


def main() -> None:
    """Run the campaign, or the healthy runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--bare", type=int, default=24, help="faults to repeat under bare torchrun")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="start nothing after this time")
    parser.add_argument("--stall", type=int, default=10, help="watch.stall_s of the runs")
    # When the notice names the suspect: by default a hang that may end is not ended so soon.
    parser.add_argument("--end-after", type=int, default=10, help="watch.end_after_s of the runs")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--drivers", nargs="*", default=list(DRIVERS))
    parser.add_argument("--healthy", type=float, default=0, help="minutes of healthy runs instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--told", action="store_true", help="keep what the runs printed, also where it is right")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    deadline = time.monotonic() + 60 * (arguments.healthy or arguments.minutes)

    def in_time(run: Any, what: Any) -> dict[str, Any] | None:
        if time.monotonic() > deadline:
            return None
        row = run(what)
        print(json.dumps({k: v for k, v in row.items() if k != "told" or row.get("alarm")}), flush=True)
        return row

    limits = {"stall_s": arguments.stall, "end_after_s": arguments.end_after}
    planned = faults(arguments.num, arguments.seed, arguments.kinds, arguments.drivers, **limits)
    beside = faults(arguments.bare, 1, arguments.kinds, arguments.drivers, **limits)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        if arguments.healthy:
            found = [row for row in pool.map(lambda n: in_time(run_healthy, n), range(10_000)) if row]
            minutes = sum(row["minutes"] for row in found)
            alarms, notices = sum(row["alarm"] for row in found), sum(row["notices"] for row in found)
            print(f"{len(found)} healthy runs, {minutes:.0f} minutes: {alarms} false alarms, {notices} notices")
            return
        ours = list(pool.map(lambda f: in_time(run_ours, f), planned))
        theirs = list(pool.map(lambda f: in_time(run_bare, f), beside))
    for server in _servers:
        server.stdin.close()  # type: ignore[union-attr]
        server.wait()
    rows, bare = [row for row in ours if row], [row for row in theirs if row]
    if not arguments.told:
        rows = [{k: v for k, v in row.items() if k != "told" or row["judged"] != "right"} for row in rows]
    table = summary(rows, bare)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"faults": rows, "bare_torchrun": bare, "table": table}, indent=1))
    print(table)


if __name__ == "__main__":
    main()
