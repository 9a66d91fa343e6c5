"""What a trainer does on a GPU, rehearsed in one process that is shown two of them; prints the answers as JSON."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from everyrank import TrainerDDP, current_world, hash_weights, read_config
from everyrank.checkpoint.snapshot import Snapshot
from everyrank.errors import ConfigError
from everyrank.training.build import build_parts, make_criterion
from everyrank.training.hardware.feeding import OnGpu
from everyrank.training.step import TrainStep


class Weighted(nn.Module):
    """A weighted squared error; its weights are a buffer in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0]))
        self.seen: set[str] = set()

    def forward(self, output: Tensor, data: Any) -> Tensor:
        """Return the mean over samples and columns."""
        self.seen.add(f"{self.weight.device} {self.weight.dtype}")
        return ((output - data[1]).square() * self.weight).mean()


class SparseNet(tiny.TinyNet):
    """A network with an embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Embedding(3, 2, sparse=True)


def make_trainer(folder: Path, criterion: Any = tiny.compute_loss, **training: Any) -> TrainerDDP:
    """Return a trainer on ``cuda:1`` with its data; validated on ``cuda:0``."""
    validation = {"batch_size": 7, "validator": {"device": "cuda:0"}}
    given = {"device": "cuda:1", "num_epochs": 1, "validation": validation, **training}
    model = given.pop("model", None)
    config = {**tiny.make_config(folder, **given), "criterion": criterion}
    if model is not None:
        config["model"] = {"type": model}
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(23, seed=1))
    return trainer


def where_a_criterion_is(folder: Path) -> dict[str, Any]:
    """The criterion's weights follow the batches, on both devices."""
    criterion = Weighted()
    trainer = make_trainer(folder, criterion)
    trainer.run_training()
    return {
        "training": sorted(criterion.seen),
        "validation": sorted(trainer.validator.criterion.seen),
        "current": torch.cuda.current_device(),
        "streams": str(torch.cuda.current_stream().device),
    }


def a_device_that_is_not_there(folder: Path) -> dict[str, Any]:
    """The error for it, and whether it has left a folder."""
    try:
        make_trainer(folder, device="cuda:7")
    except ConfigError as error:
        return {"error": str(error), "folder": folder.exists()}
    return {}


def in_which_order_a_snapshot_copies(folder: Path) -> dict[str, Any]:
    """Tensors on both devices, the second's on a stream of its own, copied while the first device is current."""
    calls: list[list[Any]] = []
    written = {}

    def on(device: torch.device) -> str:
        return "writer" if torch.cuda.current_stream(device) == written[device.index] else "side"

    def record(self: Any, stream: Any = None) -> None:
        calls.append(["event", str(stream.device), "writer" if stream == written[stream.device.index] else "side"])
        real[torch.cuda.Event, "record"](self, stream)

    def wait_stream(self: Any, stream: Any) -> None:
        waits_for = "writer" if stream == written[stream.device.index] else "side"
        calls.append(["wait", str(self.device), waits_for, self != stream])
        real[torch.cuda.Stream, "wait_stream"](self, stream)

    def clone(self: Tensor, **kwargs: Any) -> Tensor:
        if self.is_cuda:
            calls.append(["clone", str(self.device), on(self.device)])
        return real[Tensor, "clone"](self, **kwargs)

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        is_itself = source.data_ptr() in (x.data_ptr(), y.data_ptr())
        calls.append(["copy", str(source.device), on(source.device), non_blocking, is_itself])
        return real[Tensor, "copy_"](self, source, non_blocking)

    spies: dict[tuple[Any, str], Any] = {
        (torch.cuda.Event, "record"): record,
        (torch.cuda.Stream, "wait_stream"): wait_stream,
        (Tensor, "clone"): clone,
        (Tensor, "copy_"): copy_,
    }
    real = {(owner, name): getattr(owner, name) for owner, name in spies}
    torch.cuda.set_device(0)
    side = torch.cuda.Stream(1)
    x, y = torch.ones(3, device="cuda:1"), torch.full((2,), 2.0, device="cuda:0")
    groups = {"a": {"x": x}, "b": {"y": y}}
    snapshot, mem_get_info = Snapshot(), torch.cuda.mem_get_info
    found: dict[str, Any] = {}
    try:
        with torch.cuda.stream(side):
            torch.cuda.set_device(0)
            written.update({0: torch.cuda.current_stream(0), 1: side})
            for (owner, name), spy in spies.items():
                setattr(owner, name, spy)
            taken = []
            for free in (10**15, 10**15, -(10**15)):
                torch.cuda.mem_get_info = lambda device=None, free=free: (free, 10**15)  # type: ignore[assignment]
                calls.clear()
                taken.append(snapshot.take(groups))
                found.setdefault("calls", []).append(list(calls))
        snapshot.synchronize()
    finally:
        torch.cuda.mem_get_info = mem_get_info
        for (owner, name), original in real.items():
            setattr(owner, name, original)
    first, *_, last = (group["a"].data for group in taken)
    return found | {
        "pinned": first.is_pinned(),
        "reused": first.data_ptr() == last.data_ptr(),
        "values": last.view(torch.float32).tolist(),
    }


