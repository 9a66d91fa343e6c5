"""Processes started by ``mpirun`` or ``mpiexec``: Open MPI, and the PMI family (MPICH, Intel MPI, MVAPICH)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from everyrank.launch_env.process_environment import ProcessEnvironment, read_int, require_int
from everyrank.launch_env.rendezvous_port import derive_port


def detect_openmpi(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    """Return the place of a process that Open MPI's ``mpirun`` started, or None."""
    key = "OMPI_COMM_WORLD_RANK"
    if key not in environ:
        return None
    rank = require_int(environ, key, key)
    world_size = require_int(environ, "OMPI_COMM_WORLD_SIZE", key)
    local_rank = require_int(environ, "OMPI_COMM_WORLD_LOCAL_RANK", key)
    local_size = require_int(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", key)
    num_nodes = read_int(environ, "OMPI_MCA_orte_num_nodes") or -(-world_size // max(local_size, 1))
    if local_size >= world_size:
        num_nodes = 1
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or environ.get("PMIX_SERVER_URI", "")
    # OMPI_COMM_WORLD_NODE_RANK is this process's rank on its node over all jobs, not the number of the node.
    by_slot = rank % max(local_size, 1) == local_rank
    return ProcessEnvironment(
        launcher="openmpi",
        detected_by=key,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_size,
        node_rank=0 if num_nodes == 1 else (rank // local_size if by_slot else rank % num_nodes),
        num_nodes=num_nodes,
        master_addr=environ.get("MASTER_ADDR") or ("127.0.0.1" if num_nodes == 1 else _launching_host(environ)),
        master_port=read_int(environ, "MASTER_PORT") or derive_port("openmpi", job),
        run_id=job,
    )


def detect_pmi(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    """Return the place of a process that Hydra's ``mpiexec`` (MPICH, Intel MPI, MVAPICH) started, or None."""
    key = "PMI_RANK"
    if key not in environ:
        return None
    rank = require_int(environ, key, key)
    world_size = require_int(environ, "PMI_SIZE", key)
    local_rank = read_int(environ, "MPI_LOCALRANKID")
    local_size = read_int(environ, "MPI_LOCALNRANKS")
    if local_rank is None or local_size is None:  # MVAPICH names them differently; plain PMI does not say
        local_rank = read_int(environ, "MV2_COMM_WORLD_LOCAL_RANK", rank if local_rank is None else local_rank)
        local_size = read_int(environ, "MV2_COMM_WORLD_LOCAL_SIZE", world_size if local_size is None else local_size)
    assert local_rank is not None
    assert local_size is not None
    num_nodes = -(-world_size // max(local_size, 1))
    job = environ.get("PMI_ID") or environ.get("PMI_JOBID") or environ.get("HYDI_CONTROL_FD", "")
    job = environ.get("PMI_PORT") or job  # HOST:PORT of mpiexec's own server: one for each job
    return ProcessEnvironment(
        launcher="pmi",
        detected_by=key,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_size,
        node_rank=rank // max(local_size, 1),
        num_nodes=num_nodes,
        master_addr=environ.get("MASTER_ADDR") or ("127.0.0.1" if num_nodes == 1 else _pmi_host(environ)),
        master_port=read_int(environ, "MASTER_PORT") or derive_port("pmi", job),
        run_id=job,
    )


def _launching_host(environ: Mapping[str, str]) -> str | None:
    """Return the address of the host that runs ``mpirun``, from the URI Open MPI gives its processes."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri") or environ.get("PMIX_SERVER_URI2") or environ.get("PMIX_SERVER_URI", "")
    found = re.search(r"tcp[46]?://\[?([^,;:\]]+)", uri)
    return found.group(1) if found else None


def _pmi_host(environ: Mapping[str, str]) -> str | None:
    host, _, port = environ.get("PMI_PORT", "").rpartition(":")
    return host if port.isdigit() and host else None
