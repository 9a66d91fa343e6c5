"""Plans are text: what would run, with which variables and files, is told before anything starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.drivers.driver import LaunchRequest
from everyrank.drivers.legacy_launch import LegacyLaunchConfig, LegacyLaunchDriver
from everyrank.drivers.spawn import SpawnConfig, SpawnDriver
from everyrank.drivers.torchrun import TorchrunDriver
from everyrank.drivers.torchrun_config import TorchrunConfig
from everyrank.elastic import machine
from everyrank.errors import DriverError
from everyrank.program.command import read_program

REQUEST = LaunchRequest(config_file="/runs/r/config.yaml", config_text="a: 1\n", run_dir="/runs/r", cwd="/work")
WORKER = "-m everyrank.worker --config /runs/r/config.yaml"


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_standalone_torchrun() -> None:
    plan = TorchrunDriver(TorchrunConfig(nproc_per_node=4, max_restarts=2)).plan(REQUEST)
    assert " ".join(plan.command) == (f"torchrun --standalone --nnodes=1 --nproc-per-node=4 --max-restarts=2 {WORKER}")
    assert plan.env["OMP_NUM_THREADS"] == "1"
    assert plan.env["EVERYRANK_WATCH"] == "/runs/r/watch"
    assert set(plan.env) == {"OMP_NUM_THREADS", "EVERYRANK_WATCH", "TORCH_FR_BUFFER_SIZE"}
    unwatched = replace(REQUEST, watch=WatchConfig(enabled=False))
    assert TorchrunDriver(TorchrunConfig()).plan(unwatched).env == {"OMP_NUM_THREADS": "1"}
    assert plan.files == {"/runs/r/config.yaml": "a: 1\n"}
    assert plan.notices == ()
    assert plan.engine is not None
    assert plan.engine.rendezvous.backend == "loopback"
    assert "processes per node: 4" in plan.render()


def test_two_static_nodes_make_standalone_yield_with_a_notice() -> None:
    config = TorchrunConfig(nproc_per_node=8, nnodes=2, node_rank=1, master_addr="node0", master_port=29500)
    plan = TorchrunDriver(config).plan(REQUEST)
    assert " ".join(plan.command) == (
        "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=0 --node-rank=1 --master-addr=node0 "
        f"--master-port=29500 {WORKER}"
    )
    assert plan.notices[0].startswith("driver.standalone yields because there are up to 2 nodes")
    assert "node0:29500" in plan.render()


def test_elastic_nodes_meet_at_the_endpoint() -> None:
    config = TorchrunConfig(
        nproc_per_node=1, min_nodes=1, max_nodes=3, rdzv_backend="c10d", rdzv_endpoint="node0:29500", rdzv_id="my_job"
    )
    plan = TorchrunDriver(config).plan(REQUEST)
    assert "--nnodes=1:3" in plan.command
    assert "--rdzv-endpoint=node0:29500" in plan.command
    assert "--rdzv-id=my_job" in plan.command
    assert plan.engine is not None
    assert (plan.engine.min_nodes, plan.engine.max_nodes, plan.engine.rendezvous.run_id) == (1, 3, "my_job")


def test_programs() -> None:
    script = TorchrunDriver(TorchrunConfig()).plan(_with_program("train.py", "--epochs", "3"))
    assert script.command[-3:] == ("train.py", "--epochs", "3")
    assert "--no-python" not in script.command
    module = TorchrunDriver(TorchrunConfig()).plan(_with_program("-m", "package.module", "-x"))
    assert module.command[-3:] == ("-m", "package.module", "-x")
    program = TorchrunDriver(TorchrunConfig()).plan(_with_program("./train.py", no_python=True))
    assert program.command[-2:] == ("--no-python", "./train.py")
    for plan in (script, module, program):
        assert plan.engine is not None
        assert plan.engine.entry == "everyrank.worker:run_rank"


@pytest.mark.parametrize("option", ["--local-rank", "--local_rank"])
def test_the_legacy_launcher_passes_the_local_rank_to_scripts_that_take_it(tmp_path: Path, option: str) -> None:
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text(f"parser.add_argument('{option}', type=int)\n")
    new.write_text("import os\nos.environ['LOCAL_RANK']\n")
    assert _with_program(str(old)).program.local_rank_option == option  # type: ignore[union-attr]
    taking, reading = (LegacyLaunchDriver(LegacyLaunchConfig()).plan(_with_program(str(s))) for s in (old, new))
    assert "--use-env" not in taking.command
    assert "--use-env" in reading.command
    told = LegacyLaunchDriver(LegacyLaunchConfig(use_env=False)).plan(_with_program(str(new)))
    assert "--use-env" not in told.command


def _with_program(*words: str, no_python: bool = False) -> LaunchRequest:
    program = read_program(words, no_python=no_python)
    return LaunchRequest(config_file="/r/c.yaml", config_text="", run_dir="/r", cwd="/", program=program)


def test_legacy_launch_and_spawn() -> None:
    plan = LegacyLaunchDriver(LegacyLaunchConfig(nproc_per_node=2)).plan(REQUEST)
    assert " ".join(plan.command[1:]).startswith(
        "-m everyrank.elastic.legacy_launcher --rdzv-endpoint=127.0.0.1:0 --nproc-per-node=2"
    )
    assert " ".join(plan.command).endswith(WORKER)
    plan = LegacyLaunchDriver(LegacyLaunchConfig(use_env=True, master_port=4242)).plan(REQUEST)
    assert {"--use-env", "--rdzv-endpoint=127.0.0.1:4242"} <= set(plan.command)
    assert "each a fresh interpreter" in SpawnDriver(SpawnConfig(nproc_per_node=3)).plan(REQUEST).render()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc_per_node": 0}, "driver.nproc_per_node=0 was set"),
        ({"nproc_per_node": "gpus"}, "Did you mean 'gpu'"),
        ({"nproc_per_node": "gpu"}, "no GPU is visible"),
        ({"nnodes": 2, "node_rank": 2}, "node ranks run from 0 to 1"),
        ({"min_nodes": 3, "max_nodes": 2}, "driver.min_nodes=3 is larger than driver.max_nodes=2"),
        ({"nnodes": 2}, "Every node must name node 0"),
        ({"min_nodes": 1, "max_nodes": 3}, "driver.rdzv_endpoint is not set"),
        ({"rdzv_backend": "c10", "rdzv_endpoint": "a:1"}, "Did you mean 'c10d'"),
        ({"start_method": "forks"}, "Did you mean 'fork'"),
        ({"master_port": 70000}, "a port lies between 1 and 65535"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DriverError, match=message):
        TorchrunDriver(TorchrunConfig(**settings)).plan(REQUEST)  # type: ignore[arg-type]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: 2)
    with pytest.raises(DriverError, match=r"driver\.nproc_per_node=4 was set, but 2 GPUs are visible"):
        TorchrunDriver(TorchrunConfig(nproc_per_node=4)).plan(REQUEST)
    assert TorchrunDriver(TorchrunConfig(nproc_per_node="auto")).plan(REQUEST).nproc_per_node == 2
    on_cpu = LaunchRequest(config_file="c", config_text="", run_dir="r", cwd="/", device="cpu")
    assert TorchrunDriver(TorchrunConfig(nproc_per_node=4)).plan(on_cpu).nproc_per_node == 4


def test_the_shell_decides_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "6")
    assert "OMP_NUM_THREADS" not in TorchrunDriver(TorchrunConfig(threads_per_rank=3)).plan(REQUEST).env
