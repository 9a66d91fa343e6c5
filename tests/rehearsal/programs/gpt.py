"""A small GPT trained with DDP, in the manner of the well-known trainers: mixed precision, compiled, a pinning loader.

It takes CUDA and nccl where there is a GPU and the CPU and gloo elsewhere, so that both can be compared.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BLOCK, WIDTH, VOCABULARY, STEPS = 16, 32, 29, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value = self.attention(self.norm(x)).view(batch, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, targets):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.head(self.blocks(self.token(tokens) + self.place(places)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, sys.argv[1])
    local_rank = int(os.environ["LOCAL_RANK"])  # noqa: ER009
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")  # noqa: ER105
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(5)
    text = torch.randint(VOCABULARY, (64, BLOCK + 1))
    data = TensorDataset(text[:, :-1], text[:, 1:])
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=8, sampler=sampler, num_workers=1, pin_memory=kind == "cuda")
    model = GPT().to(device)
    if kind == "cuda":
        model = torch.compile(model)
    model = DistributedDataParallel(model, device_ids=[local_rank] if kind == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    losses, epoch = [], 0
    while len(losses) < STEPS:
        sampler.set_epoch(epoch)
        for tokens, targets in loader:
            tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            assert tokens.device == next(model.parameters()).device
            with torch.autocast(kind, dtype=dtype):
                loss = model(tokens, targets)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        epoch += 1
    if kind == "cuda":
        torch.cuda.synchronize()
    rank, steps = dist.get_rank(), int(optimizer.state[next(model.parameters())]["step"])
    # One write: torchrun's ranks share a pipe, and print() would write the line's end by itself.
    sys.stdout.write(f"rank {rank} on {device}: {steps} steps, losses {' '.join(f'{loss:.6f}' for loss in losses)}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
