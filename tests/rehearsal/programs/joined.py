"""Two ranks that join as on GPUs, and train: what the group was asked for, and the weights."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "programs"))

import tiny
import torch
import torch.distributed as dist

import everyrank
from everyrank.errors import RendezvousError

asked = {}
make_group = dist.init_process_group


def noting(backend=None, **options):
    asked.update(backend=str(backend), device=str(options.get("device_id")))
    asked["interfaces"] = [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    return make_group(backend, **options)


dist.init_process_group = noting
asked["wrong"] = {}
for value in ("nowhere", "=l"):
    os.environ["NCCL_SOCKET_IFNAME"] = value
    try:
        with everyrank.join():
            raise AssertionError("it was not refused")
    except RendezvousError as error:
        asked["wrong"][value] = str(error)
del os.environ["NCCL_SOCKET_IFNAME"]
with everyrank.join() as world:
    # What ranks agree on travels beside NCCL, from memory that no GPU has to be waited for.
    agreed = everyrank.broadcast_decision(world.rank == 0)
    config = tiny.make_config(sys.argv[1], device="auto", optimizer_kwargs={"lr": 0.05, "fused": False})
    trainer = everyrank.TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(23, seed=1))
    trainer.run_training()
    weight = trainer.module[0].weight
    assert weight.device == torch.device("cuda", world.rank)
    found = {"rank": world.rank, "agreed": agreed, "weight": weight.sum().item(), **asked}
    # One write: torchrun's ranks share a pipe, and print() would write the line's end by itself.
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")
