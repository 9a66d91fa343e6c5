"""What is right and fast on a GPU, as far as a rehearsal on the CPU can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from conftest import ROOT
from everyrank import TrainerDDP
from everyrank.cli.commands import report
from everyrank.errors import ConfigError
from everyrank.training.config import read_config
from everyrank.training.hardware.flops import peak_flops

PROGRAM = Path(__file__).parent / "programs" / "on_gpu.py"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process that believes in two GPUs has seen."""
    command = [sys.executable, "-m", "everyrank.rehearsal", "-n", "2", "--", sys.executable, PROGRAM]
    folder = tmp_path_factory.mktemp("gpu")
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, folder], env=environ, capture_output=True, text=True, timeout=250, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.rpartition("ANSWERS ")[2]))


def test_a_criterion_is_where_the_batches_are(answers: dict[str, Any]) -> None:
    found = answers["where_a_criterion_is"]
    assert found["training"] == ["cuda:1 torch.float64"]
    assert found["validation"] == ["cuda:0 torch.float64"]


def test_the_device_that_is_asked_for_is_the_current_one(answers: dict[str, Any]) -> None:
    found = answers["where_a_criterion_is"]
    assert found["current"] == 1
    assert found["streams"] == "cuda:1"
    missing = answers["a_device_that_is_not_there"]
    assert "training.device is 'cuda:7', but 2 GPUs are visible to this process. Fix:" in missing["error"]
    assert not missing["folder"]


def test_a_checkpoint_is_copied_after_its_writers_and_beside_the_training(answers: dict[str, Any]) -> None:
    """A copy within the GPU on the stream that wrote each tensor, and from there to the host on another."""
    found = answers["in_which_order_a_snapshot_copies"]
    first, again, without_room = found["calls"]
    for device, calls in (("cuda:1", first[:4]), ("cuda:0", first[4:])):
        assert calls == [
            ["clone", device, "writer"],
            ["wait", device, "writer", True],
            ["copy", device, "side", True, False],
            ["event", device, "side"],
        ]
    assert again == first
    for device, calls in (("cuda:1", without_room[:2]), ("cuda:0", without_room[2:])):
        assert calls == [["copy", device, "writer", True, True], ["event", device, "writer"]]
    assert found["pinned"]
    assert found["reused"], "memory is set aside once"
    assert found["values"] == [1.0, 1.0, 1.0]


def test_the_keys_hold_while_the_trainer_works_and_no_longer(answers: dict[str, Any]) -> None:
    found = answers["what_the_keys_change"]
    plain = found["plain"]
    assert plain["inside"] == plain["before"] == plain["after"], "nothing that nobody asked for"
    inside = found["set"]["inside"]
    assert inside == {"precision": ["tf32", "tf32"], "benchmark": True, "gc": [False, True]}
    assert found["off"]["inside"] == {**plain["inside"], "precision": ["ieee", "ieee"], "benchmark": False}
    for name in ("set", "off"):
        assert found[name]["after"] == found[name]["before"] == plain["before"]
    # Of 11 steps: after warm-up, the fourth and the eighth.
    assert found["set"]["collected"] == 3


def test_optimizers_are_fused_where_nobody_has_said_how(answers: dict[str, Any]) -> None:
    found = answers["which_optimizers_are_fused"]
    assert found["cases"] == {
        "SGD": [True],
        "AdamW": [True],
        "asked not to": [None],
        "a group asked not to": [None, False],
        "fp16": [None],
        "Adadelta": [None],
        "Adagrad": [None],
        "sparse gradients": [None],
        "CPU": [None],
    }
    assert found["moved"] == [[None, 11], [True, 22], [None, 33]], "a checkpoint tells what to do, not how"


def test_batches_come_ahead_and_fail_in_their_own_step(answers: dict[str, Any]) -> None:
    found = answers["how_batches_travel"]
    given = ["main waits", "guarded for main"]
    steps = [f"step {n}: [{n}.0, {n}.0] torch.float64 cuda:1" for n in (0, 1)]
    copies = [[f"load {n}", f"copy {n} on side, non_blocking=True"] for n in (0, 1)]
    failed = ["step 2: sample 20 is damaged", "over"]
    assert found["ahead"] == [*copies[0], *copies[1], *given, steps[0], "load 2", *given, steps[1], *failed]
    assert found["in turn"] == [*copies[0], *given, steps[0], *copies[1], *given, steps[1], "load 2", *failed]
    assert found["pinned"] == {"cuda:1": True, "cpu": False}


