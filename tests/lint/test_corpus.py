"""The corpus: files in the manner of real ones, each with its expected findings written beside the lines."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everyrank.lint.engine import Settings, check_file
from everyrank.lint.output import Place
from everyrank.lint.rules import RULES

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path.name for path in CORPUS.iterdir() if path.is_file())
# Shell and Python are looked at by the default rules; these two hints are about option files.
CODES = frozenset({rule.code for rule in RULES if rule.default} | {"ER000", "ER305"})
_EXPECT = re.compile(r"expect(?: (-\d+))?: ((?:ER\d{3}(?:, )?)+)")


def _expected(path: Path) -> list[tuple[int | None, int, str]]:
    """Cell (None outside notebooks), row and code of each expected finding."""
    texts: list[tuple[int | None, str]] = [(None, path.read_text(encoding="utf-8"))]
    if path.suffix == ".ipynb":
        cells = json.loads(texts[0][1])["cells"]
        texts = [(number, "".join(cell["source"])) for number, cell in enumerate(cells, 1)]
    found = []
    for cell, text in texts:
        for row, line in enumerate(text.splitlines(), 1):
            if match := _EXPECT.search(line):
                found += [(cell, row + int(match[1] or 0), code) for code in match[2].split(", ")]
    return sorted(found, key=str)


@pytest.mark.parametrize("name", FILES)
def test_each_line_has_the_findings_that_are_expected_and_no_others(name: str) -> None:
    checked = check_file(str(CORPUS / name), Settings(CODES))
    place = Place(checked)
    found = [(place.of(f.start)[2], place.of(f.start)[0], f.code) for f in checked.findings]
    assert sorted(found, key=str) == _expected(CORPUS / name)


def test_every_default_rule_that_can_is_in_the_corpus() -> None:
    shown = {code for name in FILES for _, _, code in _expected(CORPUS / name)}
    missing = {rule.code for rule in RULES if rule.default} - shown
    # These have their own examples in test_rules; a program with all mistakes would hide them.
    assert missing == {"ER005", "ER009", "ER102", "ER402", "ER502"}


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_mending_twice_changes_nothing_that_mending_once_did_not(name: str, unsafe: bool, tmp_path: Path) -> None:
    path = shutil.copy(CORPUS / name, tmp_path / name)
    wanted = Settings(frozenset(rule.code for rule in RULES), fix=True, unsafe=unsafe, write=True)
    once = check_file(str(path), wanted)
    text = Path(path).read_bytes()
    again = check_file(str(path), wanted)
    assert Path(path).read_bytes() == text
    assert again.num_fixed == 0
    assert again.findings == once.findings
    assert not any(finding.fix and (finding.fix.safe or unsafe) for finding in again.findings)
    if name.endswith(".py"):
        ast.parse(text)
    assert os.listdir(tmp_path) == [name]


def test_a_notebook_keeps_everything_but_the_cells_that_were_mended(tmp_path: Path) -> None:
    path = shutil.copy(CORPUS / "two_ranks.ipynb", tmp_path / "two_ranks.ipynb")
    before = Path(path).read_text(encoding="utf-8").splitlines()
    check_file(str(path), Settings(CODES, fix=True, write=True))
    after = Path(path).read_text(encoding="utf-8").splitlines()
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 2
    assert "setdefault" in changed[0][1]
    assert changed[1][1].startswith('"!torchrun --nproc_per_node=2 train.py')


_LINES = [
    line for name in FILES if name.endswith(".py") for line in (CORPUS / name).read_text().splitlines() if line.strip()
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.sets(st.integers(0, 95), min_size=1), end=st.sampled_from(["\n", "\r\n"]))
def test_any_part_of_a_program_is_mended_into_a_program(kept: set[int], end: str, tmp_path: Path) -> None:
    """Whole statements left out at random: what is mended parses, and is stable."""
    tree = ast.parse((CORPUS / "segmentation_train.py").read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    main.body = [s for number, s in enumerate(main.body) if number in kept] or [ast.Pass()]
    tree.body = [s for number, s in enumerate(tree.body) if number + 40 not in kept]
    path = tmp_path / "part.py"
    path.write_bytes((ast.unparse(tree) + "\n").replace("\n", end).encode())
    wanted = Settings(frozenset(rule.code for rule in RULES), fix=True, unsafe=True, write=True)
    check_file(str(path), wanted)
    text = path.read_bytes()
    ast.parse(text)
    assert text.count(b"\n") == text.count(end.encode())
    assert check_file(str(path), wanted).num_fixed == 0
    assert path.read_bytes() == text
