"""What torch's own tests of its launchers ask: every variable that torchrun promises, and a meeting by an address."""

import os

import torch
import torch.distributed as dist

for name in (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE"),
):
    assert os.environ[name], name
assert dist.is_torchelastic_launched()
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # noqa: ER009
address = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
ranks = torch.nn.functional.one_hot(torch.tensor(rank), num_classes=size)
dist.all_reduce(ranks)
print(f"launcher rank {rank} of {size}: {ranks.tolist()} came", flush=True)
dist.destroy_process_group()
