"""What people write into settings reaches a command or a script as one value; secrets reach neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from everyrank.config.secrets import Secret, looks_secret
from everyrank.drivers.cluster import check_hosts
from everyrank.drivers.driver import LaunchRequest
from everyrank.drivers.kubernetes import KubernetesConfig, KubernetesDriver
from everyrank.drivers.legacy_launch import LegacyLaunchConfig, LegacyLaunchDriver
from everyrank.drivers.mpi import MpiConfig, MpiDriver
from everyrank.drivers.slurm import SlurmDriver
from everyrank.drivers.slurm_script import SlurmConfig
from everyrank.drivers.spawn import SpawnConfig, SpawnDriver
from everyrank.drivers.ssh import SshDriver
from everyrank.drivers.torchrun import TorchrunDriver
from everyrank.drivers.torchrun_config import TorchrunConfig
from everyrank.errors import DriverError

REQUEST = LaunchRequest(config_file="/runs/r/run.yaml", config_text="a: 1\n", run_dir="/runs/r", cwd="/work")


@pytest.mark.parametrize("host", ["-oProxyCommand=touch /tmp/owned", "a b", "a\nb", "", "node1;reboot", "$(id)", "a,b"])
@pytest.mark.parametrize("driver", ["ssh", "mpi"])
def test_what_is_no_host_is_refused(host: str, driver: str) -> None:
    chosen: Any = (
        SshDriver(TorchrunConfig(hosts=["n", host])) if driver == "ssh" else MpiDriver(MpiConfig(hosts=[host]))
    )
    with pytest.raises(DriverError, match=r"which is no host\. Fix: write NAME"):
        chosen.plan(REQUEST)


@pytest.mark.parametrize("host", ["node1", "me@node-2.cluster", "10.0.0.7", "[fe80::1%eth0]"])
def test_hosts_are_taken_as_they_are(host: str) -> None:
    check_hosts([host])


def _directives(**settings: object) -> list[str]:
    plan = SlurmDriver(SlurmConfig(**settings)).plan(REQUEST)
    script = next(text for path, text in plan.files.items() if path.endswith(".sh"))
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "a\rb", "\t", "  "])
@pytest.mark.parametrize("key", ["job_name", "partition", "account", "qos", "constraint", "mem"])
def test_an_option_of_sbatch_is_one_line(key: str, value: str) -> None:
    with pytest.raises(DriverError, match=f"driver.{key}=.*Fix: leave out line breaks"):
        _directives(**{key: value})


def test_an_option_of_sbatch_with_a_space_is_quoted() -> None:
    assert '#SBATCH --job-name="my \\"first\\" run"' in _directives(job_name='my "first" run')
    assert "#SBATCH --partition=gpu" in _directives(partition="gpu")


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("WANDB_API_KEY", True),
        ("HF_TOKEN", True),
        ("DB_PASSWORD", True),
        ("MONKEY", False),
        ("NCCL_DEBUG", False),
        ("TOKENIZERS_PARALLELISM", False),
    ],
)
def test_names_that_look_secret(name: str, hidden: bool) -> None:
    assert looks_secret(name) is hidden


@pytest.mark.parametrize(
    "driver",
    [
        TorchrunDriver(TorchrunConfig()),
        SpawnDriver(SpawnConfig()),
        LegacyLaunchDriver(LegacyLaunchConfig()),
        MpiDriver(MpiConfig()),
        SlurmDriver(SlurmConfig()),
        SshDriver(TorchrunConfig(hosts=["node0"])),
        KubernetesDriver(KubernetesConfig(image="image", secret="mine")),
    ],
    ids=lambda driver: type(driver).__name__,
)
def test_no_command_no_file_and_no_line_of_a_plan_shows_a_secret(driver: Any) -> None:
    plan = driver.plan(replace(REQUEST, env={"MY_TOKEN": Secret("sesame"), "OPEN": "to all"}))
    assert "sesame" not in plan.render(with_files=True)
    assert not any("sesame" in part for part in plan.command)
    assert plan.env["MY_TOKEN"] == "sesame", "the ranks get it, by their environment"


def test_a_manifest_holds_no_secret() -> None:
    with pytest.raises(DriverError, match=r"MY_TOKEN looks secret.*Fix: kubectl create secret"):
        KubernetesDriver(KubernetesConfig(image="image")).plan(replace(REQUEST, env={"MY_TOKEN": Secret("sesame")}))
