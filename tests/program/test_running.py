"""A user's own script under every launcher: what it sees is what it sees by ``python train.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunCli, cli_environment
from everyrank.launch_env.guard import STARTUP

TEN_LINES = """\
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
loss = model(torch.full((2, 4), float(dist.get_rank()))).pow(2).mean()
loss.backward()
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: total {total.item()}", flush=True)
grad = model.module.weight.grad.sum().item()
print(f"gradient {grad:.6f} met at {os.environ['MASTER_ADDR']}", flush=True)
dist.destroy_process_group()
"""
# What a program can see of how it was started, and what a child that multiprocessing spawns sees of it.
LOOKS = """\
import json, multiprocessing, os, sys
from helper import VALUE

class Mine:
    pass

def in_child(mine):
    return [type(mine).__module__, sys.argv[1:], os.path.basename(sys.modules["__main__"].__file__)]

if __name__ == "__main__":
    import pickle
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.apply(in_child, [Mine()])
    main = sys.modules["__main__"]
    looks = {
        "argv": sys.argv, "file": __file__, "name": __name__, "path": sys.path, "cwd": os.getcwd(), "helper": VALUE,
        "spec": getattr(__spec__, "name", None), "package": __package__, "main": main.__dict__ is globals(),
        "pickled": pickle.loads(pickle.dumps(Mine())).__class__ is Mine, "child": child, "doc": __doc__,
        "pythonpath": os.environ.get("PYTHONPATH"), "loader": type(__loader__).__name__,
        "orig_argv": sys.orig_argv[-len(sys.argv):], "annotations": __annotations__,
    }
    with open(f"looks-{os.environ.get('RANK', 'plain')}.json", "w") as file:
        json.dump(looks, file)
    sys.exit(int(sys.argv[1]))
