"""Provokes each symptom of the troubleshooting page and returns what a person then reads."""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler, TensorDataset
from waiting import WAITS, rank_pids, wait_gone

import everyrank
from conftest import RunCli
from everyrank import TrainerDDP
from everyrank.errors import RankFailedError, UserError
from everyrank.launch_env.process_environment import ProcessEnvironment
from everyrank.runtime.device import bind_device

_SAID: dict[str, str] = {}  # by the runs that several entries look at
_ROWS: dict[int, list[dict[str, Any]]] = {}  # history of the same training at several world sizes


class Provoker:
    """Carries out the provocations in a folder of their own; each method is an entry of the page, ``-`` as ``_``."""

    def __init__(self, folder: Path, run_cli: RunCli, start_cli: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self._run_cli, self._start_cli = run_cli, start_cli

    def run(self, *args: str, code: int, traced: bool = True, **variables: str) -> str:
        done = self._run_cli(*args, env=variables)
        assert done.returncode == code, done.stdout + done.stderr
        if code != 0 and traced:
            assert done.stderr.count("Traceback") == (code == 1), "a user's mistake is a message without traceback"
        return done.stdout + done.stderr

    def _script(self, end: str) -> str:
        """A plain script, which knows nothing of everyrank, whose rank 1 ends so, and whose rank 0 waits for it."""
        script = self.folder / "plain.py"
        lines = ("import os", "import torch", "import torch.distributed as dist", "dist.init_process_group('gloo')")
        ends = ("if dist.get_rank() == 1:", f"    {end}", "dist.all_reduce(torch.ones(1))")
        script.write_text("\n".join((*lines, *ends, "")))
        return str(script)

    # ---- one rank differs

    def one_rank_raised(self) -> str:
        if "raised" not in _SAID:
            end = "raise LookupError('the sample 1 is missing')"
            _SAID["raised"] = self.run("-n", "2", "--", self._script(end), code=1)
        return _SAID["raised"]

    def one_rank_is_missing(self) -> str:
        return _failure(_skip_the_barrier)

    def one_rank_was_killed(self) -> str:
        killed = self._script("os.kill(os.getpid(), 9)")
        return self.run("-n", "2", "--", killed, code=1, traced=False)

    def loss_is_nan(self) -> str:
        return _failure(_train, str(self.folder / "nan"), poison=True)

    def no_error_file(self) -> str:
        script = self.folder / "plain.py"
        script.write_text("import os\nif os.environ['RANK'] == '1': raise LookupError('the sample is missing')\n")
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        bare = self._run_cli(f"--log-dir={self.folder}/torchrun", str(script), program=torchrun)
        assert bare.returncode == 1
        return bare.stderr + self.one_rank_raised()

    # ---- starting

    def port_in_use(self) -> str:
        with _busy_port() as port:
            with pytest.raises(dist.DistNetworkError) as plain:
                dist.TCPStore("127.0.0.1", port, is_master=True)
            script = ("--", self._script("pass"))
            ours = self.run("driver=torchrun", f"driver.master_port={port}", *script, code=2)
        assert "All 2 processes completed successfully!" in self.one_folder_per_rank()
        return f"{plain.value}\n{ours}"

    def master_unreachable(self) -> str:
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return self.run("app=hello_dist", "distributed.timeout_s=2", code=2, **variables)

    def half_set_environment(self) -> str:
        return self.run("--", self._script("pass"), code=2, RANK="0")

    def world_size_contradiction(self) -> str:
        return self.run("app=hello_dist", code=2, **_slurm_task("train"), WORLD_SIZE="8")

    def slurm_shell(self) -> str:
        return self.run("app=hello_dist", code=0, **_slurm_task("bash"))

    def invalid_device_ordinal(self) -> str:
        self.patch.setattr(torch.cuda, "is_available", lambda: True)
        self.patch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError) as error:
            bind_device(ProcessEnvironment(rank=3, local_rank=3, world_size=4, local_world_size=4))
        self.patch.setattr(torch.cuda, "device_count", lambda: 1)  # as Slurm binds one GPU to each task
        self.patch.setattr(torch.cuda, "set_device", lambda device: None)
        bound = bind_device(ProcessEnvironment(rank=3, local_rank=3, world_size=4, local_world_size=4))
        assert bound == torch.device("cuda:0")
        return str(error.value)

    def no_cuda(self) -> str:
        self.patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError) as error:
            bind_device(ProcessEnvironment(), "cuda")
        return str(error.value)

    def one_folder_per_rank(self) -> str:
        if "greeted" not in _SAID:
            _SAID["greeted"] = self.run("driver=torchrun", "app=hello_dist", code=0)
            assert len(list((self.folder / "outputs").glob("hello_dist-*"))) == 1
            assert not list(self.folder.rglob(".hydra"))
        return _SAID["greeted"]

    def wrong_key(self) -> str:
        return self.run("driver=torchrun", "driver.nproc=2", "app=hello_dist", code=2)

    # ---- data and numbers

    def padded_validation(self) -> str:
        data = TensorDataset(torch.zeros(53, 4))
        padded = sum(len(DistributedSampler(data, num_replicas=2, rank=rank)) for rank in range(2))
        assert padded == 54, "PyTorch's sampler counts one sample twice"
        return json.dumps(self._trained(2)[0]["validation"][-1])

    def uneven_batches(self) -> str:
        plain = _failure(_uneven_loop)
        steps = [rows["training"][-1]["step"] for rows in self._trained(2)]
        assert steps == [22, 22], "two epochs of 103 samples in batches of 10"
        return plain

    def scheduler_and_world_size(self) -> str:
        one, two = self._trained(1)[0], self._trained(2)[0]
        for mine, theirs in zip(one["training"], two["training"], strict=True):
            assert (mine["lr"], mine["step"]) == (theirs["lr"], theirs["step"])
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-10)
        return json.dumps(two["training"][-1])

    def two_batch_sizes(self) -> str:
        with pytest.raises(UserError) as error:
            _train(str(self.folder / "both"), batch_size=5)
        assert not (self.folder / "both").exists()
        return str(error.value)

    def no_parallel_section(self) -> str:
        return _failure(_train, str(self.folder / "bare"), parallel=None)

    # ---- stopping and going on

    def preempted(self) -> str:
        return self._interrupted()[0]

    def resumed_mid_epoch(self) -> str:
        return self._interrupted()[1]

    def world_size_changed(self) -> str:
        return self._interrupted()[1]

    def damaged_checkpoint(self) -> str:
        return self._interrupted()[2] + self._interrupted()[1]

    def orphans(self) -> str:
        process = self._start_cli("driver=torchrun", *WAITS)
        pids = rank_pids(self.folder / "told")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert wait_gone(pids) == []
        return output

    def pruned(self) -> str:
        optuna = pytest.importorskip("optuna")
        results = everyrank.launch(_prune, str(self.folder / "pruned"), nproc_per_node=2)
        assert results[0] == results[1]
        assert results[0].startswith(optuna.TrialPruned.__name__)
        return results[0]

    def _interrupted(self) -> tuple[str, str, str]:
        """What is said by a run on 2 ranks that is told to stop within an epoch, by the same command on 3 ranks after
        the newest checkpoint was damaged, and by ``everyrank checkpoints`` between the two. Done once for all entries.
        """
        if "resumed" not in _SAID:
            stopped = self._train_certify("driver.nproc_per_node=2", code=75)
            newest = max(self.folder.glob("outputs/*/checkpoints/step-*"))
            with (newest / "model.safetensors").open("r+b") as file:
                file.seek(200)
                file.write(b"damage")
            listed = self._run_cli("checkpoints", str(newest.parent), program=(sys.executable, "-m", "everyrank"))
            assert listed.returncode == 1
            resumed = self._train_certify("driver.nproc_per_node=3", code=0)
            used = [
                (entry["epoch"], sample)
                for path in self.folder.glob("outputs/*/ledger/*.jsonl")
                for entry in map(json.loads, path.read_text().splitlines())
                for sample in entry["samples"]
            ]
            assert len(used) == len(set(used)) == 3 * 103, "each sample exactly once an epoch"
            _SAID.update(stopped=stopped, resumed=resumed, listed=listed.stdout)
        return _SAID["stopped"], _SAID["resumed"], _SAID["listed"]

    def _trained(self, size: int) -> list[dict[str, Any]]:
        """The histories of each rank, trained once for all entries."""
        if size not in _ROWS:
            folder = str(self.folder / f"trained-{size}")
            _ROWS[size] = everyrank.launch(_train, folder, nproc_per_node=size)
        return _ROWS[size]

    def _train_certify(self, nproc: str, code: int) -> str:
        data = ("app.data.type=interrupting.Interrupting", f"+app.data.kwargs.mark={self.folder}/interrupted")
        return self.run("driver=torchrun", nproc, "app=certify", *data, code=code)


