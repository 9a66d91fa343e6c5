"""Fill the tables and outputs of README.md and docs/ from the files that commands wrote.

    make pages                                    from docs/results/ and benchmarks/results/
    python scripts/write_pages.py RUN [RUN ...]   first keep what the pages show of these run folders

What stands between ``<!-- shown: NAME -->`` and ``<!-- end -->`` is written here; tests/docs/test_pages.py compares.
A RUN is the folder of ``app=causal_sets``, of ``app=causal_sets_full``, or of a demo of video restoration.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
KEPT = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- shown: (\S+) -->\n).*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)


def written_pages() -> dict[Path, str]:
    """Path and content of every page that shows a result."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    return {page: BLOCK.sub(_fill, text) for page, text in texts.items() if BLOCK.search(text)}


def _fill(block: re.Match[str]) -> str:
    name = block[2]
    if name not in SHOWN:
        raise SystemExit(f"There is nothing called {name!r} to show. Allowed: {', '.join(SHOWN)}.")
    return f"{block[1]}\n{SHOWN[name]().rstrip()}\n\n{block[3]}"


def _output(name: str, num_tables: int | None = None) -> Callable[[], str]:
    """Show a kept output, or what it has up to the end of its first tables."""

    def show() -> str:
        text = (KEPT / f"{name}.txt").read_text(encoding="utf-8")
        if num_tables is not None:
            text = "".join(f"{table}┘\n" for table in text.split("┘\n")[:num_tables])
        return "```text\n" + "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n```"

    return show


