"""Options that launching once needed are taken off the command line."""

from __future__ import annotations

import pytest

from everyrank.launch_env.legacy_arguments import local_rank_argument, strip_legacy_arguments


@pytest.mark.parametrize(
    ("argv", "clean", "noticed"),
    [
        (["--opt", "a.json"], ["--opt", "a.json"], []),
        (["--opt", "a.json", "--dist"], ["--opt", "a.json"], ["--dist"]),
        (["--dist", "True", "--opt", "a"], ["--opt", "a"], ["--dist"]),
        (["--dist=false", "--opt", "a"], ["--opt", "a"], ["--dist"]),
        (["--launcher", "pytorch", "--dist", "--opt", "a"], ["--opt", "a"], ["--launcher", "--dist"]),
        (["--launcher=slurm"], [], ["--launcher"]),
        (["--local-rank=3", "--opt", "a"], ["--opt", "a"], []),
        (["--local_rank", "0", "x"], ["x"], []),
        (["--distance", "3", "--launchers"], ["--distance", "3", "--launchers"], []),
    ],
)
def test_strips(argv: list[str], clean: list[str], noticed: list[str]) -> None:
    rest, notices = strip_legacy_arguments(argv)
    assert rest == clean
    assert [notice.split()[0] for notice in notices] == noticed


@pytest.mark.parametrize(
    ("argv", "rank"),
    [
        ([], None),
        (["--local-rank=2"], 2),
        (["--local_rank=2"], 2),
        (["x", "--local-rank", "5"], 5),
        (["--local_rank", "1"], 1),
        (["--local-rank"], None),
        (["--local-rank=x"], None),
        (["--local-ranks=1"], None),
    ],
)
def test_reads_the_local_rank(argv: list[str], rank: int | None) -> None:
    assert local_rank_argument(argv) == rank