def test_a_step_and_a_batch_never_wait_for_the_device(answers: dict[str, Any]) -> None:
    found = answers["what_waits_for_the_device"]
    assert found["steps"].pop("looks at each step") == {"_local_scalar_dense": 3}, "which shows that waits are counted"
    assert found["steps"] == {name: {} for name in ("plain", "everything", "AdamW", "weighted")}
    (few, of_few), (many, of_many) = found["evaluations"]
    assert (few, many) == (3, 7)
    assert of_few == of_many


def test_the_same_comes_out_as_on_the_cpu(answers: dict[str, Any]) -> None:
    found = answers["what_comes_out"]
    assert found["gpu"] == found["ahead"] == found["cpu"]


class Convolutions(nn.Sequential):
    """Two layers; the first notes how its input lies in memory."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 4), nn.Flatten())
        self.seen: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(x.is_contiguous(memory_format=torch.channels_last))
        return super().forward(x)


def test_channels_last_is_another_layout_of_the_same_numbers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, 6, 6, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, x.mean((2, 3))[:, :2])
    trainers = {}
    for last in (False, True):
        config = tiny.make_config(tmp_path / str(last), channels_last=last, num_epochs=2, checkpoint_at=1)
        config["model"] = {"type": Convolutions}
        for epochs in (1, 2):  # the second goes on from the first's checkpoint
            config["training"]["num_epochs"] = epochs
            trainers[last] = trainer = TrainerDDP(config=config)
            trainer.prepare_dataloaders(train_dataset=data, val_dataset=data)
            trainer.run_training()
        assert trainer.step == 6
        assert trainer.module.seen == {last}, "in training and in validation"
        weight = trainer.module[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
    for one, other in zip(*(trainer.module.parameters() for trainer in trainers.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    config["parallel"] = {"strategy": "fsdp2"}
    with pytest.raises(ConfigError, match=r"training.channels_last: parallel.strategy fsdp2 .* leave it false"):
        read_config(config)


def test_the_use_of_a_gpu_is_told_where_its_peak_is_known(answers: dict[str, Any]) -> None:
    found = answers["how_much_of_a_gpu_is_used"]
    known, unknown = (found["rows"][name] for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA Unheard-Of"))
    # Per sample 4 x 8 and 8 x 2 multiplications and additions forward; backward once as many for each layer's weights,
    # and once more for the second layer's input.
    per_sample = 2 * (2 * 4 * 8 + 3 * 8 * 2)
    for row in (known, unknown):
        assert row["tflops_per_s"] * 1e12 == pytest.approx(per_sample * row["samples_per_s"])
    assert known["mfu"] == pytest.approx(known["tflops_per_s"] / 19.5)  # of float32 without TF32
    assert "mfu" not in unknown
    assert report.main([str(Path(found["folder"]) / "NVIDIA A100-SXM4-80GB")]) == 0
    page = (Path(found["folder"]) / "NVIDIA A100-SXM4-80GB" / "report.html").read_text()
    assert "samples/s" in page
    assert "MFU" in page


def test_peaks_are_those_of_the_very_device() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA A10G": None,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": None,
        "Tesla T4": 65e12,
    }
    assert {name: peak_flops(name, "half") for name in names} == names
    assert peak_flops("Tesla T4", "tf32") == peak_flops("Tesla T4", "float32") == 8.1e12
    assert peak_flops("NVIDIA L4", "float64") is None


@pytest.mark.nightly
def test_the_benchmark_for_gpus_runs_to_its_end(tmp_path: Path) -> None:
    """So that its first hour on a GPU is not spent on its mistakes; the figures mean nothing here."""
    benchmark, written = ROOT / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "everyrank.rehearsal",
        "--",
        sys.executable,
        benchmark,
        "--tiny",
        "--json",
        written,
    ]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert found["tiny"] is True
    assert set(found["vrt"]) == {"everyrank fp32", "everyrank fp32 compiled", "reference fp32"}
    assert found["vrt"]["everyrank fp32"]["speed_ratio"] > 0
    assert found["gpt2"]["eager"]["ratio"] > 0
    assert found["gpt2"]["compiled"]["TrainerDDP_tokens_per_s"] > 0
    assert found["checkpoint"]["ratio"] > 0
    assert found["join"]["ranks"] == 1
