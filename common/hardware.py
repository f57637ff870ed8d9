"""Chooses strategy, precision and threads for a machine, with reasons."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import platform
import re
import signal
import socket
import time
from typing import Any

from common.cli import STOPPING, SharedConfig, UserError
from common.console import print_line
from common.multiworker import SILENCE, Cluster
from common.upstream import apply_patch

import keras
import psutil
import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob
from tensorflow.python.eager import context


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware that `choose` decides by. Tests can describe any machine.

    `gpus` holds name and CUDA compute capability, such as (8, 6), of each GPU; `tpus` is the number of TPU cores;
    `bfloat16` is False if the CPU is known to have no bfloat16 instructions.
    """

    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()
    tpus: int = 0
    bfloat16: bool = True


def describe_machine() -> Machine:
    """Describes the machine that this process runs on, without initializing its devices."""
    gpus = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
    file = pathlib.Path("/proc/cpuinfo")
    details = file.read_text("utf-8") if file.exists() else ""
    model_name = re.search(r"model name\s*: (.*)", details)
    return Machine(
        model_name[1].strip() if model_name else platform.processor() or platform.machine(),
        # The cores that this process may use; a container can have fewer than the machine.
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        tuple((gpu.get("device_name", "GPU"), gpu.get("compute_capability", (0, 0))) for gpu in gpus),
        len(tf.config.list_physical_devices("TPU")),
        not details or bool(re.search(r"(avx512_|amx_|\b)bf16\b", details)),
    )


