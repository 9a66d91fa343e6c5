"""Programs that nobody here wrote, and what proves that both ranks did the work."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path

_SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Program:
    """A program, and what both ranks together must have said: each pattern, so many times."""

    script: Path
    said: dict[str, int]
    env: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()

    def missing(self, output: str) -> dict[str, int]:
        """How often each pattern was said that was not said often enough."""
        counts = {pattern: len(re.findall(pattern, output, re.MULTILINE)) for pattern in self.said}
        return {pattern: count for pattern, count in counts.items() if count < self.said[pattern]}


def _of_package(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path


def programs() -> dict[str, Program]:
    """The programs by name; of the packages that are installed here."""
    cpu = {"ACCELERATE_USE_CPU": "true"}
    return {
        "accelerate_script": Program(
            _of_package("accelerate", "test_utils/scripts/test_script.py"),
            {r"^Num processes: 2": 2, "Training integration test": 1},
            cpu,
        ),
        "accelerate_sync": Program(
            _of_package("accelerate", "test_utils/scripts/test_sync.py"),
            {"Test Distributed `no_sync` context manager": 1},
            cpu,
        ),
        # On a CPU two ranks of it are two jobs of one process: only where it believes in CUDA does it meet the others.
        "accelerate_ops": Program(
            _of_package("accelerate", "test_utils/scripts/test_ops.py"),
            {r"MULTI_GPU  Backend: nccl\nNum processes: 2": 1, "testing sending tensors across devices": 1},
            settings=("rehearse=cpu",),
        ),
        "launcher": Program(_SCRIPTS / "launcher_script.py", {r"^launcher rank [01] of 2: \[1, 1\] came": 2}),
        "fabric": Program(_SCRIPTS / "fabric_script.py", {r"^fabric rank [01] of 2: equal weights": 2}),
        "ignite": Program(_SCRIPTS / "ignite_script.py", {r"^ignite rank [01] of 2 by native-dist: agreed": 2}),
        "graphs": Program(
            _SCRIPTS / "graphs_script.py",
            {r"^graphs rank [01] of 2: 4 of 8 graphs": 2},
            env={"TMPDIR": "."},  # PyTorch Geometric writes the code of its layers there, and leaves it
        ),
    }