"""
DRIVERS = ["driver=torchrun", "driver=spawn", "driver=launch", pytest.param("driver=mpi", marks=pytest.mark.cluster)]


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_plain_script_does_its_work_on_both_ranks(run_cli: RunCli, tmp_path: Path, driver: str) -> None:
    (tmp_path / "train.py").write_text(TEN_LINES)
    done = run_cli(driver, "-n", "2", "--", "train.py")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert sorted(line for line in printed if line.startswith("rank")) == [
        "rank 0 of 2: total 3.0",
        "rank 1 of 2: total 3.0",
    ]
    gradients = [line for line in printed if line.startswith("gradient")]
    assert len(gradients) == 2
    assert len(set(gradients)) == 1
    assert "met at 127.0.0.1" in gradients[0]
    for rank in (0, 1):
        log = next(tmp_path.glob(f"outputs/train-*/logs/rank-{rank}.log")).read_text()
        assert f"rank {rank} of 2: total 3.0\n" in log


@pytest.mark.parametrize("driver", ["driver=local", *DRIVERS])
@pytest.mark.parametrize("command", [["looks.py"], ["-m", "package.looks"]], ids=["script", "module"])
def test_a_program_sees_what_python_alone_shows(
    run_cli: RunCli, tmp_path: Path, driver: str, command: list[str]
) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "looks.py").write_text(LOOKS)
    (tmp_path / "helper.py").write_text("VALUE = 42\n")
    arguments = [*command, "3", "--lr=0.1", "a b", "${x", "???", "key=[1", "--", "-n"]
    plain = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=cli_environment(), check=False)
    assert plain.returncode == 3
    expected = json.loads((tmp_path / "looks-plain.json").read_text())
    done = run_cli(driver, *([] if driver == "driver=local" else ["-n", "2"]), "--", *arguments)
    ranks = ["plain"] if driver == "driver=local" else ["0", "1"]
    for rank in ranks:
        found = json.loads((tmp_path / f"looks-{rank}.json").read_text())
        # The folder of our sitecustomize, where the rank is a Python of its own: for the Pythons that it starts.
        found["pythonpath"] = found["pythonpath"].removeprefix(f"{STARTUP}{os.pathsep}")
        assert found == expected
    assert done.returncode == (3 if driver == "driver=local" else 1)


def test_other_programs_are_executed(run_cli: RunCli, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "rank $RANK of $WORLD_SIZE at $MASTER_ADDR: $1"; yes | head -n 1\n')
    program.chmod(0o755)
    for driver in ("driver=torchrun", "driver=spawn"):
        done = run_cli(driver, "--", "./program", "a=b")
        assert done.returncode == 0, done.stderr
        expected = [*(f"rank {rank} of 2 at 127.0.0.1: a=b" for rank in (0, 1)), "y", "y"]
        assert sorted(done.stdout.splitlines()) == expected
        assert "Broken pipe" not in done.stderr


def test_the_first_line_of_a_failure_is_the_programs_own(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import os, sys\nprint('before', flush=True)\n\n\ndef inner():\n    raise ValueError('mine')\n\n\n"
        "if os.environ['RANK'] == '1':\n    inner()\n"
    )
    done = run_cli("-n", "2", "--", "fails.py")
    assert done.returncode == 1
    assert "error: rank 1 of 2 failed: ValueError: mine" in done.stderr
    assert done.stderr.count("ValueError: mine\n") == 2  # the end of the traceback, and the verdict
    traceback = done.stderr[done.stderr.index("Traceback") :]
    assert traceback.splitlines()[1] == f'  File "{tmp_path}/fails.py", line 10, in <module>'
    log = next(tmp_path.glob("outputs/fails-*/logs/rank-1.log")).read_text()
    assert log.startswith("before\nTraceback")


def test_a_children_s_output_and_a_killed_ranks_last_words_are_in_the_log(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, signal, subprocess\nsubprocess.run(['echo', 'from a child'])\nos.write(1, b'last words')\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_cli("-n", "2", "--", "dies.py")
    assert "error: rank 1 of 2 failed: killed by SIGKILL" in done.stderr
    log = next(tmp_path.glob("outputs/dies-*/logs/rank-1.log")).read_text()
    assert log == "from a child\nlast words"
    assert done.stdout.count("from a child") == 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["run.prefix=rank"], ["[rank 0] one", "[rank 0] two", "[rank 1] one", "[rank 1] two"]),
        (["run.show=main"], ["one", "two"]),
        (["run.show=failed"], []),
        ([], ["one", "one", "two", "two"]),
    ],
)
def test_output_is_shown_as_it_was_asked_for(
    run_cli: RunCli, tmp_path: Path, settings: list[str], expected: list[str]
) -> None:
    (tmp_path / "prints.py").write_text("print('one')\nprint('two')\n")
    done = run_cli("-n2", *settings, "--", "prints.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == expected
    for rank in (0, 1):
        assert next(tmp_path.glob(f"outputs/*/logs/rank-{rank}.log")).read_text() == "one\ntwo\n"


def test_what_failed_ranks_printed_is_shown_at_the_end(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import os, sys\nprint('word of', os.environ['RANK'])\nsys.exit(int(os.environ['RANK']))\n"
    )
    done = run_cli("-n", "2", "run.show=failed", "--", "fails.py")
    assert done.returncode == 1
    assert "[rank 1] word of 1" in done.stderr
    assert "word of 0" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "trian.py"], "there is no such file in {folder}. Did you mean 'train.py'?"),
        (["--", "wrong.py"], "wrong.py was to be run, but it does not parse: line 2: "),
        (["--", "./program"], "it is not executable. Fix: chmod +x ./program"),
        (["--", "-m", "no_module.here"], "this Python finds no module no_module.here"),
        (["--", "-m"], "-m was given without a module"),
        (["--", "no-such-program"], "no such program on the PATH"),
        (["--"], "-- was given without a program. Fix:"),
        (["train.py"], "Fix: put -- before a program: everyrank run -- train.py"),
        (["app=hello_dist", "--", "train.py"], "app=hello_dist was set together with a program"),
        (["-n", "0", "--", "train.py"], "-n 0 was given; it is the number of ranks"),
        (["-n", "2", "driver=local", "--", "train.py"], "-n 2 was given together with driver=local"),
        (["-n", "2", "driver.nproc_per_node=3", "--", "train.py"], "together with driver.nproc_per_node=3"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(
    run_cli: RunCli, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('started')\n")
    (tmp_path / "wrong.py").write_text("x = 1\ndef (:\n")
    (tmp_path / "program").write_text("#!/bin/sh\n")
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message.format(folder=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_ctrl_c_ends_a_script_and_leaves_nothing(
    start_cli: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "waits.py").write_text(
        "import os, time\nopen(f\"up-{os.environ['RANK']}\", 'w').close()\nwhile True:\n    time.sleep(0.1)\n"
    )
    process = start_cli("-n", "2", "--", "waits.py")
    from waiting import wait_for

    for rank in (0, 1):
        wait_for(tmp_path / f"up-{rank}")
    os.killpg(process.pid, 2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.count("KeyboardInterrupt") == 0, output
