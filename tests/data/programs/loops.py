"""A training loop as people write it, plain, by Accelerate or by Fabric: ``loops.py LIBRARY KIND STOP_AFTER FOLDER``.

Each rank appends the samples it trained on to a file. KIND is ``exact`` or ``alone``; the loop saves its place after
each step, stops after so many steps without a word (0: trains to the end of its two epochs), and goes on from there.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import everyrank

NUM_SAMPLES, NUM_EPOCHS = 23, 2


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        return torch.tensor([float(index)])


def loader_of(library, kind):
    loader = DataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=1 if library == "plain" else 0)
    skip = None
    if library == "accelerate":
        from accelerate import Accelerator, skip_first_batches

        accelerator = Accelerator(cpu=True)
        loader, skip = accelerator.prepare(loader), skip_first_batches
    elif library == "fabric":
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
        fabric.launch()
        loader = fabric.setup_dataloaders(loader)
    else:
        dist.init_process_group("gloo")  # noqa: ER105
        if kind == "alone":
            loader = DataLoader(Numbers(), batch_size=2, sampler=DistributedSampler(Numbers()))
    return (everyrank.exact(loader) if kind == "exact" else loader), skip


def main(library, kind, stop_after, folder):
    loader, skip = loader_of(library, kind)
    place, rank = folder / "place.json", int(os.environ.get("RANK", "0"))
    saved = json.loads(place.read_text()) if place.exists() else {"epoch": 0, "step": 0}
    if kind == "exact" and "loader" in saved:
        loader.load_state_dict(saved["loader"])
    steps = 0
    for epoch in range(loader.epoch if kind == "exact" else saved["epoch"], NUM_EPOCHS):
        done = saved["step"] if kind == "alone" and epoch == saved["epoch"] else 0
        batches = skip(loader, done) if skip is not None and done else loader
        for number, batch in enumerate(batches):
            if kind == "alone" and skip is None and number < done:
                continue
            with (folder / f"samples-{rank}.txt").open("a") as file:
                file.writelines(f"{epoch} {int(sample)}\n" for sample in batch.flatten())
            dist.barrier()
            steps += 1
            if rank == 0:
                state = {"epoch": epoch, "step": number + 1 + (done if skip is not None else 0)}
                if kind == "exact":
                    state["loader"] = loader.state_dict()
                place.write_text(json.dumps(state))
            dist.barrier()
            if steps == stop_after:
                os._exit(9)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    dist.destroy_process_group()
