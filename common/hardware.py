"""Chooses strategy, precision and threads for the machine at hand, and says why."""

import dataclasses
import functools
import os
import platform
import re
from typing import Any

from common.cli import SharedConfig, UserError
from common.upstream import cure_gradient_leak, cure_symbolic_build

import keras
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Machine:
    """What `choose` needs to know of a machine; a test can describe any.

    `gpus` holds the name of each graphics card and its CUDA compute capability, such as (8, 6).
    """

    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()


def describe_machine() -> Machine:
    """The machine this process runs on. Touches no device that TensorFlow has not been told about yet."""
    gpus = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = re.search(r"model name\s*: (.*)", lines.read())
    except OSError:
        named = None
    return Machine(
        named[1].strip() if named else platform.processor() or platform.machine(),
        # The cores this process may use, which in a container can be fewer than the machine has.
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        tuple((gpu.get("device_name", "GPU"), gpu.get("compute_capability", (0, 0))) for gpu in gpus),
    )


def choose(machine: Machine, config: SharedConfig) -> dict[str, tuple[Any, str]]:
    """Decides strategy, devices, precision and threads: a pure function of its two arguments.

    Returns:
        Each choice with its reason.

    Raises:
        UserError: the flags ask for something that this machine can't do.
    """
    gpus = len(machine.gpus)
    devices = 1 if config.strategy == "none" else config.devices or gpus or 1
    problem = None
    if config.devices > gpus > 0:
        problem = f"--devices {config.devices}: this machine has {gpus} GPU(s); ask for fewer"
    elif config.devices > devices:
        problem = f"--strategy none: uses one device, not --devices {config.devices}; leave one flag out"
    elif config.strategy == "mirrored" and devices == 1:
        problem = "--strategy mirrored: there is only one device; add --devices 2 to split the CPU, or leave it out"
    elif config.batch_size < devices:
        problem = f"--batch-size {config.batch_size}: {devices} devices need at least {devices} examples; add some"
    elif config.precision == "mixed_float16" and not gpus:
        problem = "--precision mixed_float16: a CPU computes it many times slower; use float32 or mixed_bfloat16"
    if problem:
        raise UserError(problem)
    if config.precision != "auto":
        precision = config.precision, "by --precision"
    elif not gpus:
        precision = "float32", "the safe choice on a CPU"
    elif all(capability >= (8, 0) for _, capability in machine.gpus):
        precision = "mixed_bfloat16", "Ampere or newer"
    else:
        precision = "mixed_float16", "GPU older than Ampere"
    return {
        "strategy": ("mirrored", "several devices") if devices > 1 else ("none", "one device"),
        "devices": (devices, "by --devices" if config.devices else "GPUs" if gpus else "the CPU"),
        "precision": precision,
        "threads": (config.threads, "by --threads") if config.threads else (machine.cores, "one per core"),
    }


def apply(choices: dict[str, tuple[Any, str]], config: SharedConfig) -> tf.distribute.Strategy:
    """Sets TensorFlow and Keras up as chosen; before TensorFlow has touched a device, where that matters.

    In plain Keras: `tf.config.experimental.set_memory_growth`, `keras.config.set_dtype_policy` and
    `tf.distribute.MirroredStrategy()`.

    Raises:
        UserError: TensorFlow runs already, with fewer logical CPU devices or other threads.
    """
    gpus, (cpu, *_) = (tf.config.list_physical_devices(kind) for kind in ("GPU", "CPU"))
    devices, threading = choices["devices"][0], tf.config.threading
    try:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        # Without --threads, nothing to set: TensorFlow's own default is one per core too.
        if config.threads not in (0, threading.get_intra_op_parallelism_threads()):
            threading.set_intra_op_parallelism_threads(config.threads)
            threading.set_inter_op_parallelism_threads(config.threads)
        if not gpus and len(tf.config.get_logical_device_configuration(cpu) or [None]) < devices:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    except RuntimeError as error:
        raise UserError(
            "hardware flags: TensorFlow runs already in this process with other settings; "
            "start a new process to change --threads or --devices"
        ) from error
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(choices["precision"][0])
    cure_gradient_leak()
    if devices == 1:
        return tf.distribute.get_strategy()
    cure_symbolic_build()
    return _mirrored("GPU" if gpus else "CPU", devices)


@functools.cache
def _mirrored(kind: str, devices: int) -> tf.distribute.Strategy:
    # One for the whole process: the collective operations of a second one would take the keys of the first.
    return tf.distribute.MirroredStrategy([f"/{kind}:{index}" for index in range(devices)])
