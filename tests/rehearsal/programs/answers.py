"""One process that asks torch.cuda whatever programs ask, and does with tensors what programs do. Two devices."""

import copy
import importlib.util
import io
import os
import pickle

import numpy as np
import torch
from torch import nn


def fails(expected, text, function):
    raised = None
    try:
        function()
    except expected as error:
        raised = error
    assert text in str(raised), raised


def devices():
    assert torch.cuda.is_available()
    assert torch.accelerator.is_available()
    assert torch.cuda.device_count() == torch.accelerator.device_count() == 2
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.cuda.is_bf16_supported()
    assert torch.cuda.get_device_capability() >= (8, 0)
    torch.cuda.set_device(1)
    assert torch.cuda.current_device() == torch.accelerator.current_device_index() == 1
    assert torch.zeros(1, device="cuda").device == torch.device("cuda", 1) == torch.device(1)
    with torch.cuda.device(0):
        assert torch.zeros(1).cuda().device.index == 0
    torch.cuda.set_device("cuda:0")
    torch.cuda.synchronize()
    assert pickle.loads(pickle.dumps(torch.device("cuda", 1))) == torch.device("cuda:1")
    assert isinstance(torch.device("cpu"), torch.device)
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory
    assert 0 < torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated()


def tensors():
    host = torch.ones(4)
    moved = host.to(1)
    host.add_(1)
    assert moved.tolist() == [1, 1, 1, 1]
    assert moved.device == torch.device("cuda:1")
    assert moved.is_cuda
    assert moved.to("cuda:1") is moved or moved.to("cuda:1").data_ptr() == moved.data_ptr()
    back = moved.cpu()
    assert back.device.type == "cpu"
    assert back.data_ptr() != moved.data_ptr()
    assert back.numpy().sum() == 4
    assert moved[1:].view(3, 1).device == moved.detach().device == moved.half().device == torch.device("cuda:1")
    assert moved.new_zeros(2).device == torch.zeros_like(moved).device == torch.device("cuda:1")
    assert torch.zeros_like(moved, device="cpu").device.type == "cpu"
    array = np.ones(3, dtype=np.float32)
    copied = torch.as_tensor(array, device="cuda")
    array[0] = 7
    assert copied.tolist() == [1, 1, 1]
    assert host.to(moved).device == torch.device("cuda:1")
    assert host.to(other=moved).is_cuda
    assert moved.type() == "torch.cuda.FloatTensor"
    assert host.pin_memory().is_pinned()
    assert not host.is_pinned()
    moved.record_stream(torch.cuda.current_stream())
    with torch.device("cuda:1"):
        assert torch.zeros(2).device == nn.Linear(2, 2).weight.device == torch.device("cuda:1")
    torch.set_default_device("cuda")
    assert torch.get_default_device() == torch.ones(1).device == torch.device("cuda:0")
    torch.set_default_device(None)


def modules():
    host = torch.ones(2, 2)
    layer = nn.Linear(2, 2)
    layer.weight.data = host
    weight = layer.weight
    assert layer.to(1) is layer
    assert layer.weight is weight
    assert weight.device == torch.device("cuda:1")
    host.zero_()
    assert weight.sum() == 4
    assert copy.deepcopy(layer).weight.device == torch.device("cuda:1")
    assert nn.BatchNorm1d(2).cuda().running_mean.is_cuda
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    assert empty.to_empty(device="cuda").weight.device == torch.device("cuda:0")
    file = io.BytesIO()
    torch.save({"weight": layer.state_dict()["weight"]}, file)
    for location in ("cuda:0", torch.device("cuda:0"), {"cpu": "cuda:0"}, lambda storage, tag: storage.cuda(0)):
        file.seek(0)
        assert torch.load(file, map_location=location)["weight"].device == torch.device("cuda:0"), location
    file.seek(0)
    assert torch.load(file, map_location="cpu")["weight"].device.type == "cpu"
    assert nn.DataParallel(layer)(torch.ones(3, 2)).shape == (3, 2)
    compiled = torch.compile(layer)
    assert list(compiled.state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    assert torch.equal(compiled(torch.ones(1, 2)), layer(torch.ones(1, 2)))


def precision():
    layer = nn.Linear(2, 2, device="cuda")
    with torch.autocast("cuda"):
        assert layer(torch.ones(1, 2)).dtype == torch.float16
        assert torch.is_autocast_enabled()
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
    assert layer.bias.grad.tolist() == [8, 8]
    scaler.unscale_(optimizer)
    assert layer.bias.grad.tolist() == [1, 1]
    before = layer.bias.tolist()
    scaler.step(optimizer)
    scaler.update()
    assert layer.bias.tolist() != before
    assert scaler.get_scale() == 8.0
    layer.bias.grad.fill_(float("inf"))
    stays = layer.bias.tolist()
    scaler.step(optimizer)
    scaler.update()
    assert layer.bias.tolist() == stays
    assert scaler.get_scale() == 4.0


def randomness():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.cuda.manual_seed_all(9)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state_all([state, state])
    assert torch.equal(torch.rand(2), expected)
    assert torch.cuda.initial_seed() == 9
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert generator.device == torch.device("cuda:0")
    assert isinstance(generator, torch.Generator)
    assert torch.equal(torch.rand(2, generator=generator, device="cuda"), expected)
    assert isinstance(torch.default_generator, torch.Generator)


def streams():
    stream = torch.cuda.Stream()
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
    stream.wait_stream(torch.cuda.current_stream())
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != stream
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) >= 0


def refusals():
    from torch.utils import cpp_extension

    from everyrank.errors import RehearsalError

    moved = torch.ones(2, device="cuda")
    for wrong in (lambda: moved.to(2), lambda: torch.zeros(1, device="cuda:7"), lambda: torch.cuda.set_device(2)):
        fails(RuntimeError, "CUDA error: invalid device ordinal", wrong)
    fails(TypeError, "can't convert cuda:0 device type tensor to numpy", moved.numpy)
    fails(TypeError, "can't convert cuda:0 device type tensor to numpy", lambda: np.asarray(moved))
    fails(RehearsalError, "torch.cuda.CUDAGraph was used", torch.cuda.CUDAGraph)
    fails(RehearsalError, "torch.cuda.nccl.all_reduce", lambda: torch.cuda.nccl.all_reduce([moved]))
    fails(RehearsalError, "load_inline('mine')", lambda: cpp_extension.load_inline("mine", "", cuda_sources="..."))
    fails(RehearsalError, "CUDAExtension", lambda: cpp_extension.CUDAExtension("mine", ["mine.cu"]))
    if importlib.util.find_spec("triton") is None:
        fails(RehearsalError, "triton was imported", lambda: importlib.import_module("triton"))
        fails(ImportError, "triton was imported", lambda: importlib.import_module("triton.language"))
    pid = os.fork()
    if pid == 0:
        fails(RuntimeError, "Cannot re-initialize CUDA in forked subprocess", lambda: torch.zeros(1, device="cuda"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    for question in (devices, tensors, modules, precision, randomness, streams, refusals):
        question()
        print(f"{question.__name__}: as with CUDA")
