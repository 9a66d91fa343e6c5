"""Variables of torchrun and its agent that say something else than a process's place in the run."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template

from everyrank.launch_env.process_environment import ProcessEnvironment


def is_flag_set(flag: str, environ: Mapping[str, str]) -> bool:
    """Whether the environment gives torchrun a value for one of its flags, such as ``nnodes`` by ``PET_NNODES``."""
    return f"PET_{flag.upper()}" in environ


def line_prefix(environment: ProcessEnvironment, environ: Mapping[str, str]) -> str:
    """What marks the lines of a rank: torchelastic's template, filled in, if there is one."""
    template = environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank ${rank}] ")
    role = environ.get("ROLE_NAME", "default")
    return Template(template).safe_substitute(rank=environment.rank, local_rank=environment.local_rank, role_name=role)
