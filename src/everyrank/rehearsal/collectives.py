"""Process groups: what is asked of nccl is done by gloo."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed import distributed_c10d as c10d

from everyrank.rehearsal.devices import REAL_DEVICE, asked_by_torch, cuda_index
from everyrank.rehearsal.patching import replace
from everyrank.rehearsal.refusals import refusing

_ASKED: dict[str, str] = {}  # the backend a program asked for, by the name of its group
_FLAT = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_single", "reduce_scatter_tensor")
_NCCL_ONLY = ("shrink_group", "split_group")


class ProcessGroupNCCL:
    """Stands for NCCL's process group: its options are taken, and change nothing."""

    class Options:
        """Takes whatever NCCL's options take."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.config = _Anything()
            self.__dict__.update(options)


class _Anything:
    """Takes every attribute that is set."""


def replace_collectives() -> None:
    """Replace what makes process groups, what tells of them, and the collectives where gloo wants another call."""
    for name in ("init_process_group", "new_group"):
        _replace(name, _on_gloo(getattr(c10d, name)))
    _replace("get_backend", _get_backend(c10d.get_backend))
    _replace("is_nccl_available", lambda: not asked_by_torch())
    _replace("barrier", _barrier(c10d.barrier))
    for name in _FLAT:
        _replace(name, _flat(getattr(c10d, name)))
    _replace("all_to_all", _all_to_all)
    for name in ("broadcast_object_list", "send_object_list", "recv_object_list", "scatter_object_list"):
        if "device" in inspect.signature(getattr(c10d, name)).parameters:
            _replace(name, _without_device(getattr(c10d, name)))
    for name in _NCCL_ONLY:
        _replace(name, refusing(f"torch.distributed.{name}"))
    setattr(dist, "ProcessGroupNCCL", ProcessGroupNCCL)  # noqa: B010
    setattr(c10d, "ProcessGroupNCCL", ProcessGroupNCCL)  # noqa: B010
    _replace_meshes()


def _replace(name: str, function: Any) -> None:
    if hasattr(dist, name):
        replace(dist, name, function)
    replace(c10d, name, function)


def _on_gloo(original: Callable[..., Any]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        asked = bound.arguments.get("backend")
        device = bound.arguments.pop("device_id", None)
        bound.arguments.pop("pg_options", None)
        if cuda_index(device) is not None and asked is None:
            asked = "nccl"
        if asked is None and original.__name__ == "new_group":
            asked = _ASKED.get(c10d._get_default_group().group_name)
        # nccl, cuda:nccl and cpu:gloo,cuda:nccl are gloo, and so is what torch would choose.
        bound.arguments["backend"] = "gloo" if asked is None or "nccl" in str(asked).lower() else asked
        made = original(*bound.args, **bound.kwargs)
        group = made if isinstance(made, dist.ProcessGroup) else c10d.GroupMember.WORLD
        if asked is not None and made is not c10d.GroupMember.NON_GROUP_MEMBER and group is not None:
            _ASKED[group.group_name] = str(asked).lower()
        return made

    return make


def _get_backend(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def get_backend(group: Any = None) -> Any:
        found = original(group)
        if asked_by_torch():
            return found
        return c10d.Backend(_ASKED.get((group or c10d._get_default_group()).group_name, found))

    return get_backend


def _barrier(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, timeout: Any = None) -> Any:
        for device in device_ids or ():
            cuda_index(device)
        return original(group, async_op, None, timeout)

    return barrier


def _flat(original: Callable[..., Any]) -> Any:
    """nccl takes an output of any shape with the right number of elements, gloo one shape only."""

    names = list(inspect.signature(original).parameters)[:2]

    @functools.wraps(original)
    def collect(*args: Any, **kwargs: Any) -> Any:
        output, input, *rest = *args, *(kwargs.pop(name) for name in names if name in kwargs)
        return original(output.detach().view(-1), input.detach().contiguous().view(-1), *rest, **kwargs)

    return collect


def _all_to_all(
    output_tensor_list: list[Any], input_tensor_list: list[Any], group: Any = None, async_op: bool = False
) -> Any:
    """gloo has no ``all_to_all`` of lists; sends and receives do the same."""
    rank = dist.get_rank(group)
    operations = []
    for other, (received, sent) in enumerate(zip(output_tensor_list, input_tensor_list, strict=True)):
        if other == rank:
            received.detach().copy_(sent)
            continue
        peer = other if group is None else dist.get_global_rank(group, other)
        operations.append(dist.P2POp(dist.isend, sent.detach().contiguous(), peer, group))
        operations.append(dist.P2POp(dist.irecv, received.detach(), peer, group))
    works = dist.batch_isend_irecv(operations) if operations else []
    waited = _Works(works)
    if async_op:
        return waited
    waited.wait()
    return None


class _Works:
    """Several works that are waited for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        """Wait for all of them."""
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        """Whether all are done."""
        return all(work.is_completed() for work in self._works)


def _without_device(original: Callable[..., Any]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if cuda_index(bound.arguments.get("device")) is not None:
            bound.arguments["device"] = REAL_DEVICE("cpu")
        return original(*bound.args, **bound.kwargs)

    return call


def _replace_meshes() -> None:
    """A mesh of CUDA devices is one of CPUs that the program reads back as CUDA's."""
    mesh_class: Any = device_mesh.DeviceMesh
    make, parse = mesh_class.__init__, device_mesh.init_device_mesh

    @functools.wraps(make)
    def init(mesh: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        mesh.rehearsed = device_type == "cuda"
        make(mesh, "cpu" if mesh.rehearsed else device_type, *args, **kwargs)

    @functools.wraps(parse)
    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        override = kwargs.get("backend_override")
        if override:
            kwargs["backend_override"] = {dim: "gloo" if value == "nccl" else value for dim, value in override.items()}
        if device_type != "cuda":
            return parse(device_type, *args, **kwargs)
        made: Any = parse("cpu", *args, **kwargs)
        made.rehearsed = True
        return made

    def device_type(mesh: Any) -> str:
        root = getattr(mesh, "_root_mesh", None) or mesh
        shown = not asked_by_torch() and getattr(root, "rehearsed", False)
        return "cuda" if shown else mesh._device_type

    mesh_class.__init__ = init
    mesh_class.device_type = property(device_type)
    replace(device_mesh, "init_device_mesh", init_device_mesh)
    if hasattr(torch.distributed, "init_device_mesh"):
        replace(dist, "init_device_mesh", init_device_mesh)
