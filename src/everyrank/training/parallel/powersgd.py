"""PowerSGD (Vogels et al., arXiv:1905.13727) for DDP, with a state that a checkpoint can hold.

torch's hook does the work. Its state is kept by bucket, and DDP changes its buckets after the first step of a process,
so that the state of a killed run would not fit the first step of the next one. Here it is kept by parameter, and handed
to the hook as whatever buckets there are need it: the error that a rank has not sent yet, which each rank holds by
itself, and the factor Q, which is the same on all ranks.
"""

# No postponed annotations in this file: DDP compares the annotation of `bucket` with the class itself.

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everyrank.training.parallel.config import ParallelConfig

_MIN_COMPRESSION = 2  # a matrix travels whole unless its two factors are together less than this part of it


class PowerSGD:
    """The state of a communication hook with error feedback and warm start.

    Args:
        module: The bare model.
        config: The ``parallel`` section.
    """

    def __init__(self, module: nn.Module, config: ParallelConfig) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        self._hook = powerSGD_hook.powerSGD_hook
        self._state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=config.powersgd_rank,
            start_powerSGD_iter=config.powersgd_start_step,
            min_compression_rate=_MIN_COMPRESSION,
        )
        self._rank = config.powersgd_rank
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._numbers = {name: number for number, name in enumerate(self._names.values())}
        self._layout: dict[int, list[Tensor]] = {}  # parameters by bucket
        self._errors: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._is_away = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within it, gradients stay where they are and leave nothing here: it is no step, and they are not used."""
        self._is_away = True
        try:
            yield
        finally:
            self._is_away = False

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average a bucket of gradients over the ranks, compressed: the hook that DDP is given."""
        if self._is_away:
            untouched: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            untouched.set_result(bucket.buffer())
            return untouched
        if self._state.iter >= self._state.start_powerSGD_iter:
            index, parameters = bucket.index(), bucket.parameters()
            wanted = [id(parameter) for parameter in parameters]
            if wanted != [id(parameter) for parameter in self._layout.get(index, [])]:
                # Only these: buckets that are under way in this step have other numbers and other parameters.
                stale = [
                    number
                    for number, known in self._layout.items()
                    if number == index or not {id(parameter) for parameter in known}.isdisjoint(wanted)
                ]
                self._collect(stale)
                self._fill(index, parameters, bucket.buffer())
            # The hook sends P and Q from callbacks. With several buckets under way these would come in another order on
            # each rank, and gloo would mix them up. What is left to send is small, so a bucket waits for the last.
            future = self._hook(self._state, bucket)
            future.wait()
            return future
        return self._hook(self._state, bucket)

    def common_state(self) -> dict[str, Any]:
        """Return what is the same on all ranks: the number of steps and the factors by parameter."""
        self._collect(list(self._layout))
        return {"num_steps": self._state.iter, "factors": dict(self._factors)}

    def own_state(self) -> dict[str, Tensor]:
        """Return what this rank has not sent yet, by parameter."""
        self._collect(list(self._layout))
        return dict(self._errors)

    def load(self, common: Mapping[str, Any], errors: Mapping[str, Tensor]) -> None:
        """Go on from saved states."""
        self._state.iter = int(common["num_steps"])
        self._factors, self._errors = dict(common["factors"]), dict(errors)

    def _collect(self, indices: list[int]) -> None:
        """Take the state out of some of the hook's buckets."""
        for index in indices:
            parameters = self._layout.pop(index)
            errors, factors = self._state.error_dict.pop(index), self._state.q_memory_dict.pop(index)
            del self._state.p_memory_dict[index]
            for parameter, part in zip(parameters, errors.split([p.numel() for p in parameters]), strict=True):
                self._errors[self._name(parameter)] = part.view(parameter.shape)
            for parameter, part in self._parts(parameters, factors):
                self._factors[self._name(parameter)] = part

    def _fill(self, index: int, parameters: list[Tensor], buffer: Tensor) -> None:
        """Give the hook the state of a bucket with these parameters."""
        self._layout[index] = parameters
        errors = [self._errors.get(self._name(p), torch.zeros(p.shape)).to(buffer).reshape(-1) for p in parameters]
        self._state.error_dict[index] = torch.cat(errors)
        compressed = [parameter for parameter in parameters if self._is_compressed(parameter)]
        rows = sum(_matrix(p)[0] * self._width(p) for p in compressed)
        self._state.p_memory_dict[index] = buffer.new_empty(rows)
        columns = sum(_matrix(p)[1] * self._width(p) for p in compressed)
        self._state.q_memory_dict[index] = buffer.new_empty(columns)
        for parameter, part in self._parts(parameters, self._state.q_memory_dict[index]):
            part.copy_(self._factor(parameter))

    def _factor(self, parameter: Tensor) -> Tensor:
        name = self._name(parameter)
        if name in self._factors:
            return self._factors[name]
        # From the parameter's number, not from a stream: the same on every rank, and whichever bucket comes first.
        generator = torch.Generator().manual_seed(self._numbers[name])
        return torch.randn(_matrix(parameter)[1] * self._width(parameter), generator=generator)

    def _parts(self, parameters: list[Tensor], memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the compressed parameters of a bucket, each with its part of the memory, in the hook's order."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in parameters:
            if self._is_compressed(parameter):
                by_shape.setdefault(_matrix(parameter), []).append(parameter)
        begin = 0
        for shape, alike in by_shape.items():
            for parameter in alike:
                size = shape[1] * self._width(parameter)
                yield parameter, memory[begin : begin + size]
                begin += size

    def _is_compressed(self, parameter: Tensor) -> bool:
        rows, columns = _matrix(parameter)
        return (rows + columns) * self._width(parameter) * _MIN_COMPRESSION < rows * columns

    def _width(self, parameter: Tensor) -> int:
        return min(*_matrix(parameter), self._rank)

    def _name(self, parameter: Tensor) -> str:
        return self._names[id(parameter)]


def _matrix(parameter: Tensor) -> tuple[int, int]:
    """Return the shape of the matrix that a gradient is taken as."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return rows, parameter.numel() // max(rows, 1)
