"""Local updates: each rank takes optimizer steps on its own, and now and then the ranks synchronize.

For ranks that are joined by a slow network. Between two syncs nothing is sent. At a sync each rank's update, the
difference between the weights of the last sync (the *anchor*) and its own now, is averaged over the ranks, and

- without an outer optimizer all ranks go to ``anchor - mean(update)``, the mean of their parameters: local SGD
  (Stich, arXiv:1805.09767);
- an outer optimizer takes the mean update as the gradient of the anchor: DiLoCo (Douillard et al., arXiv:2311.08105).

A rank's loss keeps its weight by count (``training/step.py``), so that the mean over ranks counts each sample once also
where the ranks' shares differ: with ``every: 1`` and SGD, also with momentum and weight decay, the steps are DDP's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.checkpoint.reading import LoadedCheckpoint
from everyrank.config.resolve import construct
from everyrank.errors import CheckpointError
from everyrank.runtime.flat_tensors import as_real, flat_buckets, send_from_main, split_flat
from everyrank.runtime.world import World
from everyrank.training.ema import WeightAverage
from everyrank.training.parallel.config import LocalUpdatesConfig, OuterOptimizerConfig, ParallelConfig


class LocalUpdates:
    """Keeps the anchor, counts the steps taken apart, and brings the ranks together.

    Every rank makes one, with the same initial weights, and all call ``synchronize`` at the same steps.

    Args:
        module: The bare model; rank 0's parameters and buffers are sent to all ranks.
        config: The section.
        world: The joined world.
        ema: An average of the weights: while the ranks are apart, only the model of a sync is taken into it, with
            the weight that the steps since the last one would have had.

    Attributes:
        num_steps: Optimizer steps of the run so far.
        num_apart: Those since the last sync; 0 while all ranks have the same model.
        outer: The outer optimizer, or None.

    Raises:
        ConfigError: If the outer optimizer refuses its arguments.
    """

    def __init__(
        self, module: nn.Module, config: LocalUpdatesConfig, world: World, ema: WeightAverage | None = None
    ) -> None:
        self.config, self.world, self._module, self._ema = config, world, module, ema
        self.num_steps = self.num_apart = self._num_since = 0
        self._parameters: list[Tensor] = list(module.parameters())
        self._anchors = [parameter.detach().clone() for parameter in self._parameters]
        self.outer = build_outer_optimizer(self._anchors, config.outer_optimizer)
        send_from_main([parameter.detach() for parameter in self._parameters] + list(module.buffers()))
        self._last_buffers = self._copy_buffers()

    @property
    def is_apart(self) -> bool:
        """Whether the next step is one that each rank takes on its own."""
        return self.num_steps >= self.config.start_step

    def is_due(self, step: int) -> bool:
        """Return whether the ranks synchronize after ``step`` optimizer steps."""
        since = step - self.config.start_step
        return since > 0 and since % self.config.every == 0

    def next_sync(self, step: int, wanted: int) -> int:
        """Return the step of the next sync point: at first not beyond the start of local updates, then each sync.

        Args:
            step: Optimizer steps done.
            wanted: Where it would be without local updates.
        """
        start, every = self.config.start_step, self.config.every
        if step < start:
            return min(wanted, start)
        return step + every - (step - start) % every

    def before_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients if local updates have not begun yet (collective); or remember where the ranks part.

        Args:
            parameters: The optimizer's parameters, after the backward pass.
        """
        if not self.is_apart:
            self._share_gradients(parameters)
        elif self.num_apart == 0:
            with torch.no_grad():
                torch._foreach_copy_(self._anchors, self._parameters)

    def after_step(self) -> None:
        """Count an optimizer step."""
        self.num_apart += self.is_apart
        self.num_steps += 1
        self._num_since += 1

    def synchronize(self) -> None:
        """Make one model of the ranks' models. Collective; nothing is sent where no step was taken since the last."""
        if self._num_since == 0:
            return
        with torch.no_grad():
            if self.num_apart:
                self._average_parameters()
            self._average_buffers()
        if self._ema is not None and self.num_apart:
            self._ema.update(self.num_apart)
        self.num_apart = self._num_since = 0
        self._last_buffers = self._copy_buffers()

    def state(self) -> tuple[dict[str, Tensor], Any]:
        """Return the outer optimizer's tensors by name and the rest of its state; after a sync there is no more."""
        return flatten_state(self.outer.state_dict() if self.outer is not None else {})

    def load(self, loaded: LoadedCheckpoint, num_steps: int) -> None:
        """Go on from a checkpoint; one of a run without this outer optimizer starts its state anew.

        Raises:
            CheckpointError: If the state does not fit the outer optimizer.
        """
        self.num_steps = num_steps
        self._last_buffers = self._copy_buffers()
        if self.outer is None or "outer" not in loaded.state:
            return
        state = unflatten_state(loaded.tensors.get("outer", {}), loaded.state["outer"])
        if not state:
            return
        # The configuration's arguments stay in force, as a changed learning rate is to have an effect.
        state["param_groups"] = self.outer.state_dict()["param_groups"]
        try:
            self.outer.load_state_dict(state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"The outer optimizer's state in {loaded.path} does not fit the configured "
                f"{type(self.outer).__name__}: {error}. Configure the one it was made with, or start anew with "
                "training.resume: never."
            ) from error

    def _average_parameters(self) -> None:
        pairs = [
            (anchor, parameter)
            for anchor, parameter in zip(self._anchors, self._parameters, strict=True)
            if parameter.requires_grad
        ]
        wire = torch.bfloat16 if self.config.compress == "bf16" else None
        for bucket in flat_buckets(pairs):
            # Divided before it is summed, so that the sum stays in range in a narrow type.
            flat = torch.cat([as_real(anchor - parameter).reshape(-1) for anchor, parameter in bucket])
            sent = flat.div_(self.world.world_size).to(wire or flat.dtype)
            self._sum(sent)
            flat.copy_(sent)
            for (anchor, parameter), update in zip(bucket, split_flat(flat, [a for a, _ in bucket]), strict=True):
                if self.outer is None:
                    torch.sub(anchor, update, out=parameter)
                else:
                    anchor.grad = update
        if self.outer is not None:
            self.outer.step()
            self.outer.zero_grad()
            torch._foreach_copy_([parameter for _, parameter in pairs], [anchor for anchor, _ in pairs])

    def _average_buffers(self) -> None:
        """Average what a forward pass has changed on any rank: batch statistics, but not masks and tables."""
        buffers = list(self._module.buffers())
        if not buffers or not self.world.is_distributed:
            return
        flags = [
            seen is None or not torch.equal(buffer, seen)
            for buffer, seen in itertools.zip_longest(buffers, self._last_buffers[: len(buffers)])
        ]
        changed = torch.tensor(flags, dtype=torch.uint8, device=buffers[0].device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX)
        moved = [buffer for buffer, has_changed in zip(buffers, changed.tolist(), strict=True) if has_changed]
        self._average([buffer for buffer in moved if buffer.is_floating_point() or buffer.is_complex()])
        send_from_main([buffer for buffer in moved if not (buffer.is_floating_point() or buffer.is_complex())])

    def _copy_buffers(self) -> list[Tensor]:
        """Return copies of the buffers; torch's count of a tensor's changes leaves out those of batch statistics."""
        return [buffer.clone() for buffer in self._module.buffers()]

    def _share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over the ranks; a parameter that a rank did not use counts as zero there."""
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._average(gradients)

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks."""
        for bucket in flat_buckets([(tensor, tensor) for tensor in tensors]):
            flat = torch.cat([as_real(tensor).reshape(-1) for tensor, _ in bucket]).div_(self.world.world_size)
            self._sum(flat)
            for (tensor, _), mean in zip(bucket, split_flat(flat, [t for t, _ in bucket]), strict=True):
                tensor.copy_(mean)

    def _sum(self, flat: Tensor) -> None:
        if self.world.is_distributed:
            dist.all_reduce(flat)


def make_local_updates(
    module: nn.Module, parallel: ParallelConfig | None, world: World, ema: WeightAverage | None
) -> LocalUpdates | None:
    """Return the local updates of a run, or None: where they are not configured, or there is nothing to do for them.

    One rank alone, without an outer optimizer, is apart from nobody: that is plain training.

    Raises:
        ConfigError: If the outer optimizer refuses its arguments.
    """
    config = parallel.local_updates if parallel is not None else None
    if config is None or not (world.is_distributed or config.outer_optimizer is not None):
        return None
    return LocalUpdates(module, config, world, ema)


def build_outer_optimizer(
    anchors: Sequence[Tensor], config: OuterOptimizerConfig | None
) -> torch.optim.Optimizer | None:
    """Return the outer optimizer of these tensors, or None if there is to be none.

    Raises:
        ConfigError: If the class refuses its arguments.
    """
    if config is None:
        return None
    key = "parallel.local_updates.outer_optimizer"
    return construct(key, config.type, anchors, *config.args, **config.kwargs)
