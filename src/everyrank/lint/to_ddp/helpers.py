"""The few lines that a changed program is given: plain PyTorch, no import of everyrank."""

from __future__ import annotations

from collections.abc import Collection

IMPORTS = {
    "contextlib": "import contextlib",
    "os": "import os",
    "torch": "import torch",
    "dist": "import torch.distributed as dist",
    "DistributedDataParallel": "from torch.nn.parallel import DistributedDataParallel",
    "DataLoader": "from torch.utils.data import DataLoader",
    "BatchSampler": "from torch.utils.data import BatchSampler",
    "RandomSampler": "from torch.utils.data import RandomSampler",
    "Sampler": "from torch.utils.data import Sampler",
    "SequentialSampler": "from torch.utils.data import SequentialSampler",
}

_DATA = "from torch.utils.data import "


def merged(lines: Collection[str]) -> list[str]:
    """Return lines of imports, those from ``torch.utils.data`` as one."""
    names = [line.removeprefix(_DATA) for line in lines if line.startswith(_DATA)]
    others = [line for line in lines if not line.startswith(_DATA)]
    return [*others, *([_DATA + ", ".join(names)] if names else [])]


RANKS = '''
RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def join():
    """Meet the other ranks that the launcher started; without a launcher be a world of one."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
'''

LOADER = '''
class RankBatches(Sampler):
    """This rank's share of each batch that one process would make, in the same order."""

    def __init__(self, dataset, batch_size, shuffle, drop_last, generator):
        self.order = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
        self.batches = BatchSampler(self.order, batch_size, drop_last)
        self.draws_seed = shuffle and generator is None

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        if self.draws_seed:
            seed = [int(torch.empty((), dtype=torch.int64).random_())]  # as RandomSampler draws it
            dist.broadcast_object_list(seed, src=0)  # rank 0's, in case the ranks' generators differ
            self.order.generator = torch.Generator().manual_seed(seed[0])
        for batch in self.batches:
            yield batch[RANK::WORLD_SIZE] or batch[:1]  # a rank without a sample takes part with weight 0

    def loss_weight(self, step):
        """What to scale this rank's mean loss by, so that the mean over ranks is the mean over the batch."""
        size = min(self.batches.batch_size, len(self.order) - step * self.batches.batch_size)
        return len(range(RANK, size, WORLD_SIZE)) * WORLD_SIZE / size


class RankLoader(DataLoader):
    """A DataLoader of this rank's shares; loss_weight is that of the batch it gave last."""

    def __init__(self, dataset, batch_size=1, shuffle=False, *, drop_last=False, generator=None, **options):
        batches = RankBatches(dataset, batch_size, shuffle, drop_last, generator)
        super().__init__(dataset, batch_sampler=batches, generator=generator, **options)

    def __iter__(self):
        for step, batch in enumerate(super().__iter__()):
            self.loss_weight = self.batch_sampler.loss_weight(step)
            yield batch
'''

MEAN = '''
def global_mean(value, weight):
    """The mean over all ranks' samples of a mean over this rank's; every rank must call it."""
    total = torch.as_tensor(value).detach().double() * weight
    dist.all_reduce(total)
    return float(total) / WORLD_SIZE
'''

PRINT = '''
def print0(*values, **options):
    """Print on rank 0; what is printed is computed on every rank."""
    if RANK == 0:
        print(*values, **options)
'''

FIRST = '''
@contextlib.contextmanager
def rank0_first():
    """Let rank 0 download what the others then find."""
    if RANK != 0:
        dist.barrier()
    yield
    if RANK == 0:
        dist.barrier()
'''

BARE = '''
def bare(model):
    """The model without its wrapper: for its state dict, methods and attributes."""
    return getattr(model, "module", model)
'''
