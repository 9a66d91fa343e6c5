"""What a run leaves behind shows no secret, and the ranks have it all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import nightly


@pytest.mark.parametrize("driver", ["local", "torchrun", nightly("launch")])
def test_secrets_reach_the_ranks_by_environment_only(run_cli: Callable[..., Any], tmp_path: Path, driver: str) -> None:
    done = run_cli(
        f"driver={driver}",
        *("app=custom", "app._target_=probe_apps.ReadsSecrets", "+app.folder=told"),
        *("+app.password=${oc.env:OF_THE_SHELL}", "env.variables.MY_API_TOKEN=open sesame", "env.variables.NUMBER=3"),
        *("env.variables.FLAG=true", "env.variables.HALF=0.5", "+app.accounts=[{api_key:xyzzy},{api_key:plugh}]"),
        env={"OF_THE_SHELL": "hush hush"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told" / "seen-0").read_text() == "hush hush|open sesame|3|true|0.5|xyzzy|plugh"
    (tmp_path / "told" / "seen-0").unlink()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "run.yaml" for path in left)
    for text in (done.stdout, done.stderr, *(path.read_text(errors="replace") for path in left)):
        assert "sesame" not in text
        assert "hush" not in text
        assert "xyzzy" not in text
        assert "plugh" not in text
    assert "variable: NUMBER=3" in done.stdout
