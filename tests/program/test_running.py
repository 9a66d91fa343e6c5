"""A user's own program: what it sees, prints and ends with is what it does under ``python train.py``."""

from __future__ import annotations

import functools
import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm_start import Started

from conftest import RunCli, cli_environment, nightly
from everyrank.launch_env.guard import STARTUP

# What a program can see of how it was started, and what a child that multiprocessing spawns sees of it.
LOOKS = """\
import json, multiprocessing, os, sys, time
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
    rank, size = os.environ.get("RANK", "plain"), int(os.environ.get("WORLD_SIZE", "1"))
    with open(f"looks-{rank}.part", "w") as file:
        json.dump(looks, file)
    os.rename(f"looks-{rank}.part", f"looks-{rank}.json")
    for other in range(size if size > 1 else 0):  # the first to leave with an error takes the others with it
        for _ in range(600):
            if os.path.exists(f"looks-{other}.json"):
                break
            time.sleep(0.1)
    sys.exit(int(sys.argv[1]))
"""
# What people's programs are made of: their own Hydra, torch's @record, loader workers that import __main__ again.
MADE_OF = """import argparse, os, sys
import hydra
import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([index**2, os.path.basename(sys.modules["__main__"].__file__) == "made_of.py"])

@record
@hydra.main(version_base=None)
def main(cfg):
    loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    print("made of", cfg.lr, os.getcwd(), next(iter(loader)).tolist(), flush=True)
    if cfg.fails:
        raise ValueError("mine")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    known, sys.argv[1:] = parser.parse_known_args()
    print("argparse has", known.device, flush=True)
    main()
"""
# Ends that python answers with something of its own.
ENDS = """import atexit, os, sys, threading
atexit.register(print, "atexit was run", flush=True)
end = sys.argv[1]
if end != "at once":
    threading.Thread(target=lambda: print("a thread was waited for", flush=True)).start()
if end == "text":
    sys.exit("the last word")
if end == "nothing":
    sys.exit(None)
if end == "at once":
    os._exit(7)
if end == "raises":
    raise ValueError("mine") from KeyError("cause")
if end == "base":
    raise BaseExceptionGroup("several", [ValueError("one"), SystemExit(2)])
if end == "hook":
    sys.excepthook = lambda *of: print("hooked", of[0].__name__, file=sys.stderr)
    raise ValueError("mine")
"""
# Nothing here is closed. Python writes it all down when it takes itself apart.
OPEN = """import ctypes, gzip, helper, io, os, zipfile

class Log:
    def __init__(self):
        self.file, self.itself = open("log", "w"), self
        self.file.write("a line")

class Backwards(io.RawIOBase):
    def __init__(self):
        self.fd = os.open("backwards", os.O_CREAT | os.O_WRONLY)
    def writable(self):
        return True
    def write(self, data, put=os.write):
        return put(self.fd, bytes(data)[::-1])

text, raw, both = open("text", "w"), open("raw", "wb"), open("both", "w+b")
print("a line", file=text)
raw.write(b"a line")
both.write(b"a line")
log = Log()
packed = gzip.open("packed", "wt")
packed.write("a line")
helper.kept = gzip.open("kept", "wt")
helper.kept.write("a line")
archive = zipfile.ZipFile("archive", "w")
archive.writestr("name", "a line")
backwards = io.BufferedWriter(Backwards())
backwards.write(b"a line")
class Ends:
    def __init__(self, word):
        self.word = word
    def __del__(self, write=os.write):
        write(1, self.word)

first = Ends(b"one that was held ended\\n")
second = Ends(b"one that held itself ended\\n")
second.itself = second
ctypes.CDLL(None).printf(b"a line of C\\n")
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Programs run by python alone."""
    folder = tmp_path_factory.mktemp("plain")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        write_programs(folder)
        command = [sys.executable, *arguments]
        env = cli_environment() | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False)

    return Plain(folder, functools.cache(run))


@dataclass(frozen=True)
class Plain:
    """Where programs are run by python alone, and how: once for the same arguments."""

    folder: Path
    run: Callable[..., subprocess.CompletedProcess[str]]


def write_programs(folder: Path) -> None:
    package = folder / "package"
    package.mkdir(exist_ok=True)
    for place in (folder, package):
        (place / "looks.py").write_text(LOOKS)
    (folder / "helper.py").write_text("VALUE = 42\n")
    (folder / "made_of.py").write_text(MADE_OF)
    (folder / "ends.py").write_text(ENDS)
    (folder / "open.py").write_text(OPEN)


