"""Nothing distributed here: no finding, whatever it saves, prints and downloads."""

import os
import time

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from tqdm import tqdm

os.environ["CUDA_VISIBLE_DEVICES"] = "1"

data = datasets.MNIST("data", download=True)
loader = DataLoader(data, batch_size=32, shuffle=True)
model = torch.nn.Linear(784, 10).cuda()
model.load_state_dict(torch.load("old.pt"))
writer = SummaryWriter("runs")
while not os.path.exists("go"):
    time.sleep(1)
for epoch in range(3):
    for image, label in tqdm(loader):
        loss = model(image.cuda()).sum()
        loss.backward()
    writer.add_scalar("loss", loss.item(), epoch)
    torch.save(model.state_dict(), "model.pt")
    rank = 0  # a word alone makes nothing distributed
    print(rank, loss.item())
