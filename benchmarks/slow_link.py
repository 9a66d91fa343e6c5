"""Training between two hosts on a slow link: time per step and loss reached, beside plain DDP.

::

    python benchmarks/slow_link.py            # about seven minutes; needs root and iproute2
    python benchmarks/slow_link.py --quick    # two rounds instead of sixteen

Two network namespaces are the hosts, with one rank and one thread each; both ends of the link are limited to 100 Mbit/s
(``tc ... tbf``). The model is a character-level language model (embedding and two hidden layers, as Bengio et al.,
2003), large beside its batches, so that the link and not the processor sets the pace, which is what makes a link slow.
The text is Python's own language reference, which comes with every interpreter (``pydoc_data.topics``); its last tenth
is held out. All contenders train the same model with AdamW (learning rate 1e-3, by a cosine to zero) on the same 64
samples per step, in the same two processes, a round of 32 steps at a time, in another order each round. Only the loop
written by hand has another order of the samples, that of ``DistributedSampler``. The numbers behind local SGD and
DiLoCo are the steps from one sync to the next. The table has

- the median over rounds of the time per step, and its ratio to the DDP loop written by hand;
- what each rank sent per step, by the counters of its interface, and for how long that alone fills the link;
- the loss on the held-out text after all rounds, and its ratio to that of the loop written by hand.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import everyrank

HERE = Path(__file__).resolve()
STEPS = 32  # of a round
BATCH = 32  # samples of a rank and step
CONTEXT = 16  # characters from which the next one is predicted
RATE_MBIT = 100
HELD_OUT = 8192  # samples
PORT = 29500


class Text(Dataset):
    """Windows of a text; sample ``i`` moves through its stretch of the text from epoch to epoch.

    Args:
        codes: The text, a number for each character.
        num_samples: Number of stretches.
    """

    def __init__(self, codes: Tensor, num_samples: int) -> None:
        self.codes, self.num_samples, self.epoch = codes, num_samples, 0
        self.stretch = (len(codes) - CONTEXT - 1) // num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = index * self.stretch + (self.epoch * 89 + index * 31) % self.stretch
        window = self.codes[begin : begin + CONTEXT + 1]
        return window[:-1], window[-1]


def read_text() -> tuple[Text, Text, int]:
    """Return the training samples, the held-out ones and the number of characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    cut = len(codes) * 9 // 10
    return Text(codes[:cut], STEPS * BATCH * 2), Text(codes[cut:], HELD_OUT), len(alphabet)


