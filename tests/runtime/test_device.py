"""The local rank picks the device. The GPUs here are counted by a stand-in; the choice is ours."""

from __future__ import annotations

import pytest
import torch

from everyrank.errors import ConfigError
from everyrank.launch_env.process_environment import ProcessEnvironment
from everyrank.runtime.device import bind_device, choose_backend


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that shows this process some GPUs; the list holds their number, then those made current."""
    seen = [2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen[0] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device.index))
    return seen


def _rank(rank: int, local_rank: int) -> ProcessEnvironment:
    return ProcessEnvironment(rank=rank, local_rank=local_rank, world_size=8, local_world_size=4)


def test_the_local_rank_picks_the_gpu_before_anything_else_happens(gpus: list[int]) -> None:
    assert bind_device(_rank(5, 1)) == torch.device("cuda:1")  # never rank % device_count
    assert gpus[1:] == [1]


def test_one_visible_gpu_is_everybodys_device_0(gpus: list[int]) -> None:
    gpus[0] = 1
    assert bind_device(_rank(3, 3)) == torch.device("cuda:0")


def test_more_processes_than_gpus_names_both(gpus: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"local rank 3 needs GPU 3, but 2 GPUs are visible.*start at most 2"):
        bind_device(_rank(3, 3))
    with pytest.raises(ConfigError, match=r"device='cuda:7' needs GPU 7, but 2 GPUs"):
        bind_device(_rank(0, 0), "cuda:7")


def test_a_device_that_was_asked_for_is_taken(gpus: list[int]) -> None:
    assert bind_device(_rank(1, 1), "cpu") == torch.device("cpu")
    assert bind_device(_rank(1, 1), "cuda:0") == torch.device("cuda:0")
    gpus[0] = 0
    assert bind_device(_rank(1, 1)) == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no CUDA GPU"):
        bind_device(_rank(1, 1), "cuda")


def test_the_backend_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert [choose_backend(b, cpu) for b in ("auto", None, "gloo", "GLOO")] == ["gloo"] * 4
    assert [choose_backend(b, gpu) for b in ("auto", None, "nccl", "gloo")] == ["nccl", "nccl", "nccl", "gloo"]
    assert choose_backend("cpu:gloo,cuda:nccl", gpu) == "cpu:gloo,cuda:nccl"
    with pytest.raises(ConfigError, match="backend='nccl' was asked for, but this process's device is cpu"):
        choose_backend("nccl", cpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert choose_backend("auto", gpu) == "gloo"
    with pytest.raises(ConfigError, match="built without nccl"):
        choose_backend("nccl", gpu)
