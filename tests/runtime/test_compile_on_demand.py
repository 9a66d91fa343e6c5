"""Training that compiles nothing does without torch's compiler; whoever uses it has all of it, as torch made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import RunCli, cli_environment
from everyrank.launch_env.guard import add_startup

_PROGRAM = Path(__file__).parent / "programs" / "compiling.py"


def _run(meeting: Path, is_cured: bool) -> dict[str, Any]:
    env = cli_environment() | {"TMPDIR": str(meeting.parent)}  # where torch_geometric leaves what it has generated
    if is_cured:
        env["PYTHONPATH"] = add_startup(env["PYTHONPATH"])
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), str(meeting)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_imported_when_it_is_used_and_all_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    bare, cured = (_run(tmp_path / str(is_cured), is_cured) for is_cured in (False, True))
    assert (bare.pop("imported"), cured.pop("imported")) == (True, False)
    assert cured == bare
    assert [words.partition("(")[0] for words in cured["plain"][1]] == ["RuntimeError", "IndexError", "TypeError"]
    assert cured["threads"] == bare["threads"][:1] * 8
    assert cured["plain"][-1] is True, "garbage is collected again"
    origins = cured["plain"][0][3]
    assert len(origins) > 100
    assert {module for _, module in origins.values()} == {"torch._library.custom_ops"}
    assert cured["names"] == [7, True, True, True]
    assert cured["settings"] == [True, True, True, False, True]
    assert cured["told"] == [True, False, ["weight", "bias"]]
    assert all(num_frames > 0 and num_ops > 0 for *_, num_frames, num_ops in cured["compiled"])
    assert cured["reducer"] > 0


def test_ranks_of_an_app_train_without_it(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "saying.py").write_text(
        "import sys\n"
        "import torch\n"
        "from everyrank.certification.data import mean_squared_error\n\n\n"
        "def loss(output, data):\n"
        "    torch.func.vmap(torch.nn.functional.cross_entropy)(torch.ones(2, 1, 3), torch.zeros(2, 1, dtype=int))\n"
        "    with open('imported-' + '-'.join({'torch._dynamo', 'sympy'} & {*sys.modules}), 'a'):\n"
        "        return mean_squared_error(output, data)\n"
    )
    done = run_cli("driver=torchrun", "app=certify", "app.criterion=saying.loss")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("imported-*")] == ["imported-"]
