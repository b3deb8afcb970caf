"""Finds out how the processes of a run were started: by hand, by a launcher, or on a TPU pod."""

from collections.abc import Mapping
import dataclasses
import re
import urllib.request

# Launchers that tell each process its rank. Each has the variables of the number of processes, the
# rank, and both on the host of the process.
_LAUNCHERS = {
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    "MVAPICH": (
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    "jsrun": (
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
    ),
}
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started, as one of several processes of a run.

    Attributes:
      by: what started it: "flags", "slurm", "ompi", "tpu", or "ranks" for another launcher.
      num_processes: number of processes of the run; None if JAX asks the TPU for it.
      process_id: number of this process, from 0; None if JAX asks the TPU for it.
      coordinator: HOST:PORT of process 0; None if JAX finds it through the launcher in `by`.
      owns_devices: whether this process uses all devices that it sees. False: it uses only the
        device that JAX assigns by the number of the process on its host, or `local_device`.
      local_device: number of the device on its host that this process uses; None if JAX assigns
        the devices.
    """

    by: str
    num_processes: int | None = None
    process_id: int | None = None
    coordinator: str | None = None
    owns_devices: bool = True
    local_device: int | None = None


def detect(
    env: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Finds out how this process was started; returns None if it is the only one of its run.

    Args:
      env: the environment variables.
      coordinator: HOST:PORT of process 0. With a launcher it may be given without the other two.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.

    Raises:
      ValueError: if an argument is missing or not valid, or if a launcher started several
        processes and does not tell where process 0 is.
    """
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
    if num_processes is not None or process_id is not None:
        return _by_hand(coordinator, num_processes, process_id)
    launch = _open_mpi(env, coordinator) or _slurm(env, coordinator) or _by_ranks(env, coordinator)
    if launch is None and coordinator is not None:
        return _by_hand(coordinator, num_processes, process_id)
    return launch or (Launch("tpu") if _is_tpu_pod(env) else None)


def _by_hand(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch | None:
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if num_processes is None or process_id is None or coordinator is None:
        missing = [name for name, value in given.items() if value is None]
        have = [name for name in given if name not in missing]
        raise ValueError(f"{' and '.join(have)}: expected together with {' and '.join(missing)}")
    if num_processes < 1:
        raise ValueError(f"--num_processes: expected at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id: expected 0 to {num_processes - 1}, got {process_id}")
    return Launch("flags", num_processes, process_id, coordinator) if num_processes > 1 else None


def _open_mpi(env: Mapping[str, str], coordinator: str | None) -> Launch | None:
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) < 2:
        return None
    if coordinator is None and "OMPI_MCA_orte_hnp_uri" not in env:
        raise ValueError(
            "--coordinator: expected HOST:PORT, the host of rank 0 and a free port there; only "
            "Open MPI up to version 4 tells them by itself"
        )
    return Launch(
        "ompi",
        int(env["OMPI_COMM_WORLD_SIZE"]),
        int(env["OMPI_COMM_WORLD_RANK"]),
        coordinator,
        owns_devices=env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or _has_one_gpu(env),
    )


def _slurm(env: Mapping[str, str], coordinator: str | None) -> Launch | None:
    # Read the variables of the step, not those of the job: a script that srun has not started sees
    # the job's too.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return None
    alone_on_host = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_STEP_NUM_TASKS"]
    return Launch(
        "slurm",
        int(env["SLURM_STEP_NUM_TASKS"]),
        int(env["SLURM_PROCID"]),
        coordinator,
        owns_devices=alone_on_host or _has_one_gpu(env),
    )


def _by_ranks(env: Mapping[str, str], coordinator: str | None) -> Launch | None:
    for name, (size, rank, local_size, local_rank) in _LAUNCHERS.items():
        if rank not in env or int(env.get(size, 1)) < 2:
            continue
        if coordinator is None and {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
            # torchrun itself listens at MASTER_PORT.
            port = int(env["MASTER_PORT"]) + ("TORCHELASTIC_RUN_ID" in env)
            coordinator = f"{env['MASTER_ADDR']}:{port}"
        if coordinator is None:
            raise ValueError(
                f"--coordinator: expected HOST:PORT, the host of rank 0 and a free port there: "
                f"{name} started {env[size]} processes ({size}) and does not tell them. For runs "
                f"that are not connected, unset {size}"
            )
        owns = env.get(local_size, "1") == "1" or local_rank not in env or _has_one_gpu(env)
        return Launch(
            "ranks",
            int(env[size]),
            int(env[rank]),
            coordinator,
            owns_devices=owns,
            local_device=None if owns else int(env[local_rank]),
        )
    return None


def _has_one_gpu(env: Mapping[str, str]) -> bool:
    """Whether the launcher gave this process a GPU of its own, as srun --gpus-per-task=1 does."""
    return bool(env.get("CUDA_VISIBLE_DEVICES")) and "," not in env["CUDA_VISIBLE_DEVICES"]


def _is_tpu_pod(env: Mapping[str, str]) -> bool:
    """Whether this machine is one of several hosts of a Cloud TPU."""
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return False
    slices = env.get("MEGASCALE_NUM_SLICES")
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")  # GKE, notebooks
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env:  # JAX sets the latter without a TPU
        hosts = _metadata(env, "worker-network-endpoints")
        found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata(env, "tpu-env"))
        slices = found.group(1) if found else slices
    return "," in (hosts or "") or int(slices or 1) > 1


def _metadata(env: Mapping[str, str], attribute: str) -> str:
    """Asks Google Cloud for an attribute of this virtual machine; empty if there is no answer."""
    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        _METADATA.format(host, attribute), headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without a proxy
    try:
        with opener.open(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""
