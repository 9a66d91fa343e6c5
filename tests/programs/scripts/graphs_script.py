"""PyTorch Geometric on several devices, small: a graph network in DDP, each rank its part of the graphs."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import SAGEConv, global_mean_pool


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = SAGEConv(2, 4)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, data):
        return self.head(global_mean_pool(self.convolution(data.x, data.edge_index).relu(), data.batch))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # noqa: ER105
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # noqa: ER009
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [Data(x=torch.full((3, 2), float(number)), edge_index=edges) for number in range(8)]
    model = DistributedDataParallel(Network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    num_graphs = 0
    for batch in DataLoader(graphs[rank::size], batch_size=2):
        optimizer.zero_grad()
        model(batch).pow(2).mean().backward()
        optimizer.step()
        num_graphs += batch.num_graphs
    total = torch.tensor(num_graphs)
    dist.all_reduce(total)
    print(f"graphs rank {rank} of {size}: {num_graphs} of {total.item()} graphs")
    dist.destroy_process_group()
