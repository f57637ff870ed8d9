"""Which workers a training has: read from TF_CONFIG or from the variables of a Slurm step."""

import json
import re
from collections.abc import Mapping

from common.cli import UserError

import tensorflow as tf


def described_cluster(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The addresses of all workers as "host:port", the chief's first, and the index of this process among them.

    `TF_CONFIG` describes a cluster, as the training operators of Kubernetes set it; otherwise a Slurm step with several
    tasks is one. Without either, there are no addresses. A `UserError` says what is malformed.
    """
    source, remedy = "TF_CONFIG", 'give {"cluster": {"worker": ["host:port"]}, "task": {"type": "worker", "index": 0}}'
    try:
        if environment.get("TF_CONFIG", "").strip():
            addresses, index = _from_tf_config(environment["TF_CONFIG"])
        elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            source, remedy = "Slurm", "start with srun, or give --strategy none"
            addresses, index = _from_slurm(environment)
        else:
            return (), 0
        for address in addresses:
            if not re.fullmatch(r"[A-Za-z0-9._-]+:[1-9][0-9]{0,4}", str(address)) or addresses.count(address) > 1:
                raise ValueError(f"{address!r} is no host:port, or given twice")
        return tuple(addresses), index
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{source}: can't be used ({type(error).__name__}: {problem}); {remedy}") from error


def _from_tf_config(text: str) -> tuple[list[str], int]:
    jobs, task = map(json.loads(text).__getitem__, ("cluster", "task"))
    if "ps" in jobs or task["type"] in ("ps", "evaluator"):
        raise UserError("TF_CONFIG: names parameter servers or an evaluator; Keras 3 trains with workers alone")
    workers = {(job, index): each for job in ("chief", "worker") for index, each in enumerate(jobs.get(job, []))}
    return list(workers.values()), list(workers).index((task["type"], int(task["index"])))


def _from_slurm(environment: Mapping[str, str]) -> tuple[list[str], int]:
    # Two jobs on one node take different ports. Slurm itself assigns the GPUs.
    first_port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=first_port, gpus_per_node=10_000, gpus_per_task=1, auto_set_gpu=False
    )
    addresses = resolver.cluster_spec().job_tasks("worker")
    # The resolver sorts the nodes by name, which need not be Slurm's order: each task looks for its own node.
    own = f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}"
    return addresses, addresses.index(own)
