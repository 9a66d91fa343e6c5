"""Log lines name their rank; the root logger stays as it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from everyrank.runtime.logs import get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("everyrank")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in set(logger.handlers) - set(before[0]):
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def _speak() -> None:
    for level in ("debug", "info", "warning"):
        getattr(get_logger("training"), level)("a %s", level)


def test_rank_0_says_info_and_others_warnings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    setup_logging(0)
    _speak()
    setup_logging(3, log_file=tmp_path / "logs" / "rank-3.log")
    _speak()
    lines = capsys.readouterr().err.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    expected = [
        rf"\[RANK 0\] {stamp} INFO everyrank\.training: a info",
        rf"\[RANK 0\] {stamp} WARNING everyrank\.training: a warning",
        rf"\[RANK 3\] {stamp} WARNING everyrank\.training: a warning",
    ]
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    written = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert [line.split()[4] for line in written] == ["INFO", "WARNING"]
    assert (list(root.handlers), root.level) == before


def test_a_level_that_was_asked_for_counts_on_every_rank(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    setup_logging(1, level="debug", log_file=tmp_path / "log")
    _speak()
    assert len(capsys.readouterr().err.splitlines()) == 3
    setup_logging(0, level=logging.ERROR, log_file=tmp_path / "log")
    _speak()
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log").read_text().count("a info") == 2


def test_names_are_below_everyrank() -> None:
    assert get_logger("data").name == "everyrank.data"
    assert get_logger("everyrank.data").name == "everyrank.data"
    assert get_logger("everyrank").name == "everyrank"
