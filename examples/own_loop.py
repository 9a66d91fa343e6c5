"""A training loop of one's own, with everyrank's guarantees and without its trainer.

    torchrun --nproc-per-node=2 examples/own_loop.py --folder /tmp/own_loop

Kill it at any moment, start it again with another number of processes: each sample is trained on exactly once an
epoch, and the weights are those of one undisturbed process. The lines that make it so end in ``# everyrank``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import everyrank
from everyrank.runtime.preemption import PreemptionWatch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ledger", action="store_true", help="write down the samples of every step")
    args = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(103, 4, dtype=torch.float64)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True).sin(), torch.arange(103))
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()

    with everyrank.join() as world, PreemptionWatch() as watch:  # everyrank
        model = DistributedDataParallel(model.to(world.device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        share = {"rank": world.rank, "world_size": world.world_size}  # everyrank
        sampler = everyrank.GlobalBatchSampler(len(dataset), global_batch_size=10, **share)  # everyrank
        loader = DataLoader(dataset, batch_sampler=sampler)
        checkpointer = everyrank.Checkpointer(args.folder / "checkpoints", world=world)  # everyrank
        state = {"model": model, "optimizer": optimizer, "sampler": sampler}  # everyrank
        step = checkpointer.resume(**state)  # everyrank
        start = step

        for epoch in range(sampler.epoch, args.epochs):
            sampler.set_epoch(epoch)
            for batch, (x, y, ids) in enumerate(loader, start=sampler.next_batch):
                x, y = x.to(world.device), y.to(world.device)
                loss = mse_loss(model(x), y) * sampler.loss_weight(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                sampler.commit()  # everyrank
                step += 1
                if args.ledger:
                    used = ids[: sampler.share(batch).num_local].tolist()
                    entry = {"from": start, "step": step, "epoch": epoch, "ids": used}
                    with open(args.folder / f"ledger-{world.rank}.jsonl", "a") as ledger:
                        ledger.write(json.dumps(entry) + "\n")
                if (stop := watch.agreed()) or step % 5 == 0:  # everyrank
                    checkpointer.save_objects(step, **state)  # everyrank
                if stop:
                    checkpointer.wait()
                    raise SystemExit(everyrank.errors.EXIT_PREEMPTED)

        checkpointer.save_objects(step, **state)
        checkpointer.close()  # everyrank
        if world.is_main:
            torch.save(model.module.state_dict(), args.folder / "model.pth")


if __name__ == "__main__":
    main()
