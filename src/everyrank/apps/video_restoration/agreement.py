"""One message for one mistake: what every rank finds wrong is said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from everyrank.errors import UserError
from everyrank.runtime.collectives import gather_objects

T = TypeVar("T")


class AgreedError(UserError):
    """A user's mistake that all ranks know of and stop at; rank 0 says it."""


def together(build: Callable[[], T]) -> T:
    """Call ``build`` on every rank; if it meets a user's mistake on any, raise that on all. Collective.

    Raises:
        AgreedError: The mistake of the first rank that met one.
    """
    result: list[T] = []
    problem, cause = None, None
    try:
        result.append(build())
    except UserError as error:
        problem, cause = str(error), error
    for rank, found in enumerate(gather_objects(problem)):
        if found is not None:
            raise AgreedError(found if rank == 0 else f"rank {rank}: {found}") from cause
    return result[0]
