"""GPT-2 trained by ``TrainerDDP`` and by a loop written by hand in the usual way; ``gpu.py`` measures both.

Both take the same steps on the same tokens: bfloat16 autocast, fused AdamW, gradients clipped to norm 1, pinned batches
copied without waiting.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank import TrainerDDP


@dataclass(frozen=True)
class Size:
    """A model, its batches, and how many steps are timed in one turn."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = 50304
    batch: int = 16
    steps: int = 40


TINY = Size(layers=1, heads=2, width=8, context=4, vocabulary=16, batch=2, steps=2)
OPTIMIZER = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and added to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList([nn.LayerNorm(size.width, bias=False) for _ in range(2)])
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.wide = nn.Linear(size.width, 4 * size.width, bias=False)
        self.narrow = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for (batch, tokens, width)."""
        qkv = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class GPT(nn.Module):
    """GPT-2; the token embedding is the last layer's weight too."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of the next token for (batch, tokens)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Text(torch.utils.data.Dataset):
    """Random tokens, read as windows; a batch is made at once."""

    def __init__(self, size: Size) -> None:
        self.context, self.num = size.context, size.batch * size.steps
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(size.vocabulary, (self.num + size.context + 1,), generator=generator)

    def __len__(self) -> int:
        return self.num

    def get_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the windows that begin at ``indices``, and what follows each of their tokens."""
        rows = torch.stack([self.ids[i : i + self.context + 1] for i in indices])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def loss_of(logits: Tensor, batch: Any) -> Tensor:
    """Return the mean cross entropy over tokens."""
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def flops_per_token(size: Size, num_parameters: int) -> float:
    """Return the operations of forward and backward per token: 6N + 12 L H Q T (arXiv:2204.02311, appendix B)."""
    return 6 * (num_parameters - size.context * size.width) + 12 * size.layers * size.width * size.context


def by_hand(size: Size, device: torch.device, compiled: bool) -> Any:
    """Return a function that takes the steps of one turn."""
    torch.manual_seed(42)
    model = GPT(size).to(device)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER, fused=True)
    text = Text(size)

    def fetch(step: int) -> tuple[Tensor, ...]:
        rows = range(step * size.batch, (step + 1) * size.batch)
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in text.get_batch(rows))

    def turn() -> None:
        coming = fetch(0)
        for step in range(size.steps):
            batch = coming
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_of(run(batch[0]), batch)
            if step + 1 < size.steps:
                coming = fetch(step + 1)  # while the GPU computes
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    return turn


def by_trainer(size: Size, device: torch.device, compiled: bool, folder: Path) -> Any:
    """Return a function that takes the steps of one turn: an epoch."""
    config = {
        "criterion": loss_of,
        "model": {"type": GPT, "args": [size]},
        "training": {
            "path": str(folder),
            "num_epochs": 1000,
            "batch_size": size.batch,
            "device": str(device),
            "mixed_precision": "bf16",
            "optimizer_kwargs": OPTIMIZER,
            "clip_grad_norm": 1.0,
            "compile": compiled,
            "shuffle": False,
            "plots": False,
            "progress": "off",
            "tracking": {"tensorboard": False},
        },
    }
    trainer = TrainerDDP(config=config)
    loader, _, _ = trainer.prepare_dataloaders(train_dataset=Text(size))

    def turn() -> None:
        trainer.run_training(loader, until_epoch=trainer.epoch + 1)

    return turn


def measure(size: Size, device: torch.device, rounds: int, compiled: bool, folder: Path) -> dict[str, float]:
    """Return tokens per second of both, and the trainer's as a ratio to the loop's; turns alternate."""
    turns = {"by_hand": by_hand(size, device, compiled), "TrainerDDP": by_trainer(size, device, compiled, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            turn()
            torch.cuda.synchronize()
            if number:  # the first is warm-up
                seconds[name].append(time.perf_counter() - began)
    tokens = size.batch * size.context * size.steps
    found = {f"{name}_tokens_per_s": tokens / statistics.median(times) for name, times in seconds.items()}
    found["ratio"] = found["TrainerDDP_tokens_per_s"] / found["by_hand_tokens_per_s"]
    found["parameters"] = sum(math.prod(p.shape) for p in GPT(size).parameters())
    return found
