"""Nothing waits for the device where it need not: counted as operations that read a tensor or make one of a number."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from apart import count_collectives
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import everyrank
from everyrank import DefaultValidator, GlobalBatchSampler, TrainerDDP
from everyrank.data.loader import make_loader
from everyrank.training.parallel.wrapping import send_buffers

# A value read back, and a tensor made of a Python number: on a GPU each waits for all that is queued.
WAITS = ("_local_scalar_dense", "lift_fresh", "equal", "nonzero")


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class OnTheDevice(torch.utils.data.Dataset):
    """Batches that are there already, so that only the evaluation is counted."""

    def __init__(self, num_samples: int) -> None:
        self.x, self.y = (tensor.float() for tensor in tiny.make_data(num_samples).tensors)

    def __len__(self) -> int:
        return len(self.x)

    def get_batch(self, indices: list[int]) -> list[Tensor]:
        return [self.x[indices[0] : indices[-1] + 1], self.y[indices[0] : indices[-1] + 1]]


def test_an_evaluation_waits_once_however_many_batches_there_are() -> None:
    counts = []
    model = tiny.TinyNet()
    for num_batches in (3, 9):
        validator = DefaultValidator(tiny.compute_loss, "cpu", metrics={"error": tiny.mean_error})
        sampler = GlobalBatchSampler(10 * num_batches, global_batch_size=10, shuffle=False)
        loader = make_loader(OnTheDevice(10 * num_batches), sampler)
        validator.evaluate(model, loader)
        with Waits() as waits:
            validator.evaluate(model, loader)
        counts.append(waits.counts)
    assert counts[0] == counts[1]


def test_a_step_in_fp16_waits_as_often_as_plain_pytorch(tmp_path: Path) -> None:
    """From one step's criterion to the next one's; at a sync point there are more."""
    x, y = (tensor.float() for tensor in tiny.make_data(80).tensors)

    def plain() -> list[int]:
        counts = []
        model = tiny.TinyNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu")
        with Waits() as waits:
            for rows in range(0, len(x), 10):
                loss = tiny.compute_loss(model(x[rows : rows + 10]), (x, y[rows : rows + 10]))
                counts.append(waits.counts["_local_scalar_dense"])
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return counts

    def ours() -> list[int]:
        counts, waits = [], Waits()

        def criterion(output: Tensor, data: Any) -> Tensor:
            counts.append(waits.counts["_local_scalar_dense"])
            return tiny.compute_loss(output, data)

        settings = {"dtype": None, "mixed_precision": "fp16", "num_epochs": 2, "handle_signals": False}
        config = tiny.make_config(tmp_path, log_every_steps=10**6, **settings)
        trainer = TrainerDDP(config={**config, "criterion": criterion})
        loader, _, _ = trainer.prepare_dataloaders(train_dataset=TensorDataset(x, y))
        trainer.run_training(loader, until_epoch=1)
        counts.clear()
        with waits:
            trainer.run_training(loader)
        assert len(counts) == 8
        return counts

    each, theirs = ([after - before for before, after in pairwise(counts)] for counts in (ours(), plain()))
    assert min(each) <= min(theirs)


class Buffered(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        for number in range(12):
            self.register_buffer(f"statistic{number}", torch.full((number,), rank + 0.5))
            self.register_buffer(f"count{number}", torch.tensor(rank))
            self.register_buffer(f"mask{number}", torch.full((2, 2), rank == 0))


def test_buffers_travel_together() -> None:
    def send() -> tuple[int, bool]:
        with everyrank.join(device="cpu") as world:
            model = Buffered(world.rank)
            before = count_collectives()
            send_buffers(model, world)
            right = Buffered(0).state_dict()
            return count_collectives() - before, all(torch.equal(v, right[k]) for k, v in model.state_dict().items())

    assert everyrank.launch(send, nproc_per_node=2) == [(1, True)] * 2, "one message for all types"


def graphs(num: int) -> list[Any]:
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(0)
    return [
        Data(
            x=torch.randn(3 + i % 4, 2, generator=generator),
            edge_index=torch.tensor([[0, 1], [1, 2]]),
            y=torch.randn(1, 2, generator=generator),
        )
        for i in range(num)
    ]


def on_graphs(output: Tensor, data: Any) -> Tensor:
    return nn.functional.mse_loss(output, data.y)


def on_nodes(output: Tensor, data: Any) -> Tensor:
    sizes = torch.bincount(data.batch, minlength=data.num_graphs)
    return ((output - data.y).square().mean(1) * sizes).mean()


@pytest.mark.parametrize(("criterion", "num_calls"), [(on_graphs, 2 * 5), (on_nodes, 0)])
def test_losses_of_graphs_are_those_of_each_graph(criterion: Any, num_calls: int) -> None:
    from torch_geometric.data import Batch
    from torch_geometric.nn import global_mean_pool

    class Pooled(nn.Module):
        def forward(self, data: Any) -> Tensor:
            return global_mean_pool(data.x, data.batch)

    calls = []

    def counted(output: Tensor, data: Any) -> Tensor:
        calls.append(1)
        return criterion(output, data)

    found = graphs(50)
    loader = make_loader(found, GlobalBatchSampler(50, global_batch_size=10, shuffle=False))
    result = DefaultValidator(counted, "cpu").evaluate(Pooled(), loader)
    each = torch.tensor([criterion(Pooled()(b), b).item() for b in (Batch.from_data_list([g]) for g in found)])
    assert result.std_over == "samples"
    assert result.loss == pytest.approx(each.mean().item(), abs=1e-6)
    assert result.loss_std == pytest.approx(each.std(correction=0).item(), abs=1e-5)
    assert not num_calls or len(calls) == num_calls, "once for a batch, and once for all its graphs"
