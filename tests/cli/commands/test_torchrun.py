"""``everyrank torchrun``: every flag of the installed torch's torchrun is honoured, or refused with the reason."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conftest import RunCli, cli_environment
from everyrank.cli.commands.torchrun import torchrun_parser, translate
from everyrank.errors import ConfigError

TORCHRUN = (sys.executable, "-m", "everyrank", "torchrun")


def settings(*argv: str) -> tuple[dict[str, str], list[str]]:
    words = translate(argv)
    at = words.index("--")
    overrides = OverridesParser.create().parse_overrides(words[:at])
    return {override.key_or_group: override.value() for override in overrides}, words[at + 1 :]


def test_flags_mean_what_they_mean_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    found, program = settings("train.py", "--nnodes=3", "a=b", "--", "-n")
    alone = {"driver": "torchrun", "driver.nproc_per_node": 1, "driver.threads_per_rank": 0}
    assert found == {**alone, "driver.nnodes": 1}
    assert program == ["train.py", "--nnodes=3", "a=b", "--", "-n"]
    found, program = settings("--nproc_per_node", "4", "--max-restarts", "2", "-m", "package.train", "x")
    assert (found["driver.nproc_per_node"], found["driver.max_restarts"]) == (4, 2)
    assert program == ["-m", "package.train", "x"]
    static, _ = settings("--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=4", "train.py")
    assert static["driver.nnodes"] == 2
    assert (static["driver.node_rank"], static["driver.master_addr"]) == (1, "node0")
    assert static["driver.master_port"] == 4
    elastic, _ = settings("--nnodes=1:3", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:5", "--rdzv-id=job", "train.py")
    assert (elastic["driver.min_nodes"], elastic["driver.max_nodes"]) == (1, 3)
    assert (elastic["driver.rdzv_endpoint"], elastic["driver.rdzv_id"]) == ("node0:5", "job")
    assert settings("--standalone", "--rdzv-endpoint=ignored:1", "train.py")[0] == alone
    assert settings("-r", "3", "train.py")[0]["run.show"] == "failed"
    assert settings("--local-ranks-filter=0", "-t3", "train.py")[0]["run.show"] == "main"
    assert settings("--no-python", "./program")[0]["app.no_python"] is True
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert settings("train.py")[0]["driver.nproc_per_node"] == 3


def test_waits_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*flags: str) -> tuple[float | None, float | None]:
        found, _ = settings(*flags, "train.py")
        return found.get("driver.rdzv_timeout_s"), found.get("driver.rdzv_last_call_s")

    elastic = ("--nnodes=1:3", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:5")
    assert waits("--nnodes=2", "--master-addr=node0") == (900, None)
    assert waits("--nnodes=2", "--master-addr=node0", "--rdzv-conf=timeout=7") == (7, None)
    assert waits(*elastic) == (600, 30)
    assert waits(*elastic, "--rdzv-conf='join_timeout=5,last_call_timeout=1,timeout=9'") == (5, 1)
    monkeypatch.setenv("PET_RDZV_CONF", "join_timeout=8")
    assert waits(*elastic) == (8, 30)


def test_text_stays_text_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("42", "0042", "1e3", "true", "null", "a,b", "[x]", "a b", "it's", "C:\\", "${HOME}", "größer"):
        found, _ = settings(f"--role={text}", f"--rdzv-id={text}", "--nnodes=1:2", "--rdzv-endpoint=a:1", "train.py")
        said = OmegaConf.to_container(OmegaConf.create([found["driver.role"], found["driver.rdzv_id"]]), resolve=True)
        assert said == [text, text]
    monkeypatch.setenv("PET_MONITOR_INTERVAL", "3")
    monkeypatch.setenv("PET_VIRTUAL_LOCAL_RANK", "0")
    assert settings("train.py")[0]["driver.monitor_interval"] == 3
    monkeypatch.setenv("PET_LOCAL_ADDR", "node7")
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(ConfigError, match="--local-addr was given"):
        translate(["train.py"])


def test_the_parser_is_the_installed_torchruns_and_imports_no_torch() -> None:
    from torch.distributed.run import get_args_parser

    ours, theirs = torchrun_parser(), get_args_parser()
    assert ours.format_help() == theirs.format_help()
    flags = ["--standalone", "-t=3", "--numa-binding=node", "train.py", "--lr", "1"]
    assert vars(ours.parse_args(flags)) == vars(theirs.parse_args(flags))
    code = (
        "import sys; from everyrank.cli.commands.torchrun import translate\n"
        "translate(['--nnodes=2', 'train.py']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        (["--rdzv-conf=keep_alive_interval=1", "--nnodes=2", "train.py"], "silent for 4 s has gone"),
        (["--rdzv-conf=timeout=soon", "--nnodes=2", "train.py"], "in whole seconds"),
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
    assert found["driver.nproc_per_node"] == 2
    assert found["run.show"] == "main"
    assert settings("driver.nproc_per_node=2", "train.py")[0]["driver.nproc_per_node"] == 2


SAYS = """\
import json, os, sys
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if "once" in sys.argv and attempt == "0":
    if rank == "1":
        raise ValueError("once")
    import time
    time.sleep(60)
