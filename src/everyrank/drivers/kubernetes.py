"""``driver=kubernetes``: a manifest for the Kubeflow training operator; one pod a node, each running torch's engine."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from typing import Any

from everyrank.config.schema import field, section
from everyrank.config.secrets import Secret
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.drivers.cluster import node_command
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest, rank_variables
from everyrank.errors import DriverError

_CONFIG_FOLDER = "/etc/everyrank"
_INDEX_LABEL = "metadata.labels['training.kubeflow.org/replica-index']"  # put on each pod by the operator


@section
class KubernetesConfig(DriverConfig):
    """``driver=kubernetes``: a PyTorchJob of the Kubeflow training operator."""

    image: str = field(default="", doc="Container image that has everyrank and your app; required.")
    nodes: int = field(default=1, ge=1, doc="Number of pods.")
    nproc_per_node: int = field(default=1, ge=1, doc="Ranks in each pod.")
    namespace: str = field(default="default", doc="Namespace of the job.")
    volume_claim: str | None = field(
        default=None, doc="PersistentVolumeClaim for the runs, mounted at env.output_dir; several nodes need one."
    )
    gpus_per_node: int = field(default=0, ge=0, doc="GPUs of each pod.")
    cpus_per_node: int | None = field(default=None, ge=1, doc="Cores of each pod; null: no request.")
    memory_per_node: str | None = field(default=None, doc="Memory of each pod, for example 64Gi; null: no request.")
    working_dir: str | None = field(default=None, doc="Folder in the image to run in; null: the image's own.")
    python: str = field(default="python", doc="Python in the image.")
    secret: str | None = field(
        default=None, doc="Secret of the namespace that holds the variables whose names look secret, by their names."
    )
    backoff_limit: int = field(default=3, ge=0, doc="How often a failed job is started again.")
    master_port: int = field(default=23456, gt=0, lt=65536, doc="Port of the first pod, where the nodes meet.")

    @property
    def num_nodes(self) -> int:
        """Pods of the job."""
        return self.nodes


class KubernetesDriver(Driver[KubernetesConfig]):
    """Writes the manifest; applying it is left to kubectl."""

    name = "kubernetes"
    is_elsewhere = True
    config_type = KubernetesConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the job: its manifest is one of the plan's files."""
        c = self.config
        if not c.image:
            raise DriverError(
                "driver.image was not set; a pod needs a container image. "
                "Set driver.image=REGISTRY/NAME:TAG to one that has everyrank and your app."
            )
        for key, value in (("namespace", c.namespace), ("volume_claim", c.volume_claim), ("secret", c.secret)):
            if value is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", value):
                raise DriverError(
                    f"driver.{key}={value!r} was set, but a name in Kubernetes has small letters, digits, '-' and '.' "
                    f"only. Fix: driver.{key}={_dns_name(value)}, if that is its name."
                )
        if c.nodes > 1 and c.volume_claim is None:
            raise DriverError(
                f"driver.nodes={c.nodes} was set without driver.volume_claim, but the nodes of a run share its folder. "
                "Set driver.volume_claim to a PersistentVolumeClaim that several pods can mount (ReadWriteMany)."
            )
        name = _dns_name(os.path.basename(request.run_dir))
        path = f"{request.run_dir}/{name}.yaml"
        return self.planned(
            request,
            ("kubectl", "apply", "--filename", path),
            c.nproc_per_node,
            summary=(f"processes per node: {c.nproc_per_node}", f"nodes: {c.nodes}", f"image: {c.image}"),
            env=_variables(c, request),
            files={path: manifest(c, request, name)},
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """The manifest is written; say how it is applied."""
        print(f"to start it: {shlex.join(plan.command)}", flush=True)
        return Outcome()


def manifest(config: KubernetesConfig, request: LaunchRequest, name: str) -> str:
    """A ConfigMap with the run's configuration, and the PyTorchJob, as YAML.

    Field names are those of the API ``kubeflow.org/v1``, kind PyTorchJob.
    """
    import yaml

    c = config
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "namespace": c.namespace},
        "data": {"run.yaml": request.config_text},
    }
    replicas = {"Master": _replicas(c, request, name, 1, "0")}
    if c.nodes > 1:
        replicas["Worker"] = _replicas(c, request, name, c.nodes - 1, "$((REPLICA_INDEX + 1))")
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": c.namespace, "labels": {"app.kubernetes.io/managed-by": "everyrank"}},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": c.backoff_limit},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return yaml.safe_dump_all([config_map, job], sort_keys=False)


def _variables(c: KubernetesConfig, request: LaunchRequest) -> dict[str, str]:
    """The pods' variables; the launching process of each pod, which knows its paths, sets what lets ranks report."""
    return rank_variables(replace(request, watch=WatchConfig(enabled=False)), c.threads_per_rank)


def _replicas(c: KubernetesConfig, request: LaunchRequest, name: str, count: int, node_rank: str) -> dict[str, Any]:
    in_pod = LaunchRequest(
        config_file=f"{_CONFIG_FOLDER}/run.yaml",
        config_text=request.config_text,
        run_dir=request.run_dir,
        cwd=request.cwd,
    )
    flags = [f"driver.nproc_per_node={c.nproc_per_node}", f"driver.nnodes={c.nodes}"]
    if c.nodes > 1:  # the operator gives the first pod a service of this name
        flags += [f"driver.master_addr={name}-master-0", f"driver.master_port={c.master_port}"]
    command = "exec " + shlex.join(node_command(c.python, in_pod, *flags, "driver.node_rank=NODE_RANK"))
    limits = {"cpu": c.cpus_per_node, "memory": c.memory_per_node, "nvidia.com/gpu": c.gpus_per_node or None}
    limits = {key: str(value) for key, value in limits.items() if value is not None}
    variables = _variables(c, request)
    volumes: list[dict[str, Any]] = [{"name": "config", "configMap": {"name": f"{name}-config"}}]
    mounts = [{"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True}]
    # NCCL and data loading share memory between processes; the default of a container is 64 MiB.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if c.volume_claim is not None:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": c.volume_claim}})
        mounts.append({"name": "runs", "mountPath": os.path.dirname(request.run_dir)})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name, and for the port's
        "image": c.image,
        "command": ["sh", "-c", command.replace("NODE_RANK", node_rank)],
        "ports": [{"name": "pytorchjob-port", "containerPort": c.master_port}],
        "env": [
            {"name": "REPLICA_INDEX", "valueFrom": {"fieldRef": {"fieldPath": _INDEX_LABEL}}},
            *(_variable(c, key, value) for key, value in sorted(variables.items())),
        ],
        "volumeMounts": mounts,
    }
    if limits:
        container["resources"] = {"requests": dict(limits), "limits": dict(limits)}
    if c.working_dir is not None:
        container["workingDir"] = c.working_dir
    return {
        "replicas": count,
        "restartPolicy": "OnFailure",
        "template": {"spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 120}},
    }


def _variable(c: KubernetesConfig, name: str, value: str) -> dict[str, Any]:
    if not isinstance(value, Secret):
        return {"name": name, "value": value}
    if c.secret is None:
        raise DriverError(
            f"{name} looks secret, and a manifest would show it to everybody who reads it. Fix: kubectl create secret "
            f"generic NAME --from-literal={name}=..., and driver.secret=NAME."
        )
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": c.secret, "key": name}}}


def _dns_name(text: str) -> str:
    """A name that Kubernetes takes: RFC 1123 label, short enough for the names of its pods."""
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:50] or "everyrank"
