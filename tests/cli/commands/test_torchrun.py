"""``everyrank torchrun``: every flag of the installed torch's torchrun is honoured, or refused with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conftest import RunCli
from everyrank.cli.commands.torchrun import translate
from everyrank.errors import ConfigError

TORCHRUN = (sys.executable, "-m", "everyrank", "torchrun")


def settings(*argv: str) -> tuple[dict[str, str], list[str]]:
    words = translate(argv)
    at = words.index("--")
    return dict(word.split("=", 1) for word in words[:at]), words[at + 1 :]


def test_flags_mean_what_they_mean_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    found, program = settings("train.py", "--nnodes=3", "a=b", "--", "-n")
    assert found == {"driver": "torchrun", "driver.nproc_per_node": "1", "driver.nnodes": "1"}
    assert program == ["train.py", "--nnodes=3", "a=b", "--", "-n"]
    found, program = settings("--nproc_per_node", "4", "--max-restarts", "2", "-m", "package.train", "x")
    assert (found["driver.nproc_per_node"], found["driver.max_restarts"]) == ("4", "2")
    assert program == ["-m", "package.train", "x"]
    static, _ = settings("--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=4", "train.py")
    assert static["driver.nnodes"] == "2"
    assert (static["driver.node_rank"], static["driver.master_addr"]) == ("1", "node0")
    assert static["driver.master_port"] == "4"
    elastic, _ = settings("--nnodes=1:3", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:5", "--rdzv-id=job", "train.py")
    assert (elastic["driver.min_nodes"], elastic["driver.max_nodes"]) == ("1", "3")
    assert (elastic["driver.rdzv_endpoint"], elastic["driver.rdzv_id"]) == ("node0:5", "job")
    assert settings("--standalone", "--rdzv-endpoint=ignored:1", "train.py")[0].keys() == {
        "driver",
        "driver.nproc_per_node",
    }
    assert settings("-r", "3", "train.py")[0]["run.show"] == "failed"
    assert settings("--local-ranks-filter=0", "-t3", "train.py")[0]["run.show"] == "main"
    assert settings("--no-python", "./program")[0]["app.no_python"] == "true"
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert settings("train.py")[0]["driver.nproc_per_node"] == "3"


def test_no_flag_of_the_installed_torchrun_is_passed_over() -> None:
    """A flag that a newer torch adds must be looked at: this test then fails."""
    from torch.distributed.run import get_args_parser

    known = {
        *("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "standalone"),
        *("max_restarts", "monitor_interval", "start_method", "event_log_handler", "role", "module", "no_python"),
        *("run_path", "log_dir", "redirects", "tee", "local_ranks_filter", "duplicate_stdout_filters"),
        *("duplicate_stderr_filters", "node_rank", "master_addr", "master_port", "local_addr", "logs_specs"),
        *("numa_binding", "signals_to_handle", "shutdown_timeout", "virtual_local_rank"),
        *("training_script", "training_script_args"),
    }
    assert set(vars(get_args_parser().parse_args(["train.py"]))) == known


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nproc-per-node=2", "driver.nproc_per_node=3", "train.py"], "the flags of torchrun say"),
        (["--nnodes=1:2", "--rdzv-endpoint=a:1", "driver.max_nodes=3", "train.py"], "driver.max_nodes=3 was set"),
        (["driver=spawn", "train.py"], "driver=spawn was set, but the flags of torchrun say driver=torchrun"),
        (["--virtual-local-rank", "train.py"], "--virtual-local-rank was given, but everyrank cannot honour it"),
        (["--numa-binding=node", "train.py"], "numactl"),
        (["--logs-specs=mine", "train.py"], "run.show"),
        (["--redirects=0:1", "train.py"], "both streams of every rank"),
        (["--tee=1", "train.py"], "everyrank takes 3"),
        (["--local-ranks-filter=1,2", "train.py"], "run.show=main"),
        (["--rdzv-conf=last_call_timeout=1", "--nnodes=2", "train.py"], "has no such setting"),
        (["--signals-to-handle=SIGTERM,SIGWINCH", "train.py"], "not SIGWINCH"),
        (["--no-python", "-m", "train"], "--no-python and --module were both given"),
        (["--nnodes=two", "train.py"], "it is a number of nodes, or MIN:MAX"),
    ],
)
def test_what_cannot_be_honoured_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(argv)


def test_a_key_that_says_the_same_or_something_else_stands_beside_the_flags() -> None:
    found, _ = settings("--nproc-per-node=2", "driver.nproc_per_node=2", "run.show=main", "train.py")
    assert found["driver.nproc_per_node"] == "2"
    assert found["run.show"] == "main"
    assert settings("driver.nproc_per_node=2", "train.py")[0]["driver.nproc_per_node"] == "2"


def test_a_group_that_fails_once_is_started_again_as_by_torchrun(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys, torch.distributed as dist\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\n"
        "def main():\n"
        "    dist.init_process_group('gloo')\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "        raise ValueError('once')\n"
        "    dist.barrier()\n"
        "    print('rank', dist.get_rank(), 'after', os.environ['TORCHELASTIC_RESTART_COUNT'], sys.argv[1:])\n"
        "    dist.destroy_process_group()\n"
        "main()\n"
    )
    done = run_cli("--nproc-per-node=2", "--max-restarts=1", "train.py", "--x", program=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 after 1 ['--x']", "rank 1 after 1 ['--x']"]
    assert "notice: rank 1 failed: ValueError: once" in done.stderr
    assert "all ranks start again (restart 1)" in done.stderr