def build_model(num_characters: int) -> nn.Module:
    """Return the network, about 0.6 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(num_characters, 32),
        nn.Flatten(),
        nn.Linear(32 * CONTEXT, 768),
        nn.ReLU(),
        nn.Linear(768, 256),
        nn.ReLU(),
        nn.Linear(256, num_characters),
    )


def loss_of(output: Tensor, data: Any) -> Tensor:
    """Return the mean cross entropy in nats per character; the criterion of all contenders."""
    return nn.functional.cross_entropy(output, data[1])


OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.01}
SCHEDULER = torch.optim.lr_scheduler.CosineAnnealingLR  # to zero at the last step


@dataclass
class Contender:
    """One way to train, set up.

    Attributes:
        round: Trains for one round and returns seconds per step.
        module: The bare model.
    """

    round: Callable[[], float]
    module: nn.Module


SetUp = Callable[[everyrank.World, int], Contender]
"""Sets a contender up for a number of steps."""


def by_hand(world: everyrank.World, num_steps: int) -> Contender:
    """The loop that everybody writes: DDP, DataLoader, DistributedSampler."""
    data, _, num_characters = read_text()
    sampler = DistributedSampler(data, num_replicas=world.world_size, rank=world.rank)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    network = nn.parallel.DistributedDataParallel(build_model(num_characters))
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIMIZER)
    scheduler = SCHEDULER(optimizer, num_steps)

    def one_round() -> float:
        sampler.set_epoch(data.epoch)
        started = time.perf_counter()
        for batch in loader:
            optimizer.zero_grad()
            loss_of(network(batch[0]), batch).backward()
            optimizer.step()
            scheduler.step()
        seconds = time.perf_counter() - started
        data.epoch += 1
        return seconds / STEPS

    return Contender(one_round, network.module)


def with_everyrank(parallel: dict[str, Any]) -> SetUp:
    """Return what sets up TrainerDDP with this ``parallel`` section."""

    def set_up(world: everyrank.World, num_steps: int) -> Contender:
        data, _, num_characters = read_text()
        folder = everyrank.broadcast_decision(tempfile.mkdtemp(prefix="slow-link-") if world.is_main else "")
        config = {
            "criterion": loss_of,
            "model": {"type": build_model, "args": [num_characters]},
            "parallel": parallel,
            "training": {
                "path": folder,
                "num_epochs": 10**6,
                "batch_size": BATCH,
                "device": "cpu",
                "optimizer_type": torch.optim.AdamW,
                "optimizer_kwargs": OPTIMIZER,
                "scheduler": {"type": SCHEDULER, "args": [num_steps], "interval": "step"},
                "keep_best": 0,
                "plots": False,
                "progress": "off",
                "tracking": {"tensorboard": False},
            },
        }
        trainer = everyrank.TrainerDDP(config=config, world=world)
        loader, _, _ = trainer.prepare_dataloaders(train_dataset=data)

        def one_round() -> float:
            history, _ = trainer.run_training(loader, until_epoch=trainer.epoch + 1)
            data.epoch += 1
            return history[-1]["seconds"] / STEPS  # of the steps and syncs of the epoch

        return Contender(one_round, trainer.module)

    return set_up


OUTER = {"kwargs": {"lr": 0.7, "momentum": 0.5, "nesterov": True}}
OFTEN = {"every": STEPS // 2, "compress": "bf16"}
CONTENDERS: dict[str, SetUp] = {
    "hand-written DDP": by_hand,
    "everyrank": with_everyrank({}),
    "bf16": with_everyrank({"comm_hook": "bf16", "bucket_cap_mb": 1.0}),
    "fp16": with_everyrank({"comm_hook": "fp16", "bucket_cap_mb": 1.0}),
    "PowerSGD": with_everyrank({"comm_hook": "powersgd", "powersgd_rank": 8, "powersgd_start_step": 8}),
    f"local SGD, {STEPS}": with_everyrank({"local_updates": {"every": STEPS}}),
    f"DiLoCo, {STEPS}": with_everyrank({"local_updates": {"every": STEPS, "outer_optimizer": OUTER}}),
    f"DiLoCo, {STEPS // 2}, bf16": with_everyrank({"local_updates": {**OFTEN, "outer_optimizer": OUTER}}),
}


def bytes_sent() -> int:
    """Return what this host has sent so far on ``eth0``; 0 without such an interface."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def held_out_loss(module: nn.Module) -> float:
    """Return the mean loss on the held-out text, in nats per character."""
    _, held_out, _ = read_text()
    windows = [held_out[index] for index in range(len(held_out))]
    contexts, following = (torch.stack(column) for column in zip(*windows, strict=True))
    with torch.no_grad():
        return loss_of(module(contexts), (contexts, following)).item()


def measure(rounds: int, names: list[str]) -> dict[str, Any]:
    """Run on every rank: let the contenders take turns."""
    torch.set_num_threads(1)
    logging.getLogger("everyrank").setLevel(logging.ERROR)
    logging.getLogger("everyrank").addHandler(logging.NullHandler())
    found: dict[str, Any] = {name: {"seconds": [], "bytes": []} for name in names}
    with everyrank.join(device="cpu") as world:
        contenders = {name: CONTENDERS[name](world, rounds * STEPS) for name in names}
        order = random.Random(0)
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                gc.collect()
                everyrank.barrier()
                before = bytes_sent()
                found[name]["seconds"].append(contenders[name].round())
                everyrank.barrier()
                found[name]["bytes"].append((bytes_sent() - before) / STEPS)
        for name, contender in contenders.items():
            found[name]["loss"] = held_out_loss(contender.module)
            found[name]["model_bytes"] = sum(p.numel() * p.element_size() for p in contender.module.parameters())
    return found


