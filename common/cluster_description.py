"""Which workers a training has: read from TF_CONFIG or from the variables of a Slurm step."""

import json
import re
from collections.abc import Mapping

from common.cli import UserError

import tensorflow as tf


def described_cluster(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The addresses of all workers, the chief's first, and the index of this process among them.

    Args:
        environment: the variables of the process. `TF_CONFIG` describes a cluster, as the training operators of
            Kubernetes set it; otherwise a Slurm step with several tasks is one.

    Returns:
        Addresses as "host:port" and an index; no addresses if nothing describes a cluster.

    Raises:
        UserError: the description is malformed, or asks for what Keras 3 can't do.
    """
    if environment.get("TF_CONFIG", "").strip():
        source, (addresses, index) = "TF_CONFIG", _from_tf_config(environment["TF_CONFIG"])
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        source, (addresses, index) = "Slurm", _from_slurm(environment)
    else:
        return (), 0
    for address in addresses:
        if not re.fullmatch(r"[A-Za-z0-9._-]+:[1-9][0-9]{0,4}", str(address)):
            raise UserError(f"{source}: {address!r} is no address; give host:port, with a port from 1 to 65535")
        if addresses.count(address) > 1:
            raise UserError(f"{source}: two workers have the address {address}; give each its own")
    return tuple(addresses), index


def _from_tf_config(text: str) -> tuple[list[str], int]:
    try:
        content = json.loads(text)
        jobs, task = content["cluster"], (content["task"]["type"], int(content["task"]["index"]))
        if "ps" in jobs or task[0] in ("ps", "evaluator"):
            raise UserError("TF_CONFIG: names parameter servers or an evaluator; Keras 3 trains with workers alone")
        addresses = {
            (job, index): address for job in ("chief", "worker") for index, address in enumerate(jobs.get(job, []))
        }
        if task not in addresses:
            raise UserError(f"TF_CONFIG: task is {task[0]} {task[1]}, which cluster does not list")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        form = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        raise UserError(f"TF_CONFIG: can't be read ({error!r}); give {form}") from error
    return list(addresses.values()), list(addresses).index(task)


def _from_slurm(environment: Mapping[str, str]) -> tuple[list[str], int]:
    try:
        # Two jobs on one node take different ports. Slurm itself assigns the GPUs: the resolver would take those of
        # other jobs.
        first_port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=first_port, gpus_per_node=10_000, gpus_per_task=1, auto_set_gpu=False
        )
        addresses = resolver.cluster_spec().job_tasks("worker")
        # The resolver sorts the nodes by name, which need not be Slurm's order: each task looks for its own node.
        own = f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}"
        return addresses, addresses.index(own)
    except (RuntimeError, ValueError, LookupError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"Slurm: can't read its variables ({problem}); start with srun, or --strategy none") from error
