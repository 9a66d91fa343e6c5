"""The command: its formats, exit codes, selections, and that it writes only what it was asked to write."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from everyrank.cli.main import main

OLD = """\
import argparse
import os

import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
os.environ["MASTER_PORT"] = "29500"
"""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.py").write_text(OLD)
    return tmp_path / "old.py"


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["check", *arguments])
    return code, capsys.readouterr().out


def test_text_names_the_place_and_the_exit_code_says_that_something_is_left(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = _run(capsys, "old.py")
    assert code == 1
    assert [line.split(" ")[:2] for line in out.splitlines()[:-1]] == [
        ["old.py:7:1:", "ER003"],
        ["old.py:8:1:", "ER006"],
    ]
    assert out.splitlines()[-1] == "1 file checked, 2 findings; 2 mended by --fix [*]."
    assert old.read_text() == OLD


def test_json_is_as_ruff_has_it(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(capsys, "old.py", "--output-format=json", "--select", "ER006")
    (finding,) = json.loads(out)
    assert code == 1
    assert finding["filename"] == str(old)
    assert finding["code"] == "ER006"
    assert finding["location"] == {"row": 8, "column": 1}
    assert finding["end_location"] == {"row": 8, "column": 36}
    assert finding["fix"]["applicability"] == "safe"
    assert finding["fix"]["edits"] == [
        {
            "content": 'os.environ.setdefault("MASTER_PORT", "29500")',
            "location": {"row": 8, "column": 1},
            "end_location": {"row": 8, "column": 36},
        }
    ]
    (old.parent / "bad.py").write_text("import os\n")
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--output-format=json", "bad.py"],
        capture_output=True, text=True, check=False, cwd=old.parent,
    )  # fmt: skip
    (theirs,) = json.loads(ruff.stdout)
    assert set(finding) <= set(theirs) | {"cell"}
    assert {k: type(v) for k, v in finding["location"].items()} == {k: type(v) for k, v in theirs["location"].items()}
    assert set(finding["fix"]) == set(theirs["fix"])
    assert set(finding["fix"]["edits"][0]) == set(theirs["fix"]["edits"][0])


def test_github(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(capsys, "old.py", "--output-format=github", "--select", "ER003")
    assert code == 1
    assert out.startswith("::error file=old.py,line=7,col=1,endLine=7,endColumn=57,title=everyrank (ER003)::The option")
    assert out.count("\n") == 1


def test_sarif_holds_what_the_standard_requires(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Required properties of SARIF 2.1.0: 3.13 log, 3.14 run, 3.19 driver, 3.49 rule, 3.27 result, 3.30 region."""
    (old.parent / "a file.py").write_text("def broken(:\n")
    code, out = _run(capsys, ".", "--output-format=sarif", "--select=ALL")
    assert code == 1
    log = json.loads(out)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert run["columnKind"] == "unicodeCodePoints"
    driver = run["tool"]["driver"]
    assert driver["name"]
    rules = [rule["id"] for rule in driver["rules"]]
    assert len(rules) == len(set(rules))
    assert all(rule["shortDescription"]["text"] for rule in driver["rules"])
    found = set()
    for result in run["results"]:
        assert result["ruleId"] in rules
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        (location,) = result["locations"]
        place = location["physicalLocation"]
        region = place["region"]
        assert 1 <= region["startLine"] <= region["endLine"]
        assert min(region["startColumn"], region["endColumn"]) >= 1
        found.add((place["artifactLocation"]["uri"], result["ruleId"]))
    assert {("a%20file.py", "ER000"), ("old.py", "ER003"), ("old.py", "ER006")} <= found


def test_fix_writes_and_keeps_the_mode_and_the_ends_of_lines(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old.write_bytes(b"\xef\xbb\xbf" + OLD.replace("\n", "\r\n").encode())
    old.chmod(0o755)
    code, out = _run(capsys, "--fix", "old.py")
    assert (code, out) == (0, "1 file checked, 2 mended, nothing found.\n")
    data = old.read_bytes()
    assert data.startswith(b"\xef\xbb\xbfimport argparse\r\n")
    assert data.count(b"\n") == data.count(b"\r\n") == OLD.count("\n")
    assert b'"--local_rank", "--local-rank"' in data
    assert stat.S_IMODE(old.stat().st_mode) == 0o755
    assert os.listdir(old.parent) == ["old.py"]
    assert _run(capsys, "--fix", "old.py")[0] == 0
    assert old.read_bytes() == data


def test_diff_writes_nothing_and_is_what_fix_does(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(capsys, "--diff", "old.py")
    assert code == 1
    assert old.read_text() == OLD
    subprocess.run(["git", "apply", "-p0", "-"], input=out, text=True, check=True, cwd=old.parent)
    by_patch = old.read_text()
    old.write_text(OLD)
    _run(capsys, "--fix", "old.py")
    assert old.read_text() == by_patch
    assert _run(capsys, "--diff", "old.py") == (0, "")


@pytest.mark.parametrize(
    ("comment", "left"),
    [("# noqa", 0), ("# noqa: ER006", 0), ("# noqa:er006, E501", 0), ("# noqa: ER003", 1), ("# noqa: F401", 1)],
)
def test_noqa(old: Path, capsys: pytest.CaptureFixture[str], comment: str, left: int) -> None:
    old.write_text(OLD.rstrip() + f"  {comment}\n")
    code, out = _run(capsys, "old.py", "--select", "ER006")
    assert (code, out.count("ER006")) == (left, left)


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        ([], {"ER003", "ER006"}),
        (["--select", "ER00"], {"ER003", "ER006"}),
        (["--select", "ER1,ER4"], set()),
        (["--ignore", "ER003"], {"ER006"}),
        (["--ignore", "ER"], set()),
        (["--select", "ER003", "--ignore", "ER"], {"ER003"}),
        (["--select", "ALL", "--ignore", "ER00"], set()),
    ],
)
def test_selection(old: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], codes: set[str]) -> None:
    code, out = _run(capsys, "old.py", "--output-format=json", *arguments)
    assert {finding["code"] for finding in json.loads(out)} == codes
    assert code == bool(codes)


