"""Rules about numbers that each rank has for itself: ER206, ER501 to ER503."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding
from everyrank.lint.module import identifiers
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_REDUCED = re.compile(r"reduce(?!LR)|gather|torchmetrics|synchronize_between|average_across|sync_", re.IGNORECASE)
_AUGMENTS = re.compile(r"\bRandom[A-Z]\w+|transforms\.Random|\baugment|ColorJitter|AutoAugment", re.IGNORECASE)
_LOGS = re.compile(r"^print$|(?:^|\.)log(?:ger|ging)?\.(?:info|debug|warning)$|add_scalar$|wandb\.log$")
_LOSS = re.compile(r"loss|acc|metric|score|psnr|error", re.IGNORECASE)


def printed_unreduced(program: Program) -> Iterator[Finding]:
    """A loss is printed that is only this rank's (hint).

    Finds: `print` or a logger with a loss in a distributed program that reduces nothing.

    Why it hurts: The number is of rank 0's share of the data. It is noisier than the real one, and two runs with other
    numbers of ranks cannot be compared.

    The change: Average it over the ranks first (`everyrank.reduce_mean`, or `dist.all_reduce` and a division).

    Before:

        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net, batch):
            model = DistributedDataParallel(net)
            loss = model(batch).sum()
            loss.backward()
            print("loss", loss.item())

    After:

        import everyrank
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net, batch):
            model = DistributedDataParallel(net)
            loss = model(batch).sum()
            loss.backward()
            print("loss", everyrank.reduce_mean(loss.item()))
    """
    module = program.module
    if not program.is_distributed or _REDUCED.search(module.text):
        return
    for call, name in module.calls:
        words = [word for value in call.args for word in identifiers(value) if " " not in word]
        if _LOGS.search(name) and any("loss" in word.lower() for word in words):
            yield module.finding("ER501", call, "This is one rank's loss. Fix: average it over the ranks first.")


def decided_unreduced(program: Program) -> Iterator[Finding]:
    """Each rank decides by its own number.

    Finds: A learning-rate scheduler that is stepped with a loss, or a loop that is left because of one, in a
    program that shares its data by a DistributedSampler and reduces nothing.

    Why it hurts: The ranks have different losses. One lowers its learning rate and the others do not: the weights part,
    silently. Or one leaves the loop, and the others wait in the next step.

    The change: Average the number over the ranks before deciding.

    Before:

        import torch
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data.distributed import DistributedSampler

        def train(net, dataset, validate):
            model = DistributedDataParallel(net)
            sampler = DistributedSampler(dataset)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=1))
            val_loss = validate(model, sampler)
            scheduler.step(val_loss)

    After:

        import everyrank
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data.distributed import DistributedSampler

        def train(net, dataset, validate):
            model = DistributedDataParallel(net)
            sampler = DistributedSampler(dataset)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=1))
            val_loss = everyrank.reduce_mean(validate(model, sampler))
            scheduler.step(val_loss)
    """
    module = program.module
    if not program.wraps or _REDUCED.search(module.text):
        return
    if "DistributedSampler" not in module.text or "ReduceLROnPlateau" not in module.text:
        return
    for call, name in module.calls:
        steps = name.endswith(".step") and "sched" in name.lower() and len(call.args) == 1
        by_loss = steps and any(_LOSS.search(word) for word in identifiers(call.args[0]))
        if by_loss and not program.guards.is_guarded(call):
            yield module.finding(
                "ER502",
                call,
                "Each rank steps its scheduler with a loss of its own, and their learning rates part. "
                "Fix: average it over the ranks first.",
            )


def mean_of_means(program: Program) -> Iterator[Finding]:
    """A metric is averaged over batches of unequal size (hint).

    Finds: A sum of `loss.item()` divided by `len(loader)`.

    Why it hurts: The last batch is shorter and counts as much as the others, and so do the ranks' unequal shares: the
    number depends on the batch size and on the world size.

    The change: Sum `loss.item() * batch_size`, and divide by the number of samples.

    Before:

        import torch.distributed as dist

        def evaluate(model, loader):
            total = 0.0
            for batch in loader:
                total += model(batch).item()
            return total / len(loader)

    After:

        import torch.distributed as dist

        def evaluate(model, loader):
            total, count = 0.0, 0
            for batch in loader:
                total += model(batch).item() * len(batch)
                count += len(batch)
            return total / count
    """
    module = program.module
    sums = {
        module.dotted(node.target)
        for node in module.of_type(ast.AugAssign)
        if isinstance(node.op, ast.Add) and ".item()" in ast.unparse(node.value) and "*" not in ast.unparse(node.value)
    }
    for node in module.of_type(ast.BinOp):
        if not isinstance(node.op, ast.Div) or module.dotted(node.left) not in sums:
            continue
        if re.fullmatch(r"len\(\w*loader\w*\)", ast.unparse(node.right)):
            yield module.finding(
                "ER503", node, "The last, shorter batch counts as much as the others. Fix: weight by samples."
            )


def equal_seeds(program: Program) -> Iterator[Finding]:
    """All ranks are seeded alike while the data is augmented at random (hint).

    Finds: `torch.manual_seed` with a value that does not depend on the rank, in a distributed program with random
    augmentations.

    Why it hurts: The loader's workers are seeded from it: the ranks draw the same crops, flips and noise, and there is
    less variety than there seems to be.

    The change: Add the rank to the seed (after the weights are made, or let DistributedDataParallel make them equal).

    Before:

        import torch
        import torch.distributed as dist
        from torchvision.transforms import RandomCrop

        def main():
            dist.init_process_group("gloo")
            torch.manual_seed(0)
            crop = RandomCrop(32)
            dist.destroy_process_group()

    After:

        import torch
        import torch.distributed as dist
        from torchvision.transforms import RandomCrop

        def main():
            dist.init_process_group("gloo")
            torch.manual_seed(0 + dist.get_rank())
            crop = RandomCrop(32)
            dist.destroy_process_group()
    """
    module = program.module
    if not program.is_distributed or not _AUGMENTS.search(module.text):
        return
    for call, name in module.calls:
        if name != "torch.manual_seed" or not call.args:
            continue
        seed = call.args[0]
        sources = [call, *(program.values_of(seed) if isinstance(seed, ast.Name) else ())]
        if not any("rank" in ast.unparse(source) for source in sources):
            yield module.finding("ER206", call, "All ranks draw the same augmentations. Fix: add the rank to the seed.")


RULES = (
    Rule("ER206", "equal-seeds", {"python": equal_seeds}, default=False),
    Rule("ER501", "printed-unreduced", {"python": printed_unreduced}, default=False),
    Rule("ER502", "decided-unreduced", {"python": decided_unreduced}),
    Rule("ER503", "mean-of-means", {"python": mean_of_means}, default=False),
)
