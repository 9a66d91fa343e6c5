"""FSDP2 (meta device, mixed precision, a checkpoint), FSDP and tensor parallelism; on CUDA if there is any."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

KIND = "cuda" if torch.cuda.is_available() else "cpu"


def layers():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def start_values(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        full = torch.rand(parameter.shape) - 0.5
        if hasattr(parameter, "device_mesh"):
            full = torch.distributed.tensor.distribute_tensor(full, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.copy_(full)


def train(model, steps, per_rank=True):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=True)
    losses = []
    for step in range(steps):
        torch.manual_seed(100 * step + (dist.get_rank() if per_rank else 0))
        inputs = torch.rand(6, 8).to(KIND)
        loss = (model(inputs).float() ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return optimizer, losses


def fsdp2(device, folder):
    with torch.device("meta"):
        model = layers()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(KIND, (dist.get_world_size(),))
    assert mesh.device_type == KIND
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    start_values(model)
    assert next(model.parameters()).device == device
    optimizer, losses = train(model, 6)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    before = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    start_values(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert all(torch.equal(before[name], after[name]) and not after[name].is_cuda for name in before)
    return losses


def tensor_parallel():
    mesh = init_device_mesh(KIND, (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = layers().to(KIND)
    start_values(model)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return train(model, 6, per_rank=False)[1]


def fsdp1(local_rank):
    model = layers()
    start_values(model)
    return train(FullyShardedDataParallel(model, device_id=local_rank if KIND == "cuda" else None), 6)[1]


def main():
    local_rank = int(os.environ["LOCAL_RANK"])  # noqa: ER009
    device = torch.device("cpu")
    if KIND == "cuda":
        device = torch.device(KIND, local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)  # noqa: ER105
    else:
        dist.init_process_group("gloo")  # noqa: ER105
    parts = {"fsdp2": fsdp2(device, sys.argv[1]), "tensor parallel": tensor_parallel()}
    if KIND == "cuda":  # the first FSDP has no CPU path of its own to compare with
        parts["fsdp1"] = fsdp1(local_rank)
    for name, losses in parts.items():
        # One write: torchrun's ranks share a pipe, and print() would write the line's end by itself.
        said = " ".join(f"{loss:.6f}" for loss in losses)
        sys.stdout.write(f"rank {dist.get_rank()} {name} on {KIND}: {said}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
