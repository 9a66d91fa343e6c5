"""Lightning Fabric as its guide shows it: nothing in here knows of everyrank."""

import os

import torch
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=1)
fabric.launch()
fabric.seed_everything(1 + fabric.global_rank)
model = torch.nn.Linear(2, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
data = torch.utils.data.TensorDataset(torch.arange(32.0).reshape(16, 2))
for (batch,) in fabric.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    fabric.backward(model(batch).pow(2).mean() / 1000)
    optimizer.step()
weights = fabric.all_gather(model.weight.detach().sum())
assert torch.equal(weights, weights[:1].expand_as(weights)), weights
print(f"fabric rank {fabric.global_rank} of {fabric.world_size}: equal weights")