def free_memory(groups: str = "/sys/fs/cgroup") -> int:
    """Returns the bytes of memory that this process may still use. A container can have less than the machine.

    `groups` is the folder of its control group.
    """
    free = psutil.virtual_memory().available
    for folder, limit, usage in (
        (groups, "memory.max", "memory.current"),
        (f"{groups}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # No such group, or no limit: "max".
            files = {name: pathlib.Path(folder, name).read_text() for name in (limit, usage, "memory.stat")}
            # The system gives up cached files when a process needs memory.
            cached = re.search(r"^inactive_file (\d+)", files["memory.stat"], re.M)
            free = min(free, int(files[limit]) - int(files[usage]) + int(cached[1] if cached else 0))
    return max(free, 0)


def choose(machine: Machine, config: SharedConfig, workers: int = 0) -> dict[str, tuple[Any, str]]:
    """Chooses strategy, devices, precision and threads, each with a reason. A pure function.

    `workers` is the number of workers in the cluster; 0 if there is none. Raises a `UserError` for a flag that this
    machine does not support.
    """
    gpus, strategy, reason = len(machine.gpus), config.strategy, "by --strategy"
    local = 1 if strategy == "none" else config.devices or gpus or 1
    if strategy == "auto" and workers > 1:
        strategy, reason = "multi-worker", f"a cluster of {workers}"
    elif strategy == "auto" and machine.tpus:
        strategy, reason = "tpu", "TPU found"
    elif strategy == "auto":
        strategy, reason = ("mirrored", "several devices") if local > 1 else ("none", "one device")
    devices = {"multi-worker": workers * local, "tpu": machine.tpus}.get(strategy, local)
    problem = None
    if strategy == "multi-worker" and not workers:
        problem = "--strategy multi-worker: neither TF_CONFIG nor Slurm names workers; set TF_CONFIG for each worker"
    elif strategy == "tpu" and not machine.tpus:
        problem = "--strategy tpu: TensorFlow finds no TPU; install the packages for it, or leave it out"
    elif config.devices > 1 and (strategy == "tpu" or (strategy == "multi-worker" and not gpus)):
        problem = f"--devices {config.devices}: not supported with --strategy {strategy}; leave it out"
    elif config.devices > gpus > 0:
        problem = f"--devices {config.devices}: this machine has {gpus} GPU(s); ask for fewer"
    elif config.devices > local:
        problem = f"--strategy none: uses one device, not --devices {config.devices}; leave one flag out"
    elif config.batch_size % devices:
        nearest = max(1, round(config.batch_size / devices)) * devices
        problem = f"--batch-size {config.batch_size}: not a multiple of the {devices} devices; give {nearest}"
    elif config.precision == "mixed_float16" and devices > 1:
        # Keras 3.15 checks only the first replica for overflow; that of another replica would reach the weights.
        problem = "--precision mixed_float16: not on several devices; use float32, mixed_bfloat16, or --devices 1"
    elif config.precision == "mixed_float16" and not gpus:
        problem = "--precision mixed_float16: a CPU computes it many times slower; use float32 or mixed_bfloat16"
    if problem:
        raise UserError(problem)
    if config.precision == "mixed_bfloat16" and not (gpus or machine.tpus or machine.bfloat16):
        precision = "mixed_bfloat16", "by --precision; SLOW: float32 is quicker on a processor without bfloat16"
    elif config.precision != "auto":
        precision = config.precision, "by --precision"
    elif strategy == "tpu":
        precision = "mixed_bfloat16", "TPU"
    elif not gpus:
        precision = "float32", "the safe choice on a CPU"
    elif all(capability >= (8, 0) for _, capability in machine.gpus):
        precision = "mixed_bfloat16", "Ampere or newer"
    elif devices > 1:
        precision = "float32", "several GPUs, one older than Ampere"
    else:
        precision = "mixed_float16", "GPU older than Ampere"
    kind = "TPU cores" if strategy == "tpu" else "GPUs" if gpus else "the CPU"
    kind += " of each worker" if strategy == "multi-worker" else ""
    return {
        "strategy": (strategy, reason),
        "devices": (devices, "by --devices" if config.devices else kind),
        "precision": precision,
        "threads": (config.threads, "by --threads") if config.threads else (machine.cores, "one per core"),
    }


def apply(
    choices: dict[str, tuple[Any, str]], config: SharedConfig, cluster: Cluster | None = None
) -> tf.distribute.Strategy:
    """Configures TensorFlow and Keras according to `choices`, from `choose`. Waits for all workers, if there are any.

    In plain Keras: `keras.config.set_dtype_policy` and `tf.distribute.MirroredStrategy()`. Raises a `UserError` if a
    worker is missing, or if TensorFlow is initialized already with fewer logical CPU devices or other threads.
    """
    cluster = cluster or Cluster()
    gpus, (cpu, *_) = tf.config.get_visible_devices("GPU"), tf.config.list_physical_devices("CPU")
    (strategy, _), (devices, _), threading = choices["strategy"], choices["devices"], tf.config.threading
    try:
        # Without --threads, there is nothing to set: TensorFlow's default is one thread per core too.
        if config.threads not in (0, threading.get_intra_op_parallelism_threads()):
            threading.set_intra_op_parallelism_threads(config.threads)
            threading.set_inter_op_parallelism_threads(config.threads)
        if strategy == "multi-worker" and 0 < config.devices < len(gpus):
            tf.config.set_visible_devices(gpus[: config.devices], "GPU")
        logical = len(tf.config.get_logical_device_configuration(cpu) or [None])
        if strategy == "mirrored" and not gpus and logical < devices:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    except RuntimeError as error:
        problem = "TensorFlow runs already in this process with other --threads or --devices"
        raise UserError(f"hardware flags: {problem}; start a new process") from error
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
        tf.config.experimental.enable_tensor_float_32_execution(False)
    # The user's Keras configuration may have others.
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_dtype_policy(choices["precision"][0])
    apply_patch("symbolic build", required=devices > 1)
    if strategy == "none":
        return tf.distribute.get_strategy()
    if strategy == "multi-worker":
        apply_patch("logs of several workers", required=True)
        if not config.quiet:
            warning = "TensorFlow opens this port to all networks, and whoever reaches it can run code here"
            waiting = f"{cluster.name(cluster.index)} waits up to {config.cluster_timeout} s for the others"
            print_line(f"cluster: {waiting}. {warning}: keep it behind a firewall")
        return _multi_worker(cluster, bool(gpus), config.cluster_timeout)
    return _tpu() if strategy == "tpu" else _mirrored("GPU" if gpus else "CPU", devices)


@functools.cache
def _mirrored(kind: str, devices: int) -> tf.distribute.Strategy:
    # Cached, because the collectives of a second strategy in a process would reuse the keys of the first.
    return tf.distribute.MirroredStrategy([f"/{kind}:{index}" for index in range(devices)])


def _multi_worker(cluster: Cluster, gpus: bool, timeout: float) -> tf.distribute.Strategy:
    """Waits for all workers and returns the strategy; one per process."""
    if cluster.strategy:
        return cluster.strategy
    deadline, (host, port) = time.monotonic() + timeout, cluster.workers[0].rsplit(":", 1)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    distribute, leader = tf.distribute.experimental, "/job:worker/replica:0/task:0"
    try:
        connected = cluster.chief
        while not connected:  # Unlike TensorFlow, this loop handles signals and retries name resolution.
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), timeout=2).close()
                connected = True
            if time.monotonic() > deadline:
                raise tf.errors.DeadlineExceededError(None, None, leader)
        context.context().configure_coordination_service(
            "standalone",
            leader,
            coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=len(cluster.workers))],
            cluster_register_timeout_in_ms=int(1000 * max(1, deadline - time.monotonic())),
            heartbeat_timeout_in_ms=1000 * SILENCE,
        )
        # Otherwise the chief waits for an hour and ignores the timeout.
        context.context().coordination_service.cluster_register_with_barrier = True
        # While TensorFlow waits, it holds the GIL, so no Python handler runs. It replaces the SIGTERM handler itself.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        strategy = tf.distribute.MultiWorkerMirroredStrategy(
            tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec({"worker": cluster.workers}), task_type="worker", task_id=cluster.index
            ),
            distribute.CommunicationOptions(
                implementation=distribute.CommunicationImplementation["NCCL" if gpus else "RING"]
            ),
        )
    except tf.errors.DeadlineExceededError as error:
        missing = sorted({int(task) for task in re.findall(r"^/job:worker/replica:0/task:(\d+)$", str(error), re.M)})
        names = ", ".join(map(cluster.name, missing or [0]))
        raise UserError(f"{names}: did not come within {timeout:.0f} s; start all workers") from error
    except (RuntimeError, tf.errors.OpError) as error:  # Such as a port in use, or a duplicate index.
        raise UserError(f"{cluster.name(cluster.index)}: TensorFlow can't join the cluster ({error})") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    cluster.join(strategy)
    return strategy


@functools.cache
def _tpu() -> tf.distribute.Strategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