@pytest.mark.parametrize(
    ("driver", "command"),
    [
        *((driver, ("looks.py",)) for driver in ("local", "torchrun", "spawn")),
        nightly("launch", ("looks.py",)),
        pytest.param("mpi", ("looks.py",), marks=pytest.mark.cluster),
        *((driver, ("-m", "package.looks")) for driver in ("local", "torchrun")),
    ],
)
def test_a_program_sees_what_python_alone_shows(
    run_cli: RunCli, tmp_path: Path, plain: Plain, driver: str, command: tuple[str, ...]
) -> None:
    write_programs(tmp_path)
    arguments = (*command, "3", "--lr=0.1", "a b", "${x", "???", "key=[1", "--", "-n", "")
    assert plain.run(*arguments).returncode == 3
    expected = (plain.folder / "looks-plain.json").read_text().replace(str(plain.folder), str(tmp_path))
    done = run_cli(f"driver={driver}", *([] if driver == "local" else ["-n", "2"]), "--", *arguments)
    for rank in ["plain"] if driver == "local" else ["0", "1"]:
        found = json.loads((tmp_path / f"looks-{rank}.json").read_text())
        # The folder of our sitecustomize, where the rank is a Python of its own: for the Pythons that it starts.
        found["pythonpath"] = found["pythonpath"].removeprefix(f"{STARTUP}{os.pathsep}")
        assert found == json.loads(expected)
    assert done.returncode == (3 if driver == "local" else 1)


@pytest.mark.nightly  # by day what spawned ranks see, above, and their script's names: tests/config/test_yaml_loader.py
@pytest.mark.parametrize(("driver", "fails"), [("local", True), ("torchrun", False)])
def test_a_programs_own_hydra_record_and_loader_workers(
    run_cli: RunCli, tmp_path: Path, plain: Plain, driver: str, fails: bool
) -> None:
    write_programs(tmp_path)
    order = ("made_of.py", "--device", "cuda:0", "+lr=0.1", f"+fails={fails}", "hydra.run.dir=mine")
    alone = plain.run(*order)
    assert alone.returncode == int(fails)
    done = run_cli(f"driver={driver}", "--", *order)
    assert done.returncode == alone.returncode, done.stderr
    ranks = 1 if driver == "local" else 2
    expected = alone.stdout.replace(str(plain.folder), str(tmp_path)).splitlines()
    assert len(expected) == 2
    assert sorted(done.stdout.splitlines()) == sorted(expected * ranks)
    assert (tmp_path / "mine").is_dir()
    if fails:
        assert "ValueError: mine" in done.stderr


@pytest.mark.parametrize("end", ["falls off", "text", "nothing", "at once", "raises", "base", "hook"])
def test_a_program_ends_as_under_python_alone(run_cli: RunCli, tmp_path: Path, plain: Plain, end: str) -> None:
    write_programs(tmp_path)
    alone = plain.run("ends.py", end)
    done = run_cli("driver=local", "--", "ends.py", end)
    assert done.returncode == alone.returncode
    assert sorted(done.stdout.splitlines()) == sorted(alone.stdout.splitlines())
    assert done.stderr.endswith(alone.stderr.replace(str(plain.folder), str(tmp_path)))


@pytest.mark.parametrize("driver", ["torchrun", "spawn", pytest.param("mpi", marks=pytest.mark.cluster)])
def test_what_a_program_left_in_buffers_is_written(run_cli: RunCli, tmp_path: Path, plain: Plain, driver: str) -> None:
    write_programs(tmp_path)
    alone = plain.run("open.py")
    assert len(alone.stdout.splitlines()) == 3
    done = run_cli(f"driver={driver}", "-n", "1", "--", "open.py")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(alone.stdout.splitlines())
    for folder in (plain.folder, tmp_path):
        found = {name: (folder / name).read_text() for name in ("text", "raw", "both", "log", "backwards")}
        assert found == {"text": "a line\n", "backwards": "enil a"} | dict.fromkeys(("raw", "both", "log"), "a line")
        for name in ("packed", "kept"):
            assert gzip.decompress((folder / name).read_bytes()) == b"a line"
        assert zipfile.ZipFile(folder / "archive").read("name") == b"a line"


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


def test_ctrl_c_ends_a_script_and_leaves_nothing(start_cli: Callable[..., Started], tmp_path: Path) -> None:
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
