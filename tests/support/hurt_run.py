"""The certificate's training, which sends a signal from inside one of its ranks at an exactly chosen place.

The places are real: a call of the model in training or in validation, an optimizer step, or the system calls by which
checkpoints and ledgers are written. Nothing of everyrank is replaced, only functions of the standard library and the
step of torch's AdamW.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

import everyrank
from everyrank.apps.train import Train
from everyrank.certification import data
from everyrank.errors import Preempted
from everyrank.training.tracking.history import read_history

ROOT = Path(__file__).resolve().parents[2]
NUM_SAMPLES, NUM_EPOCHS, NUM_STEPS = 103, 3, 33
WRITING, RENAMING = ("write", "fsync", "mkdir"), ("rename", "replace")


@dataclass(frozen=True)
class Harm:
    """A signal at a place.

    Attributes:
        place: ``training``, ``validation`` (a call of the model), ``optimizer`` (its step), or a function of ``os``.
        count: At which call in this process.
        rank: Which rank sends it. Checkpoints are written by rank 0.
        name: The signal.
        victim: ``rank`` (itself), ``launcher``, ``group`` (the launcher's process group) or ``all`` (every process).
        after: Whether the call is carried out before the signal.
        times: How often it is sent; a second one is sent when the first has arrived.
    """

    place: str
    count: int
    rank: int = 0
    name: str = "SIGKILL"
    victim: str = "rank"
    after: bool = False
    times: int = 1

    def as_override(self) -> str:
        """As Hydra takes it."""
        return "+app.harm={" + ",".join(f"{key}:{value}" for key, value in asdict(self).items()) + "}"


_arrived = threading.Event()
_at_call: dict[str, Callable[[], None]] = {}


def arm(harm: Harm) -> None:
    """Make this process send the signal at its place."""
    install = signal.signal

    def announced(number: int, handler: Any) -> Any:
        if number != getattr(signal, harm.name) or not callable(handler):
            return install(number, handler)

        def arrive(*args: Any) -> Any:
            _arrived.set()
            return handler(*args)

        return install(number, arrive)

    signal.signal = announced
    num_calls = 0

    def called() -> bool:
        nonlocal num_calls
        num_calls += 1
        return num_calls == harm.count

    if harm.place in ("training", "validation"):
        _at_call[harm.place] = lambda: send(harm) if called() else None
        return
    owner = torch.optim.AdamW if harm.place == "optimizer" else os
    name = "step" if harm.place == "optimizer" else harm.place
    original = getattr(owner, name)

    def hurt(*args: Any, **kwargs: Any) -> Any:
        if not called():
            return original(*args, **kwargs)
        if harm.place == "write" and not harm.after:
            original(args[0], args[1][: len(args[1]) // 2])  # torn in the middle
        if not harm.after:
            send(harm)
        try:
            return original(*args, **kwargs)
        finally:
            if harm.after:  # also where the call fails, such as mkdir of a folder that is there
                send(harm)

    setattr(owner, name, hurt)


def send(harm: Harm) -> None:
    """Send the signal, and wait here until it has arrived: the place is where this rank hears of it."""
    number = getattr(signal, harm.name)
    for attempt in range(harm.times):
        if harm.victim == "rank":
            os.kill(os.getpid(), number)
        elif harm.victim == "launcher":
            os.kill(launcher().pid, number)
        elif harm.victim == "group":
            os.killpg(os.getpgid(launcher().pid), number)
        else:
            # Not by a command: a thread that starts one blocks signals for a moment, and may then be the one that takes
            # this process's own from its main thread, which hears nothing until it wakes.
            pids = [process.pid for process in (*launcher().children(recursive=True), launcher())]
            for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # this one last
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        deadline = time.monotonic() + 30
        while attempt == 0 and not _arrived.is_set():
            assert time.monotonic() < deadline, f"{harm.name} did not arrive"
            time.sleep(0.005)  # a handler runs between two steps of the main thread, which this may be
    if harm.times > 1:
        time.sleep(30)  # the second one ends this process here
        raise AssertionError(f"{harm.name} came {harm.times} times, and this rank is still there")


def launcher() -> psutil.Process:
    """The process that a user started."""
    above = list(reversed(psutil.Process().parents()))
    forks = [process for process in above if "multiprocessing.forkserver" in " ".join(process.cmdline())]
    if forks:
        return forks[1]  # see warm_start: the first is what it forks from
    return next(process for process in above if process.cmdline()[1:2] == [str(ROOT / "run.py")])


def apply_model(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The certificate's, with a place to be hurt at."""
    at_call = _at_call.get("training" if model.training else "validation")
    if at_call is not None:
        at_call()
    return data.apply_model(model, batch)


def network(dropout: float = 0.0) -> torch.nn.Module:
    """The certificate's; with dropout, the ranks' randomness matters too."""
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 1)
    )


