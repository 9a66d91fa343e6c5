"""Small apps that the tests launch: written outside the package, found by their ``_target_``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

import everyrank


class Waits:
    """Joins, tells its pid in a file, and waits in a collective that never comes until it is ended."""

    def run(self, cfg: DictConfig) -> None:
        with everyrank.join(**cfg.distributed) as world:
            _announce(cfg, world.rank)
            everyrank.barrier()
            if world.is_main:
                Path(cfg.app.folder, "joined").touch()
            while True:
                time.sleep(0.05)


class RaisesOnRank:
    """One rank raises; the others wait for it in a collective."""

    def run(self, cfg: DictConfig) -> None:
        with everyrank.join(**cfg.distributed) as world:
            if world.rank == cfg.app.guilty:
                raise LookupError(f"the sample {world.rank} is missing")
            everyrank.barrier()


class KilledOnRank:
    """One rank is killed, as the kernel kills one that takes too much memory."""

    def run(self, cfg: DictConfig) -> None:
        with everyrank.join(**cfg.distributed) as world:
            everyrank.barrier()
            if world.rank == cfg.app.guilty and world.restart_count < cfg.app.get("attempts", 100):
                os.kill(os.getpid(), signal.SIGKILL)
            everyrank.reduce_sum(torch.ones(1))
            print(f"rank {world.rank} went on in attempt {world.restart_count}", flush=True)


class EndsOnRank1:
    """Rank 1 alone finds a mistake, or exits with a text; rank 0 waits for it."""

    def run(self, cfg: DictConfig) -> None:
        with everyrank.join(**cfg.distributed) as world:
            if world.rank == 1 and cfg.app.how == "mistake":
                raise everyrank.ConfigError("app.width=-1 was set on rank 1, but a width is positive.")
            if world.rank == 1:
                sys.exit("the disk is missing")
            everyrank.barrier()


class ReadsSecrets:
    """Notes what rank 0 has been told."""

    def run(self, cfg: DictConfig) -> None:
        told = [os.environ[name] for name in ("MY_API_TOKEN", "NUMBER", "FLAG", "HALF")]
        if everyrank.detect().rank == 0:
            Path(cfg.app.folder).mkdir()
            literal = [account.api_key for account in cfg.app.accounts]
            Path(cfg.app.folder, "seen-0").write_text("|".join([cfg.app.password, *told, *literal]))


class StuckWithChildren:
    """Has a loader worker that never comes back, a child that holds its output, and one in a session of its own."""

    def run(self, cfg: DictConfig) -> None:
        import subprocess

        rank, folder = everyrank.detect().rank, Path(cfg.app.folder)
        folder.mkdir(exist_ok=True)
        (folder / f"pid-rank-{rank}-{os.getpid()}").touch()
        for own_session in (False, True):
            child = subprocess.Popen(["sleep", "600"], start_new_session=own_session)
            (folder / f"pid-child-{child.pid}").touch()
        for _ in torch.utils.data.DataLoader(NeverRead(folder, rank), num_workers=1):
            pass


class NeverRead(torch.utils.data.Dataset[int]):
    """Its samples cannot be read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        (self.folder / f"pid-worker-{os.getpid()}").touch()
        (self.folder / f"stuck-{self.rank}").touch()
        while True:
            time.sleep(60)


class OutsideProgram:
    """An app that is a program: each rank executes the command."""

    def run(self, cfg: DictConfig) -> None:
        raise AssertionError("an app with a command is not run in Python")

    def build_command(self, cfg: DictConfig) -> list[str]:
        return [sys.executable, "-c", cfg.app.code]


class UserMistake:
    """Every rank finds the same mistake in its settings."""

    def run(self, cfg: DictConfig) -> None:
        raise everyrank.ConfigError("app.width=-1 was set, but a width is positive. Set app.width=1 or more.")


class Returns:
    """Returns ``app.value``, something that JSON has no word for, or raises."""

    def run(self, cfg: DictConfig) -> object:
        if cfg.app.value == "raise":
            raise RuntimeError("no value")
        return {1} if cfg.app.value == "set" else cfg.app.value


class Trains:
    """Ten steps of DDP on a small network, with a fixed global batch; writes the hash and the weights."""

    def run(self, cfg: DictConfig) -> dict[str, str]:
        import hashlib

        with everyrank.join(**cfg.distributed) as world:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
            wrapped = torch.nn.parallel.DistributedDataParallel(model) if world.is_distributed else model
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
            data = torch.randn(120, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            for batch in data.split(12):
                share = batch.tensor_split(world.world_size)[world.rank]
                optimizer.zero_grad()
                loss = (wrapped(share) - share.sum(1, keepdim=True)).square().mean()
                (loss * len(share) * world.world_size / len(batch)).backward()
                optimizer.step()
            flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
            if not all(other == digest for other in everyrank.gather_objects(digest)):
                raise RuntimeError("the ranks ended with different weights")
            return {"hash": digest, "weights": flat.tolist()}


class ScriptTrains:
    """``Trains`` as a plain script for a bare launcher: ``torchrun probe_apps.py RESULT``."""

    @staticmethod
    def main(result_file: str) -> None:
        import json

        from omegaconf import OmegaConf

        cfg = OmegaConf.create({"distributed": {}, "app": {}})
        result = Trains().run(cfg)
        if os.environ.get("RANK", "0") == "0":
            Path(result_file).write_text(json.dumps(result))


def _announce(cfg: DictConfig, rank: int) -> None:
    folder = Path(cfg.app.folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".pid-{rank}"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / f"pid-{rank}")


if __name__ == "__main__":
    ScriptTrains.main(sys.argv[-1])  # the legacy launcher puts --local-rank=N before it


class Rehearsed:
    """Says which device and backend it has, and how many devices a Python that it starts counts."""

    def run(self, cfg: DictConfig) -> None:
        count = "import torch; print(torch.cuda.device_count())"
        with everyrank.join(**cfg.distributed) as world:
            child = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
            total = everyrank.reduce_sum(torch.ones(1, device=world.device))
            backend = torch.distributed.get_backend() if world.is_distributed else "nccl"
            print(
                f"rank {world.rank} on {world.device} of {int(total)}, by {backend}; "
                f"its child counts {child.stdout.strip()}",
                flush=True,
            )
