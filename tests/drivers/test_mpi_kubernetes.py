"""Open MPI, started for real; Kubernetes manifests, checked against the published fields; what is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from conftest import RunCli

pytestmark = pytest.mark.cluster

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="mpirun not installed (scripts/install_cluster_tools.sh installs it)"
)


@needs_mpi
@pytest.mark.nightly  # by day a script, on hosts: tests/cluster/test_scripts.py
def test_ranks_of_mpirun_meet_without_flags(run_cli: RunCli) -> None:
    code = (
        "import everyrank, torch\n"
        "with everyrank.join() as world:\n"
        "    total = int(everyrank.reduce_sum(torch.tensor(world.rank)))\n"
        "    print(f'rank {world.rank} of {world.world_size} by {world.launcher}: {total}', flush=True)\n"
    )
    mpirun = ("mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
    done = run_cli(sys.executable, "-c", code, program=mpirun)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2 by openmpi: 1" in done.stdout


@needs_mpi
@pytest.mark.nightly  # by day a script is started, see tests/cluster/test_scripts.py
def test_driver_mpi_runs_an_app(run_cli: RunCli) -> None:
    done = run_cli("driver=mpi", "app=hello_dist", "driver.nproc_per_node=3")
    assert done.returncode == 0, done.stderr
    assert "[Rank 0] Sum of all ranks: 3" in done.stdout
    assert "[Rank 2/3] Local rank: 2" in done.stdout


@needs_mpi
def test_driver_mpi_names_the_guilty_rank(run_cli: RunCli) -> None:
    failed = run_cli("driver=mpi", "app=custom", "app._target_=probe_apps.RaisesOnRank", "+app.guilty=1")
    assert failed.returncode == 1
    assert "error: rank 1 of 2 failed: LookupError: the sample 1 is missing" in failed.stderr


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_kubernetes_manifest_has_only_published_fields(run_cli: RunCli, tmp_path: Path, nodes: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    settings = (f"driver.nodes={nodes}", "driver.nproc_per_node=8", "driver.gpus_per_node=8", "driver.cpus_per_node=32")
    volume = ("driver.image=registry.example/us/train:1", "driver.volume_claim=runs", "driver.memory_per_node=64Gi")
    done = run_cli("driver=kubernetes", "app=hello_dist", *settings, *volume)
    assert done.returncode == 0, done.stderr
    assert "kubectl apply --filename" in done.stdout
    manifest = next(path for path in tmp_path.glob("outputs/*/*.yaml") if path.stem.startswith("hello-dist"))
    config_map, job = yaml.safe_load_all(manifest.read_text())
    schema = json.loads((Path(__file__).parent / "pytorchjob.schema.json").read_text())
    jsonschema.validate(job, schema)

    assert yaml.safe_load(config_map["data"]["run.yaml"])["app"]["name"] == "hello_dist"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == nodes
    assert ("Worker" in replicas) == (nodes > 1)
    for replica in replicas.values():
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        assert container["ports"][0]["name"] == "pytorchjob-port"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        if nodes > 1:
            assert f"driver.master_addr={job['metadata']['name']}-master-0" in container["command"][2]


def test_a_manifest_without_image_or_shared_volume_is_refused(run_cli: RunCli) -> None:
    done = run_cli("driver=kubernetes", "app=hello_dist", "driver.dry_run=true")
    assert done.returncode == 2
    assert "driver.image was not set" in done.stderr
    done = run_cli("driver=kubernetes", "app=hello_dist", "driver.image=x", "driver.nodes=2", "driver.dry_run=true")
    assert done.returncode == 2
    assert "driver.volume_claim" in done.stderr


@pytest.mark.parametrize(
    ("driver", "named"),
    [
        ("slurm", ("the program sbatch is not installed here", "slurm-client")),
        ("mpi", ("the program mpirun is not installed here", "openmpi-bin")),
        ("ray", ("the Python package ray is not installed here", "pip install 'everyrank[ray]'")),
        ("torchrun driver.hosts=[a,b]", ("the program ssh is not installed here", "openssh-client")),
    ],
)
def test_what_is_not_installed_is_named_with_what_to_install(
    run_cli: RunCli, tmp_path: Path, driver: str, named: tuple[str, str]
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ray' else found(name, *rest)\n"
    )
    done = run_cli(*f"driver={driver}".split(), "app=hello_dist", env={"PATH": "", "PYTHONPATH": str(hidden)})
    assert done.returncode == 2
    for text in named:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