names = ["RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
names += ["GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_MAX_RESTARTS"]
names += ["TORCHELASTIC_USE_AGENT_STORE", *(["TORCHELASTIC_RUN_ID"] if "id" in sys.argv else [])]
said = {name: os.environ.get(name) for name in names}
said.update(attempt=attempt, argv=sys.argv, name=__name__, path=sys.path[0], cwd=os.getcwd())
sys.stdout.write(json.dumps(said, sort_keys=True) + "\\n")  # at once: print() writes the end of a line by itself
sys.exit(3 if "fails" in sys.argv else 0)
"""
FLAGS = {
    "restarts": "--standalone --nproc-per-node=2 --max-restarts=1 --role=trainer --monitor-interval=0.2 "
    "says.py once a=b +x=1 -h '' --nnodes=7 'größer ${x}'",
    "c10d": "--nnodes=1:1 --nproc_per_node 2 --rdzv_backend=c10d --rdzv_endpoint localhost:0 --rdzv-id=0042 --role=7 "
    "--logs-specs=default --local-addr=127.0.0.1 --shutdown-timeout=5 -m package.says id --multirun",
    "executable": "--standalone --nproc-per-node=2 --no-python -r3 -t 3 --log-dir=2026 ./says.sh x",
    "static": "--nnodes=1 --node-rank=0 --master-addr=127.0.0.1 --master-port={port} --run-path "
    "--start-method=spawn --signals-to-handle=SIGTERM,SIGINT says.py fails",
    "quiet": "--standalone --nproc-per-node=2 --redirects=3 says.py",
    "main": "--standalone --nproc-per-node=2 --local-ranks-filter=0 --tee=3 says.py",
}


@pytest.mark.parametrize("name", FLAGS)
def test_in_place_of_torchrun_nothing_changes(run_cli: RunCli, tmp_path: Path, free_port: int, name: str) -> None:
    """Exit code, variables, arguments and output of the ranks, beside the installed torchrun."""
    (tmp_path / "package").mkdir()
    for folder in (tmp_path, tmp_path / "package"):
        (folder / "says.py").write_text(SAYS)
    (tmp_path / "says.sh").write_text(f'#!/bin/sh\nexec {sys.executable} says.py "$@"\n')
    (tmp_path / "says.sh").chmod(0o755)
    flags = shlex.split(FLAGS[name].replace("{port}", str(free_port)))
    folder = {"TMPDIR": str(tmp_path)}  # where torchrun leaves one of its own
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}/${rank}: "}
    bare = run_cli(*flags, program=(sys.executable, "-m", "torch.distributed.run"), env=folder | env)
    done = run_cli(*flags, program=TORCHRUN, env=env)
    assert done.returncode == bare.returncode == (1 if name == "static" else 0), done.stderr + bare.stderr
    expected = sorted(re.findall(r"\{.*\}", bare.stdout))  # a line may be marked by its rank
    assert sorted(re.findall(r"\{.*\}", done.stdout)) == expected
    assert len(expected) == {"static": 1, "quiet": 0, "main": 1}.get(name, 2)
    if "-t 3" in FLAGS[name]:
        marked = sorted(re.findall(r"^default/.: \{.*\}", bare.stdout, re.MULTILINE))
        assert sorted(re.findall(r"^default/.: \{.*\}", done.stdout, re.MULTILINE)) == marked
        assert len(marked) == 2
    if name == "restarts":
        assert "notice: rank 1 failed: ValueError: once" in done.stderr
        assert "all ranks start again (restart 1)" in done.stderr


def test_nodes_that_come_within_the_last_call_start_together(tmp_path: Path, free_port: int) -> None:
    """As with torchrun: the first of 1:2 nodes waits for the second before its ranks start."""
    (tmp_path / "says.py").write_text("import os\nprint(os.environ['WORLD_SIZE'], os.environ['TORCHELASTIC_RUN_ID'])\n")
    flags = ("--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port}", "--rdzv-id=7", "says.py")
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *flags],
            cwd=tmp_path,
            env=cli_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=100) for node in nodes]
    assert [(node.returncode, stdout) for node, (stdout, _) in zip(nodes, outputs, strict=True)] == [
        (0, "2 7\n")
    ] * 2, outputs