def what_comes_out(folder: Path) -> dict[str, str]:
    """The weights after a training, by where it ran; the step's own kernels are the CPU's."""
    found = {}
    for name, keys in {
        "cpu": {"device": "cpu", "validation": {"batch_size": 7}},
        "gpu": {},
        "ahead": {"num_workers": 1},
    }.items():
        kwargs = {"lr": 0.05, "momentum": 0.9, "fused": False}
        trainer = make_trainer(folder / name, optimizer_kwargs=kwargs, dropout=0.1, **keys)
        trainer.run_training()
        found[name] = hash_weights(trainer.module.cpu())
    return found


class Waits(TorchDispatchMode):
    """Counts what waits for all that a GPU was given: a value that is read, a shape that depends on values."""

    names = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._real = {name: getattr(Tensor, name) for name in ("tolist", "cpu", "numpy", "to")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += name in self.names
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for name, real in self._real.items():
            setattr(Tensor, name, self._counting(name, real))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name, real in self._real.items():
            setattr(Tensor, name, real)

    def _counting(self, name: str, real: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            to_host = name != "to" or (tensor.is_cuda and "cpu" in str(args[:1]))
            self.counts[name] += to_host
            return real(tensor, *args, **kwargs)

        return call

    def found(self) -> dict[str, int]:
        """What was counted, without zeros."""
        return {name: count for name, count in sorted(self.counts.items()) if count}


def what_waits_for_the_device(folder: Path) -> dict[str, Any]:
    """Waits in three steps, by what a step does besides; and in evaluations of few batches and of many."""
    device, (x, y) = torch.device("cuda:0"), tiny.make_data(10).tensors
    scheduler = {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 2}, "interval": "step"}
    everything = {"clip_grad_norm": 1.0, "clip_grad_value": 1.0, "ema": {"decay": 0.9}, "scheduler": scheduler}
    adamw = {"optimizer_type": torch.optim.AdamW, "optimizer_kwargs": {"lr": 1e-3}}
    steps = {}
    for name, keys in {
        "plain": {},
        "everything": {**everything, "mixed_precision": "bf16"},
        "AdamW": {**everything, **adamw},
        "weighted": {"clip_grad_norm": 1.0, "criterion": Weighted()},
        "looks at each step": {"nan_policy": "skip"},
    }.items():
        criterion = keys.pop("criterion", tiny.compute_loss)
        config = read_config({**tiny.make_config(folder, device="cuda:0", **keys), "criterion": criterion})
        step = TrainStep(build_parts(config, current_world(), device), make_criterion(config, device), config, device)
        batches = step.feed.of(None, iter([(x, y)] * 8))
        step(batches, [0.5, 0.5])
        with Waits() as waits:
            for weights in ([1.0], [0.25], [0.5, 0.5]):
                step(batches, weights)
        steps[name] = waits.found()
    counts = []
    for num_samples in (21, 63):
        trainer = make_trainer(folder, device="cuda:0", validation={"metrics": {"error": tiny.mean_error}})
        loader = trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(num_samples))[1]
        trainer.validator.evaluate(trainer.module, loader)
        with Waits() as waits:
            trainer.validator.evaluate(trainer.module, loader)
        counts.append([len(loader), waits.found()])
    return {"steps": steps, "evaluations": counts}


def how_much_of_a_gpu_is_used(folder: Path) -> dict[str, Any]:
    """The figures of an epoch, on devices with these names."""
    found = {}
    named = torch.cuda.get_device_name
    try:
        for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA Unheard-Of"):
            torch.cuda.get_device_name = lambda device=None, name=name: name
            keys = {"count_flops": True, "dtype": "float32", "accumulation_steps": 2}
            trainer = make_trainer(folder / name, **keys)
            trainer.run_training()
            found[name] = trainer.history.epochs[-1]
    finally:
        torch.cuda.get_device_name = named
    return {"rows": found, "folder": str(folder)}


