"""Put all of the rehearsal in place, in a process that has imported torch."""

from __future__ import annotations

import copyreg
from typing import Any

import torch

from everyrank.rehearsal.amp import replace_amp, replace_compile
from everyrank.rehearsal.collectives import replace_collectives
from everyrank.rehearsal.cuda.api import replace_accelerator, replace_cuda
from everyrank.rehearsal.cuda.random import replace_random
from everyrank.rehearsal.devices import REAL_DEVICE, Device
from everyrank.rehearsal.factories import replace_factories
from everyrank.rehearsal.loading import replace_loading
from everyrank.rehearsal.modules import replace_modules
from everyrank.rehearsal.patching import replace, replace_elsewhere
from everyrank.rehearsal.tensors import replace_tensor_methods


def switch_on() -> None:
    """Replace what needs CUDA or NCCL. The hook calls it, once a process."""
    replace_factories()
    replace_tensor_methods()
    replace_cuda()
    replace_accelerator()
    replace_random()
    replace_collectives()
    replace_modules()
    replace_amp()
    replace_compile()
    replace_loading()
    replace(torch, "device", Device)
    copyreg.pickle(REAL_DEVICE, _reduced)
    replace_elsewhere()


def _reduced(device: Any) -> tuple[Any, tuple[Any, ...]]:
    """Pickle a device by the name it has always had."""
    return Device, (device.type,) if device.index is None else (device.type, device.index)
