"""The rules, by subject; the first digit of a code is the subject."""

from __future__ import annotations

from everyrank.lint.rule import Rule
from everyrank.lint.rules import (
    data,
    devices,
    environment,
    group,
    launching,
    model,
    numbers,
    sides,
    starting,
    waiting,
    writing,
)

RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            *devices.RULES,
            *environment.RULES,
            *launching.RULES,
            *group.RULES,
            *data.RULES,
            *model.RULES,
            *writing.RULES,
            *sides.RULES,
            *waiting.RULES,
            *numbers.RULES,
            *starting.RULES,
        ),
        key=lambda rule: rule.code,
    )
)