def test_the_configuration_is_read_and_checked(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old.parent / "pyproject.toml").write_text('[tool.everyrank.check]\nignore = ["ER003"]\nexclude = ["other*"]\n')
    (old.parent / "other.py").write_text(OLD)
    _, out = _run(capsys, ".", "--output-format=json")
    assert [finding["code"] for finding in json.loads(out)] == ["ER006"]
    _, out = _run(capsys, ".", "--no-config", "--output-format=json")
    assert len(json.loads(out)) == 4
    (old.parent / "pyproject.toml").write_text('[tool.everyrank.check]\nignor = ["ER003"]\n')
    assert main(["check", "."]) == 2
    assert "Did you mean 'ignore'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No path was given"),
        (["nowhere.py"], "there is no such file"),
        (["--select", "ER9", "old.py"], "no rule's code begins so"),
        (["--unsafe", "old.py"], "--unsafe was given without --fix"),
    ],
)
def test_a_wrong_command_is_one_message(
    old: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Fix:" in error


def test_a_file_that_does_not_parse_is_one_message_and_the_rest_goes_on(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old.parent / "a_broken.py").write_text("import os\nprint 'two'\n")
    (old.parent / "b_latin.py").write_bytes(b"x = '\xe9'\n")
    (old.parent / "c_broken.sh").write_text("if true; then torchrun train.py\n")
    (old.parent / "d_broken.json").write_text('{"find_unused_parameters": \n')
    code, out = _run(capsys, ".", "--output-format=json")
    found = [(Path(f["filename"]).name, f["location"]["row"]) for f in json.loads(out) if f["code"] == "ER000"]
    assert code == 1
    assert [name for name, _ in found] == ["a_broken.py", "b_latin.py", "c_broken.sh", "d_broken.json"]
    assert dict(found)["a_broken.py"] == 2
    assert {f["code"] for f in json.loads(out)} == {"ER000", "ER003", "ER006"}


def test_it_starts_fast_and_without_torch(old: Path) -> None:
    code = (
        "import sys; from everyrank.cli.main import main; main(['check', 'old.py']); "
        "print(sorted({'torch', 'numpy', 'hydra', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=old.parent)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_hook_for_other_repositories_runs_on_a_list_of_files(old: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    (old.parent / "good.py").write_text("import torch\n")
    command = [sys.executable, "-m", *hook["entry"].split()]
    done = subprocess.run([*command, "good.py"], capture_output=True, text=True, check=False, cwd=old.parent)
    assert (done.returncode, done.stdout) == (0, "1 file checked, nothing found.\n")
    done = subprocess.run([*command, "good.py", "old.py"], capture_output=True, text=True, check=False, cwd=old.parent)
    assert done.returncode == 1
    assert done.stdout.count("old.py:") == 2
    assert hook["id"] == "everyrank-check"
    assert hook["language"] == "python"


def test_many_files_are_shared_among_processes_in_their_order(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(60):
        (old.parent / f"file_{number:02}.py").write_text("\n" * number + OLD)
    code, out = _run(capsys, ".", "--jobs=2", "--select=ER006")
    rows = [line.split(":")[:2] for line in out.splitlines()[:-1]]
    assert code == 1
    assert rows == [*([f"./file_{n:02}.py", str(8 + n)] for n in range(60)), ["./old.py", "8"]]
    assert _run(capsys, ".", "--jobs=1", "--select=ER006")[1] == out


def test_shell_in_a_file_without_a_known_suffix_is_read_when_it_is_named(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old.parent / "launch").write_text("#!/bin/bash\npython -m torch.distributed.launch --use_env train.py\n")
    code, out = _run(capsys, "launch")
    assert code == 1
    assert out.startswith("launch:2:11: ER004 [*]")
    _run(capsys, "--fix", "launch")
    assert (old.parent / "launch").read_text() == "#!/bin/bash\ntorchrun train.py\n"


def test_the_new_launcher_is_safe_where_the_program_reads_local_rank(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old.parent / "run.sh").write_text("python -m torch.distributed.launch --nproc_per_node=2 old.py --lr 1\n")
    _run(capsys, "--fix", "run.sh")
    assert "torch.distributed.launch" in (old.parent / "run.sh").read_text()
    _run(capsys, "--fix", "old.py")
    assert _run(capsys, "--fix", "run.sh")[0] == 0
    assert (old.parent / "run.sh").read_text() == "torchrun --nproc_per_node=2 old.py --lr 1\n"
