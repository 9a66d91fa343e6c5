"""What an earlier launch left is cleared by all hosts that share the folder, at the same time."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from everyrank.diagnosis.rank_files import clear_errors, clear_watch
from everyrank.diagnosis.verdict import clear_verdicts


def test_hosts_that_clear_a_shared_folder_at_once_do_not_stumble_over_each_other(tmp_path: Path) -> None:
    for _ in range(4):
        for rank in range(200):
            attempt = tmp_path / "watch" / f"attempt-{rank % 3}"
            attempt.mkdir(parents=True, exist_ok=True)
            for path in (
                tmp_path / f"rank-{rank}.error.json",
                tmp_path / f"verdict-{rank}.json",
                tmp_path / "watch" / f"host-{rank}.json",
                attempt / f"rank-{rank}.report.json",
            ):
                path.touch()
                os.utime(path, (0, 0))

        def clear(host: int) -> None:
            clear_errors(str(tmp_path))
            clear_verdicts(str(tmp_path))
            clear_watch(str(tmp_path / "watch"), older_than_s=60.0)

        with ThreadPoolExecutor(4) as hosts:
            list(hosts.map(clear, range(4)))
        assert list(tmp_path.iterdir()) == [tmp_path / "watch"]
        assert list((tmp_path / "watch").iterdir()) == []
