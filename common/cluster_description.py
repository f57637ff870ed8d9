"""Which workers a training has, as its surroundings describe them: TF_CONFIG, or a step of Slurm."""

import json
import re
from collections.abc import Mapping

from common.cli import UserError

import tensorflow as tf

# A host name is made of labels, each of which the domain name system allows 63 letters.
_ADDRESS = re.compile(r"(?=.{1,253}:)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?:[1-9][0-9]{0,4}")


def described_cluster(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The addresses of all workers, the chief's first, and which of them is this process's.

    Args:
        environment: the variables of the process. `TF_CONFIG` describes a cluster, as training operators of
            Kubernetes set it; else a step of Slurm with several tasks is one.

    Returns:
        Addresses as "host:port" and an index; no addresses where nothing describes a cluster.

    Raises:
        UserError: the description contradicts itself, or asks for what Keras 3 can't do.
    """
    if environment.get("TF_CONFIG", "").strip():
        return _from_tf_config(environment["TF_CONFIG"])
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(environment)
    return (), 0


def _from_tf_config(text: str) -> tuple[tuple[str, ...], int]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"TF_CONFIG: no JSON ({error}); give a cluster and a task") from error

    def part(name: str) -> dict:
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise UserError(f'TF_CONFIG: no object "{name}"; give {{"cluster": {{…}}, "task": {{…}}}}')
        return found

    jobs, task = part("cluster"), part("task")
    if "ps" in jobs or task.get("type") == "ps":
        raise UserError("TF_CONFIG: names parameter servers, which Keras 3 does not support; leave them out")
    if task.get("type") == "evaluator":
        raise UserError("TF_CONFIG: names an evaluator, but the workers themselves evaluate; leave it out")
    for job in set(jobs) - {"chief", "worker", "evaluator"}:
        raise UserError(f"TF_CONFIG: cluster has a job {job!r}; only chief and worker are possible")
    for job in ("chief", "worker"):
        if not isinstance(jobs.get(job, []), list):
            raise UserError(f"TF_CONFIG: {job} in cluster is no list; give addresses as host:port")
    chiefs, workers = jobs.get("chief", []), jobs.get("worker", [])
    if len(chiefs) > 1:
        raise UserError(f"TF_CONFIG: has {len(chiefs)} chiefs; leave one, the others are workers")
    if not chiefs + workers:
        raise UserError("TF_CONFIG: cluster names no worker; give addresses as host:port")
    kind, index = task.get("type"), task.get("index")
    if kind not in ("chief", "worker"):
        raise UserError(f"TF_CONFIG: task has the type {kind!r}; give chief or worker")
    if isinstance(index, str) and re.fullmatch(r"[0-9]{1,9}", index):
        index = int(index)
    if type(index) is not int or not 0 <= index < len(jobs.get(kind, [])):
        raise UserError(f"TF_CONFIG: task has the index {index!r}, but cluster has {len(jobs.get(kind, []))} {kind}(s)")
    return _checked("TF_CONFIG", chiefs + workers), index + (len(chiefs) if kind == "worker" else 0)


def _from_slurm(environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(f"Slurm: {', '.join(missing)} not set; start with srun, or give --strategy none")
    try:
        # Two jobs on one node take different ports. And not the resolver but Slurm itself hands out the GPUs:
        # the resolver would take those of other jobs.
        first_port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 10_000
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=first_port, gpus_per_node=10_000, gpus_per_task=1, auto_set_gpu=False
        )
        addresses = resolver.cluster_spec().job_tasks("worker")
        # The resolver sorts the nodes by name, Slurm's numbers need not: so each task looks for its own node.
        own = f"{environment['SLURMD_NODENAME']}:{first_port + int(environment['SLURM_LOCALID'])}"
    except (RuntimeError, ValueError, LookupError) as error:
        problem = " ".join(str(error).split())
        raise UserError(
            f"Slurm: can't read its variables ({problem}); start with srun, or give --strategy none"
        ) from error
    if own not in addresses:
        raise UserError(f"Slurm: this task is {own}, but the step has {', '.join(addresses)}; start with srun")
    return _checked("Slurm", addresses), addresses.index(own)


def _checked(origin: str, addresses: list) -> tuple[str, ...]:
    for address in addresses:
        known = isinstance(address, str) and _ADDRESS.fullmatch(address)
        if not known or host_and_port(address)[1] > 65535:
            raise UserError(f"{origin}: {address!r} is no address; give host:port, with a port from 1 to 65535")
        if addresses.count(address) > 1:
            raise UserError(f"{origin}: two workers have the address {address}; give each its own")
    return tuple(addresses)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of "host:port"."""
    host, _, port = address.rpartition(":")
    return host, int(port)
