"""Ignite's own way to run: its distributed helpers see the ranks that are there and agree on what they hold."""

import ignite.distributed as idist
import torch


def work(local_rank):
    rank, size = idist.get_rank(), idist.get_world_size()
    assert idist.all_reduce(rank) == size * (size - 1) / 2
    assert idist.all_gather(rank) == list(range(size))
    assert idist.broadcast(torch.tensor([rank + 7]), src=0).item() == 7
    model = idist.auto_model(torch.nn.Linear(2, 1))
    loader = idist.auto_dataloader(torch.utils.data.TensorDataset(torch.arange(8.0)), batch_size=2)
    assert type(model).__name__ == "DistributedDataParallel"
    assert len(loader) == 4
    print(f"ignite rank {rank} of {size} by {idist.model_name()}: agreed")


if __name__ == "__main__":
    with idist.Parallel(backend="gloo") as parallel:
        parallel.run(work)