def how_batches_travel(folder: Path) -> dict[str, Any]:
    """The order of calls for batches of a loader; one of them cannot be loaded."""
    calls: list[str] = []
    cuda = torch.cuda
    wait, record = cuda.Stream.wait_event, Tensor.record_stream

    def stream_name() -> str:
        return "main" if cuda.current_stream(1) == cuda.default_stream(1) else "side"

    def wait_event(self: Any, event: Any) -> None:
        calls.append(f"{'main' if self == cuda.default_stream(1) else 'side'} waits")
        wait(self, event)

    def record_stream(self: Tensor, stream: Any) -> None:
        calls.append(f"guarded for {'main' if stream == cuda.default_stream(1) else 'side'}")
        record(self, stream)

    class Host(Tensor):
        """A tensor that tells on which stream it is copied."""

        def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append(f"copy {int(self[0])} on {stream_name()}, non_blocking={kwargs.get('non_blocking')}")
            return self.as_subclass(Tensor).to(*args, **kwargs)

    def load() -> Iterator[Any]:
        for number in range(3):
            calls.append(f"load {number}")
            if number == 2:
                raise OSError("sample 20 is damaged")
            yield {"x": torch.full((2,), float(number)).as_subclass(Host), "name": "n"}

    cuda.Stream.wait_event, Tensor.record_stream = wait_event, record_stream  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    try:
        for ahead in (True, False):
            calls.clear()
            batches = OnGpu(load(), torch.device("cuda:1"), torch.float64, ahead=ahead)
            for number in range(3):
                try:
                    x = next(batches)["x"]
                    calls.append(f"step {number}: {x.tolist()} {x.dtype} {x.device}")
                except OSError as error:
                    calls.append(f"step {number}: {error}")
            calls.append("over" if next(batches, None) is None else "more")
            found["ahead" if ahead else "in turn"] = list(calls)
    finally:
        cuda.Stream.wait_event, Tensor.record_stream = wait, record  # type: ignore[method-assign]
    pinned = {}
    for device in ("cuda:1", "cpu"):
        loader = make_trainer(folder, device=device, validation={"batch_size": 7}).prepare_dataloaders(
            train_dataset=tiny.make_data()
        )[0]
        pinned[device] = next(iter(loader))[0].is_pinned()
    return {**found, "pinned": pinned}


def what_the_keys_change(folder: Path) -> dict[str, Any]:
    """What holds inside of a step, before and afterwards, with each key and without."""

    def now() -> dict[str, Any]:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return {
            "precision": [matmul.fp32_precision, cudnn.conv.fp32_precision],  # type: ignore[attr-defined]
            "benchmark": cudnn.benchmark,
            "gc": [gc.isenabled(), gc.get_freeze_count() > 0],
        }

    found: dict[str, Any] = {}
    for name, keys in {
        "plain": {},
        "set": {"tf32": True, "cudnn_benchmark": True, "gc_every_steps": 4},
        "off": {"tf32": False, "cudnn_benchmark": False},
    }.items():
        seen: list[dict[str, Any]] = []

        def criterion(output: Tensor, data: Any) -> Tensor:
            seen.append(now())  # noqa: B023
            return tiny.compute_loss(output, data)

        before = now()
        collected: list[int] = []

        def note(phase: str, info: dict[str, int]) -> None:
            if phase == "start":
                collected.append(info["generation"])  # noqa: B023

        trainer = make_trainer(folder / name, criterion, **keys)
        gc.callbacks.append(note)
        try:
            trainer.run_training()
        finally:
            gc.callbacks.remove(note)
        found[name] = {"before": before, "inside": seen[9], "after": now(), "collected": len(collected)}
    return found


def which_optimizers_are_fused(folder: Path) -> dict[str, Any]:
    """The answer of an optimizer's group, by what was configured; and what a checkpoint of the CPU changes."""
    adamw = {"optimizer_type": torch.optim.AdamW, "optimizer_kwargs": {"lr": 1e-3}}
    cases: dict[str, dict[str, Any]] = {
        "SGD": {},
        "AdamW": adamw,
        "asked not to": {**adamw, "optimizer_kwargs": {"foreach": True}},
        "a group asked not to": {**adamw, "parameter_groups": [{"match": ["0"], "optimizer_kwargs": {"fused": False}}]},
        "fp16": {**adamw, "mixed_precision": "fp16", "dtype": None},
        "Adadelta": {"optimizer_type": torch.optim.Adadelta, "optimizer_kwargs": {}},
        "Adagrad": {"optimizer_type": torch.optim.Adagrad, "optimizer_kwargs": {}},  # fused on a CPU only
        "sparse gradients": {"model": SparseNet},
        "CPU": {**adamw, "device": "cpu", "validation": {"batch_size": 7}},
    }
    found = {}
    for name, keys in cases.items():
        trainer = make_trainer(folder / name, **keys)
        found[name] = [group.get("fused") for group in trainer.optimizer.param_groups]
    moved = []
    for device in ("cpu", "cuda:1", "cpu"):
        trainer = make_trainer(folder / "moved", **adamw, device=device, num_epochs=len(moved) + 1, checkpoint_at=1)
        trainer.run_training()
        moved.append([trainer.optimizer.param_groups[0]["fused"], trainer.step])
    return {"cases": found, "moved": moved}


QUESTIONS: tuple[Callable[[Path], dict[str, Any]], ...] = (
    where_a_criterion_is,
    a_device_that_is_not_there,
    in_which_order_a_snapshot_copies,
    what_the_keys_change,
    which_optimizers_are_fused,
    how_batches_travel,
    what_comes_out,
    what_waits_for_the_device,
    how_much_of_a_gpu_is_used,
)


if __name__ == "__main__":
    found = {question.__name__: question(Path(sys.argv[1]) / question.__name__) for question in QUESTIONS}
    print("ANSWERS " + json.dumps(found))
