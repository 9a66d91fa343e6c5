"""Train a small network on the digits."""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset


def train(model, device, train_loader, optimizer, epoch, curve):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        if batch_idx % 10 == 0:
            print(f"epoch {epoch} batch {batch_idx} loss {loss.item():.6f}")


def test(model, device, test_loader):
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            correct += (model(data.to(device)).argmax(1) == target.to(device)).sum().item()
    accuracy = correct / len(test_loader.dataset)
    print(f"accuracy {accuracy:.4f}")
    return accuracy


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default="curve.json")
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    train_set = TensorDataset(images[:1501], labels[:1501])
    train_loader = DataLoader(train_set, batch_size=50, shuffle=True)
    test_loader = DataLoader(TensorDataset(images[1501:], labels[1501:]), batch_size=100)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    curve = []
    for epoch in range(args.epochs):
        train(model, device, train_loader, optimizer, epoch, curve)
        accuracy = test(model, device, test_loader)
        scheduler.step()
    torch.save(model.state_dict(), args.out + ".pt")
    with open(args.out, "w") as file:
        json.dump({"curve": curve, "accuracy": accuracy}, file)


if __name__ == "__main__":
    main()
