"""Command lines that run while a test looks on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from warm_start import Started

PATIENCE_S = 200.0  # beside other workers on two cores everything takes its time


class Running:
    """A command line that runs on a host; its output is collected as it comes."""

    def __init__(self, process: Started, name: str) -> None:
        self.process = process
        self.name = name
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} did not end within {timeout_s} s; it said:\n{self.output}")
        self._reader.join(10)
        return code

    def until_says(self, text: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until it has printed ``text``."""
        wait_for(lambda: text in self.output, timeout_s, lambda: f"{self.name} did not say {text!r}:\n{self.output}")


def wait_for(condition: Callable[[], object], timeout_s: float, explain: Callable[[], str]) -> None:
    """Wait for a condition; fail the test with the explanation if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(explain())
        time.sleep(0.05)
