"""The report of a run: complete, in need of nothing else, safe against what is written in it, whole of partial runs."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import RunCli
from everyrank.cli.commands import report
from everyrank.errors import DataError

_VOID = {"meta", "img"}
_PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def links(self) -> list[str | None]:
        names = ("src", "href", "xlink:href", "srcset")
        found = [value for _, attrs in self.tags for key, value in attrs.items() if key in names]
        return [link for link in found if not str(link).startswith("#")]  # those lead to a part of the page itself


def read(folder: Path) -> Page:
    assert report.main([str(folder)]) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_real_run_is_told_whole_and_fetches_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    run = run_cli("app=certify", "run.dir=run")
    assert run.returncode == 0, run.stderr
    (tmp_path / "run" / "figure.png").write_bytes(_PNG)
    done = run_cli("report", "run", program=(sys.executable, "-m", "everyrank"))
    assert (done.returncode, done.stdout) == (0, "wrote run/report.html\n"), done.stderr
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for part in (
        "Result",
        "Curves",
        "Figures",
        "History",
        "Checkpoints",
        "Ledger",
        "Versions",
        "Configuration",
        "Logs",
    ):
        assert f"<h2>{part}</h2>" in text
    assert all(str(link).startswith("data:image/png;base64,") for link in page.links())
    assert len(page.links()) == 1
    assert "script" not in page.names()
    assert "url(" not in text
    assert "@import" not in text
    charts = text.count("<svg")
    assert charts >= 2
    assert page.text.count("optimizer step") >= 2 * charts, "the axis below every chart, and the values on hover"
    assert "training, epoch mean: " in page.text
    assert "global_batch_size: 10" in page.text
    assert "[RANK 0]" in page.text
    assert "verified" in page.text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(name in page.text for name in result)


def test_nothing_that_a_run_wrote_becomes_markup(tmp_path: Path) -> None:
    evil = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_bytes(evil.encode() + b"\xff\xfe\n")
    (tmp_path / "config.yaml").write_text(evil)
    (tmp_path / "result.json").write_text(json.dumps({evil: evil}))
    rows = [{"kind": "epoch", "step": n, "epoch": n, evil: n, "train_loss": 1.0, "note": evil} for n in range(3)]
    rows.append({"kind": evil, "step": 3, "loss": evil})
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a\" onerror='b<c>.png").write_bytes(_PNG)
    page = read(tmp_path)
    assert page.text.count("<script>alert(1)</script>") >= 7, "it is shown, as text"
    assert page.names() <= {
        *("html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "h3", "div", "p", "b"),
        *("span", "table", "tr", "th", "td", "details", "summary", "pre", "figure", "figcaption", "img"),
        *("svg", "g", "path", "use", "defs", "text"),
    }
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert [str(link)[:5] for link in page.links()] == ["data:"]


def test_a_run_that_was_killed_is_told_as_far_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text(
        '{"kind": "step", "step": 1, "epoch": 0, "loss": null, "lr": 0.1}\n'
        '{"kind": "step", "step": 2, "epoch": 0, "loss": 3.0, "lr": 0.1}\n{"kind": "ste'
    )
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "ledger").mkdir()
    entry = {"step": 1, "epoch": 0, "rank": 0, "world_size": 2, "samples": [4, 4, 5]}
    (tmp_path / "ledger" / "step-00000002.jsonl").write_text(json.dumps(entry) + "\n{}\n")
    (tmp_path / "result.json").write_text("{")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-11.log").touch()
    page = read(tmp_path)
    assert "no result yet" in page.text
    assert "DAMAGED: manifest.json is missing" in page.text
    assert "history.jsonl, line 3: cut off or damaged" in page.text
    assert "an entry has not the ledger's form" in page.text
    assert "any sample twice in an epoch" in page.text
    assert "YES" in page.text


def test_a_baseline_is_drawn_beside_the_network_and_a_flat_curve_with_room_around_it(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"kind": "step", "step": n, "loss": 0.5 / n, "lr": 0.1} for n in (20, 40)]
    rows.append({"kind": "validation", "step": 40, "val_psnr": 27.8, "val_bicubic_psnr": 27.6})
    rows += [{"kind": "epoch", "epoch": n, "step": 40 + n, "val_accuracy": 1.0 - 1e-4 * n} for n in range(3)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "options.json").write_text('{"task": "demo"}')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "side_by_side.png").write_bytes(_PNG)
    page = read(tmp_path)
    for text in ("psnr", "bicubic_psnr", "27.8", '"task": "demo"', "images/side_by_side.png"):
        assert text in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels == [f"{name} over optimizer step" for name in ("loss", "accuracy", "psnr", "lr")]
    for text in ("val_psnr: 27.8 at optimizer step 40", "val_bicubic_psnr: 27.6 at", "training, each step: 0.025 at"):
        assert text in page.text, "what a point stands for is told on hover"
    assert "0.104" in page.text, "the axis of the learning rate, which is 0.1 all the time, has room around it"
    assert "0.9998" in page.text
    assert "+1" not in page.text, "an axis says what it shows, not a difference from a number in its corner"


@pytest.mark.parametrize("inside", [{"config.yaml": "a: 1"}, {"logs/rank-3.log": "last words"}])
def test_any_one_sign_of_a_run_is_enough(tmp_path: Path, inside: dict[str, str]) -> None:
    for name, text in inside.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert all(text in read(tmp_path).text for text in inside.values())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="it is no run's folder"):
        report.main([str(tmp_path)])
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.yaml").touch()
    with pytest.raises(DataError, match=r"Did you mean one of the runs in it, such as .*first"):
        report.main([str(tmp_path)])
    with pytest.raises(DataError, match="--log-lines=-1"):
        report.main([str(tmp_path / "first"), "--log-lines=-1"])
    with pytest.raises(DataError, match="cannot be written"):
        report.main([str(tmp_path / "first"), "--out", str(tmp_path / "missing" / "x.html")])
