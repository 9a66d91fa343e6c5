"""A signal to any rank stops all ranks at the same step; the second one ends a rank at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.preemption import PreemptionWatch
from everyrank.runtime.process_group import join

Run = Callable[..., list[Any]]
WATCHED = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


def _steps(rank: int, port: int, rounds: list[tuple[int, int, int]]) -> list[tuple[str | None, int, list[int]]]:
    """For each round (victim, signal, step): run until all agree, and tell at which step."""
    results = []
    with join(rank=rank, world_size=3, master_port=port, timeout_s=60):
        for victim, signum, at in rounds:
            with PreemptionWatch() as watch:
                for step in range(at + 50):
                    if rank == victim and step == at:
                        os.kill(os.getpid(), signum)
                        os.kill(os.getpid(), signum)  # a launcher passes on what the group got already: one wish
                    if name := watch.agreed():
                        break
                    dist.all_reduce(torch.ones(2))
                assert watch.agreed() == name  # once agreed it stays
            results.append((name, step, gather_objects(step)))
    return results


def test_all_ranks_stop_at_the_same_step_whoever_gets_the_signal(run_ranks: Run, free_port: int) -> None:
    rounds = [(victim, int(signum), 3 + victim) for victim in range(3) for signum in WATCHED]
    rounds.append((0, 0, 5))  # nobody is signalled: nobody stops
    ranks = run_ranks(_steps, 3, free_port, rounds)
    for end in ranks:
        assert end.error is None, end
        for (victim, signum, at), (name, step, steps) in zip(rounds, end.value, strict=True):
            assert steps == [step] * 3
            assert name == (signal.Signals(signum).name if signum else None), (victim, signum)
            assert step == (at + 1 if signum else at + 49)  # noticed in the next call


def _blocked(rank: int, port: int, folder: str) -> None:
    with join(rank=rank, world_size=2, master_port=port, timeout_s=60), PreemptionWatch():
        Path(folder, f"ready-{rank}").touch()
        dist.recv(torch.zeros(1), src=1 - rank)  # never sent: blocked in C++ code


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_again_and_again_ends_a_blocked_rank_at_once(
    signum: int, code: int, start_ranks: Run, free_port: int, tmp_path: Path
) -> None:
    ranks = start_ranks(_blocked, 2, free_port, str(tmp_path))
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    victim = ranks.processes[0]
    while victim.is_alive() and time.monotonic() < deadline:
        os.kill(victim.pid, signum)
        victim.join(0.1)
    first, other = ranks.finish(30)
    assert first.exit_code == code
    assert other.error == "RuntimeError"  # its peer is gone


def test_alone_a_signal_is_seen_at_once_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in WATCHED]
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    with PreemptionWatch() as watch:
        assert (watch.noticed, watch.agreed()) == (None, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (watch.noticed, watch.agreed()) == ("SIGUSR1", "SIGUSR1")
        assert [signal.getsignal(s) for s in WATCHED] != before
    assert [signal.getsignal(s) for s in WATCHED] == before
    assert signal.set_wakeup_fd(fd) == fd
    with pytest.raises(KeyError), PreemptionWatch():
        raise KeyError
    assert [signal.getsignal(s) for s in WATCHED] == before


def test_a_signal_that_is_not_watched_does_not_end_the_watch() -> None:
    """A real-time signal has a handler of somebody else's, and no name in Python."""
    heard: list[int] = []
    number = signal.SIGRTMIN + 9
    previous = signal.signal(number, lambda signum, frame: heard.append(signum))
    try:
        with PreemptionWatch() as watch:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGUSR2)
            deadline = time.monotonic() + 10
            while watch.noticed is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (heard, watch.noticed) == ([number], "SIGUSR2")
            assert any(thread.name == "everyrank-signals" for thread in threading.enumerate())
    finally:
        signal.signal(number, previous)


def test_outside_of_the_main_thread_there_are_no_handlers_and_no_crash() -> None:
    before = [signal.getsignal(s) for s in WATCHED]
    seen: list[Any] = []

    def work() -> None:
        with PreemptionWatch() as watch:
            seen.extend([watch.agreed(), [signal.getsignal(s) for s in WATCHED] == before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, True]
