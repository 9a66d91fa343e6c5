"""The site builds without a warning and fetches nothing; the commands on its pages are commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import everyrank
from conftest import ROOT
from everyrank.cli.main import run

_PAGES = (
    "index",
    "getting_started",
    "drivers",
    "single_gpu_to_ddp",
    "exactly_once",
    "causal_sets",
    "rehearsal",
    "troubleshooting",
)
_BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_APP = re.compile(r"^```python\n# my_app\.py\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """The ``python run.py`` lines of the guides, without comments and those that leave something to be filled in."""
    found = []
    for page in _PAGES:
        for block in _BASH.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
            found += [
                line.partition("  #")[0].strip() for line in block.splitlines() if line.startswith("python run.py")
            ]
    return list(dict.fromkeys(command for command in found if "..." not in command))


def test_there_are_commands() -> None:
    assert len(_commands()) >= 8


@pytest.mark.parametrize("command", _commands())
def test_the_command_is_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (app,) = _APP.findall((ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8"))
    (tmp_path / "my_app.py").write_text(app)
    arguments = [argument for argument in shlex.split(command)[2:] if argument != "driver.dry_run=true"]
    monkeypatch.syspath_prepend(str(tmp_path))
    code = run([*arguments, "driver.dry_run=true"])
    assert code == 0, capsys.readouterr().err
    assert "command:" in capsys.readouterr().out


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: everyrank\.[\w.]+\.(\w+)$", page, re.MULTILINE))
    missing = set(everyrank.__all__) - shown - {"__version__"}
    assert missing == set(), "add them to docs/reference/api.md"


class _Fetched(HTMLParser):
    """Collects what a browser would fetch by itself to show a page: not links that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values.get("src") or ""]
        if tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "icon", "preload"):
            self.addresses.append(values.get("href") or "")


@pytest.mark.slow
def test_it_builds_without_a_warning_and_needs_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("material")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "JUPYTER_PLATFORM_DIRS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 14
    for page in pages:
        parser = _Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [address for address in parser.addresses if re.match(r"(https?:)?//", address)] == [], page