class Hurt(Train):
    """``app._target_=hurt_run.Hurt +app.harm={...}``: the certificate's app, hurt."""

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Arm this rank if it is its turn, and train; a preempted rank tells at which step it stopped."""
        harm = cfg.app.get("harm")
        with open_dict(cfg.app):
            cfg.app.pop("harm", None)
        rank = everyrank.detect().rank
        if harm is not None and Harm(**harm).rank == rank and everyrank.detect().restart_count == 0:
            arm(Harm(**harm))
        try:
            return super().run(cfg)
        except Preempted as stopped:
            Path(cfg.run.dir, f"stopped-{rank}").write_text(str(stopped).partition("step ")[2].partition(";")[0])
            raise


def train(run: Path, harm: Harm | None = None, dropout: float = 0.0, changes: Mapping[str, Any] | None = None) -> Any:
    """Train in ranks that ``everyrank.launch`` starts; the same run that the command line starts.

    Returns:
        The first step of this launch, the step it was preempted at, and the losses of all steps.
    """
    app = yaml.safe_load((files("everyrank") / "conf" / "app" / "certify.yaml").read_text())
    app["data"]["kwargs"]["delay_s"] = 0.0
    app.update(apply_model="hurt_run.apply_model")
    app["model"] = {"type": "hurt_run.network", "kwargs": {"dropout": dropout}}
    app["training"].update({"log_every_steps": 1, "checkpoint_every_steps": 2, **(changes or {})})
    app["name"] = "hurt"
    cfg = OmegaConf.create(
        {"app": app, "distributed": {"timeout_s": 60.0, "device": "cpu"}, "run": {"dir": str(run)}, "resume": "auto"}
    )
    if harm is not None and everyrank.detect().rank == harm.rank:
        arm(harm)
    before = newest_step(run)
    try:
        Train().run(cfg)
    except Preempted as stopped:
        return {"first": before, "stopped": int(str(stopped).partition("step ")[2].partition(";")[0])}
    rows = [row for row in read_history(run / "history.jsonl") if row["kind"] == "step"]
    return {"first": before, "losses": [row["loss"] for row in rows], "steps": [row["step"] for row in rows]}


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint by name."""
    return max((int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*")), default=0)


def train_on_a_stuck_disk(run: Path, changes: Mapping[str, Any]) -> Any:
    """Train; rank 0's first flush of a checkpoint returns only when training has come to the last step before the next.

    Returns:
        Whether it came there while the flush was stuck, and what ``train`` returns.
    """
    came, num_calls, fsync = threading.Event(), itertools.count(1), os.fsync
    released: list[bool] = []

    def stuck(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not released:
            released.append(came.wait(20))
        fsync(descriptor)

    def at_call() -> None:
        if next(num_calls) == 2 * changes["checkpoint_every_steps"]:
            came.set()

    os.fsync = stuck
    _at_call["training"] = at_call
    return released, train(run, changes=changes)