def _failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Run on two ranks and return the message and traceback of the rank that failed."""
    with pytest.raises((RankFailedError, UserError)) as failure:
        everyrank.launch(function, *args, kwargs=kwargs, nproc_per_node=2)
    return f"{getattr(failure.value, 'traceback', '')}\n{failure.value}"


@contextmanager
def _busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _slurm_task(job_name: str) -> dict[str, str]:
    """What Slurm sets for task 0 of 4 of the first step on one node."""
    names = ("JOB_ID", "STEP_ID", "PROCID", "LOCALID", "NODEID", "NTASKS", "NNODES", "STEP_TASKS_PER_NODE")
    values = ("4711", "0", "0", "0", "0", "4", "1", "4")
    return {f"SLURM_{n}": v for n, v in zip(names, values, strict=True)} | {"SLURM_JOB_NAME": job_name}


# What the ranks run: sent whole, since they cannot import a test module.


def _skip_the_barrier() -> None:
    with everyrank.join(device="cpu", timeout_s=60) as world:
        if world.is_main:  # the classic: `if rank == 0:` around something that all ranks must do
            everyrank.monitored_barrier(timeout_s=1)
        else:
            torch.distributed.recv(torch.zeros(1), src=0)


def _uneven_loop() -> None:
    with everyrank.join(device="cpu", timeout_s=60) as world:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
        for batch in torch.zeros(5 - world.rank, 4).split(1):
            model(batch).sum().backward()


def _mean_squared_error(output: torch.Tensor, data: Any) -> torch.Tensor:
    return nn.functional.mse_loss(output, data[1])


def _train(folder: str, poison: bool = False, batch_size: int | None = None, **sections: Any) -> dict[str, Any]:
    """Two epochs of 103 samples in global batches of 10; 53 samples of validation."""
    with everyrank.join(device="cpu", timeout_s=60) as world:
        x = torch.randn(103, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x.sum(dim=1, keepdim=True)
        if poison:
            y[17] = torch.nan
        scheduler = {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 9}, "interval": "step"}
        training = {
            **{"path": folder, "num_epochs": 2, "global_batch_size": 10, "device": "cpu", "dtype": "float64"},
            **{"optimizer_kwargs": {"lr": 0.01}, "scheduler": scheduler, "progress": "off", "plots": False},
            **({"batch_size": batch_size} if batch_size else {}),
        }
        config: dict[str, Any] = {
            "criterion": _mean_squared_error,
            "model": {"type": nn.Linear, "args": [4, 1]},
            "training": training,
            "parallel": {},
            **sections,
        }
        trainer = TrainerDDP(config=config, world=world)
        parts = TensorDataset(x, y), TensorDataset(x[:53], y[:53])
        trainer.prepare_dataloaders(train_dataset=parts[0], val_dataset=parts[1])
        rows = trainer.run_training(trial=sections.get("trial"))
        return {"training": rows[0], "validation": rows[1]}


class _Hopeless:
    """A trial that is pruned at its first report; only rank 0 has one."""

    number = 0

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool:
        return True


def _prune(folder: str) -> str:
    import optuna

    with everyrank.join(device="cpu", timeout_s=60) as world:
        config = {
            "criterion": _mean_squared_error,
            "model": {"type": nn.Linear, "args": [4, 1]},
            "training": {"path": folder, "num_epochs": 5, "batch_size": 5, "device": "cpu", "progress": "off"},
            "parallel": {},
        }
        trainer = TrainerDDP(config=config, world=world)
        data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
        trainer.prepare_dataloaders(train_dataset=data, val_dataset=data)
        try:
            trainer.run_training(trial=_Hopeless() if world.is_main else None)
        except optuna.TrialPruned as pruned:
            everyrank.barrier()  # all ranks are alive
            return f"{type(pruned).__name__}: {pruned}"
    return "not pruned"
