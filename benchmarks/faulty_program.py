"""A training loop that imports only torch, and one of many faults in one rank at one step.

``python faulty_program.py KIND RANK STEP [SECONDS]``, under any launcher that sets torchrun's variables. The lines of
the faults carry a mark, ``# fault: KIND``, by which the campaign checks the line that a verdict names.
"""

import ctypes
import os
import re
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

NUM_STEPS = 40


class OurOwnError(Exception):
    """What a program makes of any trouble."""


class Samples(Dataset):
    """Random numbers; one sample of one rank may be bad."""

    def __init__(self, kind: str, bad: int) -> None:
        self.kind, self.bad = kind, bad

    def __len__(self) -> int:
        return 4 * NUM_STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            stamp()
            if self.kind == "stuck_loader":
                time.sleep(600)  # fault: stuck_loader
            if self.kind == "raising_loader":
                raise ValueError("this sample cannot be read")  # fault: raising_loader
            if self.kind == "killed_worker":
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


def stamp() -> None:
    """Say when the fault happened, to whoever measures how long it takes to be named."""
    path = os.environ.get("FAULT_STAMP")
    if path:
        with open(path, "w") as file:
            file.write(str(time.time()))


def misbehave(kind: str, total: torch.Tensor) -> None:
    """The faults of a rank that are not those of its data."""
    if kind == "raise":
        raise ValueError("something is wrong here")  # fault: raise
    if kind == "exit":
        sys.exit(3)  # fault: exit
    if kind == "hard_exit":
        os._exit(4)  # fault: hard_exit
    if kind == "left_early":
        dist.destroy_process_group()
        sys.exit(0)  # fault: left_early
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)  # fault: killed
    if kind == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)  # fault: terminated
    if kind == "segfault":
        ctypes.string_at(0)  # fault: segfault
    if kind == "out_of_memory":
        bytearray(1 << 60)  # fault: out_of_memory
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)  # fault: stopped
    if kind == "loop":
        while True:
            total = total * 1.0  # fault: loop
    if kind == "holds_lock":
        re.fullmatch("(a|aa)+", 80 * "a" + "b")  # fault: holds_lock
    if kind == "asleep":
        time.sleep(600)  # fault: asleep
    if kind == "blocked_read":
        path = f"pipe-{os.getpid()}"
        os.mkfifo(path)
        with open(os.open(path, os.O_RDWR)) as pipe:
            os.remove(path)
            pipe.readline()  # fault: blocked_read
    if kind == "extra_collective":
        dist.barrier()  # fault: extra_collective
    if kind == "other_collective":
        dist.broadcast(torch.ones(7), src=0)  # fault: other_collective


def slow_cleanup(kind: str) -> None:
    """Raise, and take one's time to go."""
    try:
        raise ValueError("something is wrong here")  # fault: slow_cleanup
    finally:
        dist.destroy_process_group()
        time.sleep(4)


def share(kind: str, loss: torch.Tensor) -> None:
    """The collectives of a step besides those of DDP; the faulty rank calls them with something else."""
    value = loss.detach().reshape(1).repeat(4)
    op = dist.ReduceOp.SUM
    if kind == "wrong_shape":
        value = value.repeat(3)
    if kind == "wrong_type":
        value = value.double()
    if kind == "silent_type":
        value = value.int()
    if kind == "silent_reduction":
        op = dist.ReduceOp.MAX
    if kind != "skipped":
        dist.all_reduce(value, op=op)  # fault: wrong_shape wrong_type silent_type silent_reduction
    flags = torch.zeros(3, 2)
    dist.broadcast(flags, src=0)  # fault: skipped


def main() -> None:
    """Train; at one step, in one rank, go wrong."""
    kind, guilty, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    timeout = timedelta(seconds=float(sys.argv[4]) if len(sys.argv) > 4 else 60)
    dist.init_process_group("gloo", timeout=timeout)  # noqa: ER105
    rank = dist.get_rank()
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bad = 4 * step if rank == guilty else -1
    in_data = kind in ("stuck_loader", "raising_loader", "killed_worker")
    loader = DataLoader(Samples(kind, bad), batch_size=4, num_workers=int(in_data))
    for number, batch in enumerate(loader):
        is_now = rank == guilty and number == step
        if is_now:
            stamp()
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        if is_now and kind == "slow_cleanup":
            slow_cleanup(kind)
        if is_now:
            misbehave(kind, loss.detach())
        if kind == "wrapped":
            try:
                if is_now:
                    raise KeyError("missing")  # fault: wrapped
                loss.backward()
            except RuntimeError as error:
                raise OurOwnError("training failed") from error
        else:
            loss.backward()
        optimizer.step()
        if kind == "slow_step" and is_now:
            time.sleep(14)
        if kind == "slow_validation" and rank == 0 and number % 10 == 9:
            sum(float(torch.randn(300, 300).matmul(torch.randn(300, 300)).sum()) for _ in range(4000))
        share(kind if is_now else "", loss)
    dist.barrier()
    print(f"rank {rank} is done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
