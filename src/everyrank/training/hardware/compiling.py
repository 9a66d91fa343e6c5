"""``torch.compile`` of a model or of its blocks, and a word to the user when other shapes make it compile again."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import nn

from everyrank.config.schema import Bool, field, section
from everyrank.errors import ConfigError, did_you_mean
from everyrank.runtime.logs import get_logger

_log = get_logger("training")


@section
class CompileConfig:
    """Arguments of ``torch.compile``."""

    mode: str | None = field(default=None, doc="`default`, `reduce-overhead`, `max-autotune`, ...")
    dynamic: Bool | None = field(default=None, doc="Compile for changing shapes.")
    fullgraph: Bool = field(default=False, doc="Fail where the graph would break instead of splitting it.")
    backend: str = field(default="inductor", doc="The compiler.")
    regions: list[str] = field(
        factory=list,
        doc="Modules that are compiled each by itself, with `*` and `?` as in file names: `blocks.*`. Blocks of one "
        "class share what is compiled, so a deep model starts sooner. Empty: the whole model.",
    )


def compile_model(module: nn.Module, config: CompileConfig) -> None:
    """Compile a model in place, so that the names in its state stay those of the bare model.

    Raises:
        ConfigError: A pattern of ``regions`` fits no module.
    """
    named = {name: part for name, part in module.named_modules() if name}
    for pattern in config.regions:
        if not any(fnmatchcase(name, pattern) for name in named):
            hint = did_you_mean(pattern.rstrip("*.?"), list(named))
            raise ConfigError(f"training.compile.regions: no module's name fits {pattern!r}.{hint}")
    regions = [part for name, part in named.items() if any(fnmatchcase(name, wanted) for wanted in config.regions)]
    for part in regions or [module]:
        if type(part).forward.__module__.startswith("torch.nn."):
            part.forward = MethodType(_forward, part)
        part.compile(mode=config.mode, dynamic=config.dynamic, fullgraph=config.fullgraph, backend=config.backend)
    _tell_recompilations()


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the class's own: torch compiles no function of ``torch.nn`` itself, such as that of ``nn.Sequential``."""
    return type(self).forward(self, *args, **kwargs)


def _tell_recompilations() -> None:
    """Have torch say when it compiles a function again, unless the user has it said already (``TORCH_LOGS``)."""
    from torch._dynamo.guards import recompiles_log as logger  # seconds of imports, which compiling needs anyway

    state = torch._logging._internal.log_state
    if state.is_artifact_enabled("recompiles"):
        return
    state.enable_artifact("recompiles")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_Recompilations())
    logger.propagate = False


class _Recompilations(logging.Handler):
    """Says torch's words on a recompilation in one line: of other shapes loudly, for they can be had for once.

    A first evaluation, or a first gradient, compiles again as well; nothing is to be done about that.
    """

    def emit(self, record: logging.LogRecord) -> None:
        what, *rest = record.getMessage().splitlines()
        reasons = [line.strip(" -").partition(": ")[2].partition("  #")[0].strip() for line in rest[1:]]
        shapes = [reason for reason in reasons if "size" in reason or "stride" in reason]
        said = f"torch.compile: {what[:1].lower()}{what[1:]}: {(shapes or reasons or ['for no reason given'])[0]}"
        if shapes:
            _log.warning("%s. Fix: training.compile.dynamic=true compiles once for all sizes.", said)
        else:
            _log.info("%s", said)
