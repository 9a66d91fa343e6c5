"""Each rule finds its own example, and nothing in the example's cure."""

from __future__ import annotations

import pytest

from everyrank.lint.engine import find
from everyrank.lint.rule import Rule
from everyrank.lint.rules import RULES
from everyrank.lint.source import read_text

_DEFAULT = frozenset(rule.code for rule in RULES if rule.default)
_FILE = {"python": ("example.py", "python"), "bash": ("example.sh", "shell"), "yaml": ("example.yaml", "yaml")}


def _codes(rule: Rule, text: str) -> list[str]:
    findings = find(read_text(*_FILE[rule.page.language], text), _DEFAULT | {rule.code})
    return sorted({finding.code for finding in findings})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_its_example_shows_this_mistake_alone_and_the_cure_is_clean(rule: Rule) -> None:
    expected = [rule.code]
    if rule.code == "ER105":  # nothing else is wrong with a program that cannot start alone
        assert "RANK" in rule.page.after
    found = [code for code in _codes(rule, rule.page.before) if code != "ER105" or rule.code == "ER105"]
    assert found == expected
    assert [code for code in _codes(rule, rule.page.after) if code != "ER105"] == []


@pytest.mark.parametrize("arguments", ["dataset, shuffle=False", "dataset, None, None, False", "dataset, **options"])
def test_a_sampler_that_may_not_shuffle_need_not_be_told_its_epoch(arguments: str) -> None:
    (rule,) = (rule for rule in RULES if rule.code == "ER201")
    text = rule.page.before.replace("DistributedSampler(dataset)", f"DistributedSampler({arguments})")
    assert text != rule.page.before
    assert _codes(rule, text) == []


def test_codes_are_unique_and_sorted() -> None:
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