def on_two_hosts(rounds: int, names: list[str], rate_mbit: int) -> list[dict[str, Any]]:
    """Start a rank on each of two hosts and return what they found."""
    from cluster.hosts import network

    with tempfile.TemporaryDirectory(prefix="slow-link-") as folder, network(2, Path(folder)) as hosts:
        processes = []
        for rank, host in enumerate(hosts):
            host.limit(rate_mbit)
            variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "NODE_RANK": rank}
            env = {name: str(value) for name, value in variables.items()}
            env |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0"}
            env |= {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
            arguments = ["--rounds", str(rounds), "--contenders", *names, "--rank-to", f"{folder}/{rank}.json"]
            processes.append(host.start([sys.executable, str(HERE), *arguments], Path(folder), env))
        outputs = [process.communicate()[0] for process in processes]
        for rank, process in enumerate(processes):
            if process.returncode:
                sys.exit(f"rank {rank} failed:\n{outputs[rank]}")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(2)]


def summarise(ranks: list[dict[str, Any]], rate_mbit: int) -> dict[str, dict[str, float]]:
    """Return the numbers of the table by contender."""
    table = {}
    for name in CONTENDERS:
        if name not in ranks[0]:
            continue
        # A step is done when the slower rank has done it. The first round connects, and warms up.
        both = [max(pair) for pair in zip(*(rank[name]["seconds"] for rank in ranks), strict=True)][1:]
        sent = statistics.median(ranks[0][name]["bytes"][1:])
        table[name] = {
            "seconds_per_step": statistics.median(both),
            "bytes_per_step": sent,
            "link_seconds_per_step": sent * 8 / (rate_mbit * 1e6),
            "held_out_loss": ranks[0][name]["loss"],
        }
    base = table.get("hand-written DDP")
    for row in table.values() if base else ():
        row["time_ratio"] = row["seconds_per_step"] / base["seconds_per_step"]
        row["loss_ratio"] = row["held_out_loss"] / base["held_out_loss"]
    return table


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16, help=f"of {STEPS} steps; the first is not timed")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--rate-mbit", type=int, default=RATE_MBIT, help="rate of the link in Mbit/s, each way")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)  # this is a rank: measure, and write there
    arguments = parser.parse_args()
    if arguments.rank_to:
        arguments.rank_to.write_text(json.dumps(measure(arguments.rounds, arguments.contenders)))
        return
    # The hosts are those of the cluster tests.
    sys.path.insert(0, str(HERE.parent.parent / "tests"))
    from cluster.hosts import missing

    if why_not := missing("tc"):
        print(f"slow_link.py needs network namespaces and tc, but {why_not}.", file=sys.stderr)
        sys.exit(2)
    rounds = 2 if arguments.quick else max(2, arguments.rounds)
    ranks = on_two_hosts(rounds, arguments.contenders, arguments.rate_mbit)
    table = summarise(ranks, arguments.rate_mbit)
    model_bytes = next(iter(ranks[0].values()))["model_bytes"]
    print(f"\n2 hosts, {arguments.rate_mbit} Mbit/s, {model_bytes / 1e6:.1f} MB of parameters, batch {BATCH} per rank,")
    print(f"{rounds * STEPS} steps, median of {rounds - 1} rounds; guessing blindly is a loss of {blind_loss():.2f}")
    print(f"  {'':<18} {'ms/step':>8} {'ratio':>6} {'kB sent':>8} {'ms of link':>10} {'loss':>7} {'ratio':>6}")
    for name, row in table.items():
        print(
            f"  {name:<18} {1e3 * row['seconds_per_step']:8.1f} {row.get('time_ratio', math.nan):6.3f} "
            f"{row['bytes_per_step'] / 1e3:8.1f} {1e3 * row['link_seconds_per_step']:10.1f} "
            f"{row['held_out_loss']:7.4f} {row.get('loss_ratio', math.nan):6.3f}"
        )
    if arguments.json:
        about = {"torch": torch.__version__, "rate_mbit": arguments.rate_mbit, "model_bytes": model_bytes}
        about |= {"batch_per_rank": BATCH, "steps_per_round": STEPS, "rounds": rounds, "cores": os.cpu_count()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"about": about, "results": table}, indent=1) + "\n")


def blind_loss() -> float:
    """Return the loss of a model that gives all characters the same chance."""
    return math.log(read_text()[2])


if __name__ == "__main__":
    main()
