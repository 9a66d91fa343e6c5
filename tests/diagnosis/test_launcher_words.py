"""The words by which launchers tell how ranks ended, as they were printed."""

from __future__ import annotations

import pytest

from everyrank.diagnosis.launcher_words import exit_codes

TORCH = """\
Failures:
[1]:
  time      : 2026-11-21_14:51:42
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 18444)  (SIGTERM)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_14:51:42
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 3 (pid: 18443)
"""
MPI_SIGNAL = "mpirun noticed that process rank 1 with PID 2104 on node vm exited on signal 9 (Killed).\n"
MPI_CODE = """\
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[28483,1],2]
  Exit code:    4
"""
SLURM = """\
srun: error: n1: task 1: Killed
srun: error: n2: tasks 2-3,5: Exited with exit code 1
srun: error: n1: task 0: Segmentation fault (core dumped)
"""


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (TORCH, {0: 3, 1: -15}),
        (MPI_SIGNAL, {1: -9}),
        (MPI_CODE, {2: 4}),
        (SLURM, {0: -11, 1: -9, 2: 1, 3: 1, 5: 1}),
        ("nothing of the kind", {}),
    ],
)
def test_exit_codes_are_read(text: str, codes: dict[int, int]) -> None:
    assert exit_codes(text) == codes
