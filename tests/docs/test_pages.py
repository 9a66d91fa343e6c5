"""What README.md and the pages show of results comes from files that commands wrote, or is printed here again."""

from __future__ import annotations

import re
import sys

import pytest

from conftest import ROOT, RunCli

sys.path.insert(0, str(ROOT / "scripts"))
import write_pages

_FIGURE = re.compile(r"\d\.\d|\d ?(?:ms|s|MiB|GiB|MB|kB|dB|%)(?![\w-])")
_OUTPUT = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ELSEWHERE = {"troubleshooting.md", "rehearsal.md", "getting_started.md"}
"""Pages whose quoted outputs other tests, or the last one here, compare with what is printed."""


def test_pages_show_what_the_files_hold() -> None:
    written = write_pages.written_pages()
    assert {page.name for page in written} >= {"README.md", "benchmarks.md", "causal_sets.md", "video_restoration.md"}
    old = [page for page, text in written.items() if page.read_text(encoding="utf-8") != text]
    assert old == [], "run: make pages"


def test_everything_that_can_be_shown_is_shown() -> None:
    shown = {name for page in write_pages.PAGES for _, name in _markers(page.read_text(encoding="utf-8"))}
    assert shown == set(write_pages.SHOWN)


def test_the_recording_of_the_start_page_fetches_nothing() -> None:
    page, svg = (ROOT / "docs" / "index.md").read_text(), (ROOT / "docs" / "images" / "kill.svg").read_text()
    assert "images/kill.svg" in page
    assert "rank&#160;1" in svg
    assert re.findall(r"(?:url\(|href=)[\"']?(?!#)[^)\s]*", svg) == []


def _markers(text: str) -> list[tuple[str, str]]:
    return [(block[1], block[2]) for block in write_pages.BLOCK.finditer(text)]


@pytest.mark.parametrize("page", write_pages.PAGES, ids=lambda page: page.stem)
def test_tables_and_outputs_with_measured_figures_come_from_a_file(page) -> None:  # type: ignore[no-untyped-def]
    """A table that holds a measured figure, and a quoted output, stands between markers."""
    text = write_pages.BLOCK.sub("", page.read_text(encoding="utf-8"))
    rows = [line for line in text.splitlines() if line.startswith("|") and _FIGURE.search(re.sub(r"`[^`]*`", "", line))]
    assert rows == []
    if page.name not in _ELSEWHERE:
        assert [block for block in _OUTPUT.findall(text) if _FIGURE.search(block)] == []


def test_hello_is_said_as_the_pages_say(run_cli: RunCli) -> None:
    """The quoted lines of the first run, and of the same run rehearsed."""
    hello = ("driver=torchrun", "app=hello_dist", "driver.nproc_per_node=2")
    for page, further in (("getting_started", ()), ("rehearsal", ("rehearse=cpu",))):
        (quoted, *_) = _OUTPUT.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
        done = run_cli(*hello, *further)
        assert done.returncode == 0, done.stderr
        # Times and ports differ from run to run.
        printed = re.sub(r"\d{4}-\d\d-\d\d \S+ |(?<=127\.0\.0\.1:)\d+", "", done.stdout + done.stderr)
        missing = [line for line in quoted.splitlines() if re.sub(r"(?<=127\.0\.0\.1:)\d+", "", line) not in printed]
        assert missing == [], printed
