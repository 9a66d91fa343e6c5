"""Trains, and says what came of it and whether torch's compiler was imported before.

python compiling.py FILE_TO_MEET_AT
"""

import gc
import inspect
import json
import logging
import sys
import threading

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

COMPILER = "torch._dynamo"
OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop)


def train(optimizer_class, counter=None):
    """The last loss and the weights after three steps, compiled if there is a counter to compile them with."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)))
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    step = optimizer.step
    if counter is not None:
        model, step = torch.compile(model, backend=counter), torch.compile(step, backend=counter)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [loss.item(), *(weight.sum().item() for weight in model.parameters())]


def differentiate_a_step():
    """The derivative through a step of an optimizer, whose step differentiates only if it is told to."""
    weight = torch.ones(2, requires_grad=True)
    stepped = weight.clone()
    optimizer = torch.optim.SGD([stepped], lr=0.1, differentiable=True)
    stepped.grad = weight * 3
    optimizer.step()
    return torch.autograd.grad(stepped.sum(), weight)[0].tolist()


def convolve():
    """The loss of a layer of torch_geometric's on a batch of its graphs, and the derivative by its bias."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import SAGEConv, global_mean_pool

    torch.manual_seed(0)
    layer, edges = SAGEConv(3, 3), torch.tensor([[0, 1, 2], [1, 2, 0]])
    batch = Batch.from_data_list([Data(x=torch.randn(3, 3), edge_index=edges) for _ in range(2)])
    loss = global_mean_pool(layer(batch.x, batch.edge_index), batch.batch).square().mean()
    loss.backward()
    return loss.item(), layer.lin_l.bias.grad.tolist()


def is_told_when_compiled():
    """Whether torch_geometric, imported before the compiler, knows the class of a model that is compiled."""
    from torch_geometric import is_torch_instance

    model = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    names = [*get_model_state_dict(model)]  # as does torch.distributed.checkpoint, which leaves out how it is wrapped
    return [is_torch_instance(model, torch.nn.Linear), is_torch_instance(model, torch.nn.Conv1d), names]


def recompute(layers):
    """Of layers that are computed again in the backward pass: their derivative, and the loss in torch's older way."""
    inputs = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    said = []
    for is_reentrant in (False, True):
        loss = checkpoint(layers, inputs, use_reentrant=is_reentrant).square().mean()
        said.append(torch.autograd.grad(loss, layers.parameters())[0].tolist() if not is_reentrant else loss.item())
    return said


def shard():
    """The weights of a model that FSDP2 shards, after three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: weight.full_tensor().tolist() for name, weight in get_model_state_dict(model).items()}


def differentiate_each_sample():
    slope = torch.func.vmap(torch.func.grad(lambda x: x.sin() * 2))
    output, target = torch.linspace(0, 1, 6).view(2, 1, 3), torch.tensor([[0], [2]])
    losses = torch.func.vmap(torch.nn.functional.cross_entropy)(output, target)
    return slope(torch.linspace(0, 1, 4)).tolist(), losses.tolist()


def complain():
    """What torch says of conditions that do not hold, and of what is none."""
    said = []
    for check, condition in ((torch._check, False), (torch._check_index, False), (torch._check, torch.ones(1))):
        try:
            check(condition, lambda: "this is wrong")
        except Exception as error:
            said.append(repr(error))
    return said


def origins_of_operators():
    """The file, the line and the module that registered each of those that the compiler does not bring."""
    said = {}
    for name, entry in torch._library.simple_registry.singleton._data.items():  # noqa: ER302
        if name.startswith("prims::"):
            kernel = entry.fake_impl.kernel
            said[name] = kernel.source, inspect.getclosurevars(kernel.func).nonlocals["actual_module_name"]
    return said


def tell_of_an_exception():
    """As torch's agent does of a rank that fails."""
    record = logging.LogRecord("torch", logging.ERROR, "", 0, "it failed", (), (ValueError, ValueError("why"), None))
    record.taskName = None
    lines = logging.getLogger("torch").handlers[0].format(record).splitlines()
    return [line.partition("] ")[2] for line in lines]


def profile():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2).add(1)
    return "aten::add" in [event.key for event in profiler.key_averages()]


def compute_in_threads():
    """What eight threads compute that begin at once: each the same, and none fails."""
    torch.manual_seed(0)
    layers, begin, said = torch.nn.Linear(4, 4), threading.Barrier(8), []

    def work():
        begin.wait()
        torch.use_deterministic_algorithms(True)
        said.append((recompute(layers), differentiate_each_sample()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def plain():
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    steps = [train(optimizer) for optimizer in OPTIMIZERS], differentiate_a_step(), convolve()
    told = origins_of_operators(), tell_of_an_exception()
    return *steps, *told, recompute(layers), shard(), differentiate_each_sample(), profile()


def compile_after_training():
    from torch._dynamo.testing import CompileCounter

    said = []
    for optimizer in OPTIMIZERS:
        counter = CompileCounter()
        said.append((train(optimizer), train(optimizer, counter), counter.frame_count, counter.op_count))
    counter = CompileCounter()
    torch.manual_seed(0)
    layers = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), backend=counter)
    said.append((recompute(layers), shard(), counter.frame_count, counter.op_count))
    counter = CompileCounter()
    doubled = torch.compile(double_checked, backend=counter)(torch.ones(3)).tolist()
    said.append((doubled, counter.frame_count, counter.op_count))
    return said


def double_checked(values):
    torch._check(values.shape[0] > 1)
    return values * 2


def choose_a_reducer():
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    return len(model._accum_grad_hooks)  # noqa: ER302 (the one thing that tells which reducer it is)


def use_names():
    torch._dynamo.of_the_user = 7
    from torch._dynamo import config, utils

    module = sys.modules[COMPILER]
    return [torch._dynamo.of_the_user, torch._dynamo is module, config is module.config, utils is module.utils]


def use_settings():
    """What was set without the compiler is set in it, and the other way round."""
    import torch._inductor.utils

    module = sys.modules["torch._inductor"]
    said = [
        torch._inductor is module,
        module.config.deterministic,
        module.utils is sys.modules["torch._inductor.utils"],
    ]
    torch.use_deterministic_algorithms(False)
    return [*said, module.config.deterministic, module.config is sys.modules["torch._inductor.config"]]


def main(meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    in_threads = compute_in_threads()  # first: what is imported then is imported by all at once
    trained = plain(), complain(), gc.isenabled()
    said = {"threads": in_threads, "imported": COMPILER in sys.modules, "plain": trained, "names": use_names()}
    said |= {"settings": use_settings()}
    said |= {"compiled": compile_after_training(), "reducer": choose_a_reducer()}
    said |= {"told": is_told_when_compiled()}
    print(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