def _certificate() -> str:
    """Show the table alone, without the lines of progress."""
    text = (KEPT / "certify.txt").read_text(encoding="utf-8")
    return "```text\n" + text[text.index("┏") : text.index("┘") + 1] + "\n```"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _results(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def _slow_link() -> str:
    names = {
        "hand-written DDP": "plain DDP, a loop written by hand",
        "everyrank": "everyrank, plain",
        "bf16": "`comm_hook: bf16`",
        "fp16": "`comm_hook: fp16`",
        "PowerSGD": "`comm_hook: powersgd`, rank 8",
        "local SGD, 32": "`local_updates`, every 32 (local SGD)",
        "DiLoCo, 32": "every 32, outer optimizer (DiLoCo)",
        "DiLoCo, 16, bf16": "every 16, outer optimizer, bf16",
    }
    results = _results("slow_link")["results"]
    rows = [
        [
            title,
            f"{1e3 * row['seconds_per_step']:.0f} ms",
            f"{row['time_ratio']:.3f}",
            f"{row['bytes_per_step'] / 1e3:,.0f}",
            f"{row['held_out_loss']:.4f}",
            f"{row['loss_ratio']:.3f}",
        ]
        for title, row in ((title, results[name]) for name, title in names.items())
    ]
    above = [f"{100 * (results[name]['loss_ratio'] - 1):.1f} %" for name in list(names)[-3:]]
    return (
        _table(["", "time per step", "of plain DDP", "kB sent per step", "loss", "of plain DDP"], rows)
        + f"\n\nLocal SGD stays {above[0]} above the loss of plain DDP; the outer optimizer brings that to {above[1]}, "
        f"twice as many\nsyncs to {above[2]}."
    )


def _vrt() -> str:
    results, rows = _results("vrt_cpu")["results"], []
    for name in ("super_resolution", "deblurring"):
        for mode, title in (("forward", "forward"), ("backward", "forward and backward")):
            ours, theirs = (results[f"{name} {mode} {who}"] for who in ("everyrank", "reference"))
            costs = [f"{each['seconds']:.2f} s, {each['mib']:.0f} MiB" for each in (ours, theirs)]
            ratios = [f"{ours[key] / theirs[key]:.2f}" for key in ("seconds", "mib")]
            rows.append([name.replace("_", "-"), title, *costs, *ratios])
    return _table(["configuration", "", "VRT here", "straightforward", "ratio of time", "ratio of memory"], rows)


def _launch() -> str:
    names = {
        "bare torchrun": "bare `torchrun`",
        "mp.spawn": "`mp.spawn`",
        "accelerate launch": "`accelerate launch`",
        "driver=torchrun (forkserver)": "`driver=torchrun` (forkserver, the default)",
        "driver=torchrun (spawn)": "`driver=torchrun driver.start_method=spawn`",
        "driver=torchrun (fork)": "`driver=torchrun driver.start_method=fork`",
        "everyrank run -- script": "`everyrank run -- script.py`",
        "everyrank torchrun script": "`everyrank torchrun script.py`",
        "everyrank.launch": "`everyrank.launch`, first call",
    }
    results = _results("launch")
    rows = [[title, f"{results[name]['ratio']:.2f}"] for name, title in names.items() if name in results]
    second = results["everyrank.launch"]["second_call_ratio"]
    rows.append(["`everyrank.launch`, second call from the same process", f"{second:.2f}"])
    return _table(["two ranks over gloo, whole process", "of bare `torchrun`'s time"], rows)


def _restart() -> str:
    names = {
        "torchrun --max-restarts=1": "`torchrun --max-restarts=1`",
        "driver=torchrun": "`driver=torchrun driver.max_restarts=1`",
    }
    rows = [[title, f"{_results('restart')[name]['ratio']:.2f}"] for name, title in names.items()]
    return _table(["launcher", "of `torchrun --max-restarts`"], rows)


def _step() -> str:
    found: dict[str, list[str]] = {}
    results = _results("step")["results"]
    for result in results:
        medians = result["seconds_per_step"]
        for contender, median in medians.items():
            cell = f"{median / medians['hand-written DDP']:.2f}"
            found.setdefault(contender, []).append(cell)
    head = [f"{result['model']}, {result['world_size']} rank{'s' * (result['world_size'] > 1)}" for result in results]
    return _table(["contender", *head], [[contender, *cells] for contender, cells in found.items()])


def _permutation() -> str:
    rows = []
    for power, both in _results("permutation").items():
        cells = []
        for which in ("everyrank", "DistributedSampler"):
            row = both[which]
            needed = f"left out: about {row.get('needed_bytes', 0) / 2**30:,.0f} GiB"
            cells.append(
                f"{1e3 * row['seconds']:.2f} ms, {row['bytes'] / 2**20:.1f} MiB" if "seconds" in row else needed
            )
        rows.append([power, *cells])
    return _table(["n", "everyrank", "`DistributedSampler`"], rows)


def _checkpoint() -> str:
    results = _results("checkpoint")
    others = [name for name in next(iter(results.values())) if name != "torch.save"]
    ratio = {
        size: {name: [row[name][key] / row["torch.save"][key] for key in ("median_s", "first_s")] for name in others}
        for size, row in results.items()
    }
    table = _table(
        ["state", *others], [[f"{size} MB", *(f"{row[name][0]:.2f}" for name in others)] for size, row in ratio.items()]
    )
    first = ", ".join(f"{row['everyrank'][1]:.2f} at {size} MB" for size, row in ratio.items())
    return f"{table}\n\nThe first save also allocates the memory of the copy: of `torch.save`'s first, {first}."


SHOWN: dict[str, Callable[[], str]] = {
    "quickstart": _output("causal_sets", num_tables=2),
    "causal_sets_full": _output("causal_sets_full"),
    "certify": _certificate,
    "demo_bigbuckbunny_x4": _output("demo_bigbuckbunny_x4"),
    "demo_carphone_compression": _output("demo_carphone_compression"),
    "slow_link": _slow_link,
    "vrt": _vrt,
    "launch": _launch,
    "restart": _restart,
    "step": _step,
    "permutation": _permutation,
    "checkpoint": _checkpoint,
    "verdicts": lambda: str(_results("verdicts")["table"]),
}
"""What a page can show, by the name in its marker."""


def keep(run: Path) -> None:
    """Copy what the pages show of a run to docs/results and docs/images."""
    KEPT.mkdir(exist_ok=True)
    if (run / "causal_sets.txt").exists():
        name = run.name.rpartition("-")[0]
        shutil.copy(run / "causal_sets.txt", KEPT / f"{name}.txt")
        shutil.copy(run / "result.json", KEPT / f"{name}.json")
        if name == "causal_sets_full":
            shutil.copy(run / "causal_sets.png", IMAGES / f"{name}.png")
    elif (run / "scores.txt").exists():
        shutil.copy(run / "scores.txt", KEPT / f"{run.name}.txt")
        (picture,) = (run / "images").glob("side_by_side_*.png")
        shutil.copy(picture, IMAGES / f"{run.name}.png")
    else:
        raise SystemExit(f"{run} holds neither causal_sets.txt nor scores.txt. Fix: name the folder of a finished run.")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        keep(Path(folder))
    for path, text in written_pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
