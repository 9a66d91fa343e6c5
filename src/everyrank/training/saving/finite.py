"""No checkpoint holds a weight that is not finite.

A loss can be finite while its gradient is not (the square root of 0, a division that ``where`` hides, an overflow in
the backward pass). The weights are then lost, and the next loss tells only if there is a next one and it looks at them.
So the weights themselves are looked at: at the sync points, where the answer travels with the losses, and before each
checkpoint. Between the sync points nothing is done.
"""

from __future__ import annotations

from torch import Tensor, nn

from everyrank.checkpoint.finite import flag_not_finite, name_not_finite, say_names
from everyrank.errors import NonFiniteLossError
from everyrank.runtime.collectives import gather_objects, reduce_sum
from everyrank.runtime.logs import get_logger
from everyrank.runtime.process_group import current_world
from everyrank.training.ema import WeightAverage

logger = get_logger("training")


class FiniteWeights:
    """Looks at the weights of a run: the model's, its batch statistics, and their average.

    Args:
        module: The bare model.
        ema: The average of its weights, or None.
        policy: ``training.nan_policy``; with ``continue`` weights that are not finite are only told of, once.
    """

    def __init__(self, module: nn.Module, ema: WeightAverage | None, policy: str) -> None:
        self._module, self._ema, self._policy = module, ema, policy
        self._was_told = False

    def flag(self) -> Tensor:
        """Return 1.0 if something on this rank is not finite, else 0.0: a scalar on the device, not waited for."""
        averages = self._ema.average.values() if self._ema is not None else ()
        return flag_not_finite([*self._module.parameters(), *averages], self._module.buffers())

    def refuse(self, epoch: int, step: int, since: int | None = None) -> None:
        """Raise, or tell once if the policy is to go on. Collective; called where a rank's flag is up.

        Args:
            epoch: The epoch, from 0.
            step: Optimizer steps done.
            since: The first step whose gradients are under suspicion.

        Raises:
            NonFiniteLossError: Unless the policy is ``continue``.
        """
        if self._was_told:
            return
        reports = gather_objects(self._names())
        guilty = [rank for rank, names in enumerate(reports) if names]
        where = "on every rank" if len(guilty) == len(reports) else f"on rank {', '.join(map(str, guilty))}"
        steps = f"step {step}" if since in (None, step) else f"one of the steps {since} to {step}"
        message = (
            f"weights are not finite {where} at epoch {epoch}, step {step}: "
            f"{say_names(reports[guilty[0]])}. A gradient was NaN or infinite in {steps}."
        )
        if self._policy != "continue":
            raise NonFiniteLossError(
                f"{message} These weights are not saved. Fix: look for a square root or logarithm of 0, a division by "
                "0 behind a where, or an overflow (torch.autograd.set_detect_anomaly(True) names the line); "
                "training.nan_policy: skip leaves such steps out; training.resume: PATH goes on from a checkpoint.",
                rank=guilty[0],
                epoch=epoch,
                step=step,
                samples=(),
            )
        self._was_told = True
        if current_world().is_main:
            logger.warning("%s Going on, as training.nan_policy is continue: checkpoints hold them", message)

    def check(self, epoch: int, step: int) -> None:
        """Look now, and refuse if need be. Collective; before a checkpoint.

        Raises:
            NonFiniteLossError: As ``refuse``.
        """
        if reduce_sum(self.flag()).item():
            self.refuse(epoch, step)

    def _names(self) -> list[str]:
        found = name_not_finite(dict(self._module.named_parameters()))
        found += name_not_finite(dict(self._module.named_buffers()), nan_only=True)
        if self._ema is not None:
            found += [f"the average of {name}" for name in name_not_finite(self._ema.average)]
        return found
