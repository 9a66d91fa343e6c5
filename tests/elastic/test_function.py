"""``everyrank.launch``: results by rank, exceptions with their rank, engines that stay warm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from waiting import wait_for

import everyrank
from conftest import cli_environment


def test_results_come_back_by_rank_and_the_engine_stays_warm() -> None:
    offset = 10

    def sums(extra: int, scale: int = 1) -> tuple[int, float, int]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.tensor([float(dist.get_rank() + extra)])
        dist.all_reduce(total)
        dist.destroy_process_group()
        return int(os.environ["RANK"]) * scale + offset, total.item(), os.getppid()

    first = everyrank.launch(sums, 1, nproc_per_node=3, kwargs={"scale": 2})
    assert [result[:2] for result in first] == [(10, 6.0), (12, 6.0), (14, 6.0)]
    second = everyrank.launch(sums, 0, nproc_per_node=2)
    assert [result[:2] for result in second] == [(10, 1.0), (11, 1.0)]
    assert first[0][2] == second[0][2], "the second call forks from the first call's server: torch is imported once"


def test_ranks_of_a_caller_that_has_the_trainer_need_not_import_it() -> None:
    assert everyrank.TrainerDDP.__module__ == "everyrank.training.trainer"

    def has_it() -> bool:
        return "everyrank.training.trainer" in sys.modules

    assert everyrank.launch(has_it) == [True, True]


def test_an_exception_reaches_the_caller_with_its_rank_and_traceback() -> None:
    def fails() -> None:
        if os.environ["RANK"] == "1":
            raise KeyError("no such galaxy")
        signal.pause()  # would wait for ever: the caller must not wait for it

    with pytest.raises(everyrank.RankFailedError) as caught:
        everyrank.launch(fails)
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.args == ("no such galaxy",)
    assert "in fails" in caught.value.traceback
    assert "rank 1 of 2 failed" in str(caught.value)


def test_an_exception_that_cannot_be_pickled_still_names_the_rank() -> None:
    def fails() -> None:
        class Stubborn(Exception):
            def __reduce__(self) -> str:
                raise TypeError("not me")

        raise Stubborn("hello")

    with pytest.raises(everyrank.RankFailedError, match="Stubborn: hello"):
        everyrank.launch(fails, nproc_per_node=1)


def test_a_killed_rank_and_a_killed_engine_are_told_and_the_next_call_works() -> None:
    def dies() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(everyrank.RankFailedError, match="killed by SIGKILL") as caught:
        everyrank.launch(dies, nproc_per_node=1)
    assert caught.value.exit_code == -signal.SIGKILL

    def kills_engine() -> None:
        import psutil

        *_, engine = (p for p in psutil.Process().parents() if "everyrank.elastic.engine" in p.cmdline())
        engine.kill()
        signal.pause()

    with pytest.raises(everyrank.EveryrankError, match="died"):
        everyrank.launch(kills_engine, nproc_per_node=1)
    assert everyrank.launch(os.getpid, nproc_per_node=1) != [os.getpid()]


def test_restarts_and_spawned_ranks() -> None:
    def second_time_lucky() -> int:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt == 0:
            raise RuntimeError("first attempt")
        return attempt

    assert everyrank.launch(second_time_lucky, nproc_per_node=2, max_restarts=1) == [1, 1]
    assert everyrank.launch(os.getenv, "RANK", nproc_per_node=2, start_method="spawn") == ["0", "1"]


def test_unseeded_randomness_differs_between_ranks_and_calls() -> None:
    def draws() -> tuple[float, float]:
        import random

        import numpy as np

        return random.random(), float(np.random.rand())

    drawn = [value for _ in range(2) for pair in everyrank.launch(draws) for value in pair]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nproc_per_node": 0}, "nproc_per_node=0 was set"),
        ({"nproc_per_node": "gpus"}, "Did you mean 'gpu'"),
        ({"start_method": "forkservr"}, "Did you mean 'forkserver'"),
    ],
)
def test_wrong_arguments_start_nothing(arguments: dict[str, object], message: str) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(everyrank.UserError, match=message):
        everyrank.launch(os.getpid, **arguments)  # type: ignore[arg-type]
    assert psutil.Process().children(recursive=True) == before


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(everyrank.UserError, match=f"port {port} of this machine is in use"):
            everyrank.launch(os.getpid, nproc_per_node=1, master_port=port)


def test_a_script_from_standard_input_needs_no_main_guard() -> None:
    """What a notebook does: functions that live in ``__main__`` and in no file."""
    script = """
        import everyrank
        def rank_squared():
            import os
            return int(os.environ["RANK"]) ** 2
        print(everyrank.launch(rank_squared, nproc_per_node=3))
        print("torch" in __import__("sys").modules)
    """
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(script),
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["[0, 1, 4]", "False"], done.stderr


def test_a_caller_that_is_told_to_stop_blames_no_rank(tmp_path: Path) -> None:
    """As by ``timeout 600 python train.py``: the ranks end because of it, and none of them has failed."""
    script = """
        import everyrank, pathlib, sys
        def waits(folder):
            import os, signal
            pathlib.Path(folder, os.environ["RANK"]).touch()
            signal.pause()
        try:
            everyrank.launch(waits, sys.argv[1])
        except everyrank.EveryrankError as error:
            print(type(error).__name__, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.Popen(command, env=cli_environment(), stdout=subprocess.PIPE, text=True)
    for rank in ("0", "1"):
        wait_for(tmp_path / rank)
    process.terminate()
    assert process.communicate(timeout=60)[0] == "EveryrankError the ranks were ended by SIGTERM\n"
