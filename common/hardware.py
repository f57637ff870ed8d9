"""Chooses strategy, precision and threads for the machine at hand, and says why."""

import dataclasses
import functools
import os
import platform
from typing import Any

from common.cli import SharedConfig, UserError
from common.upstream import cure_symbolic_build

import keras
import tensorflow as tf

_AMPERE = (8, 0)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A graphics card: its name and its CUDA compute capability, such as (8, 6)."""

    name: str
    compute_capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What `choose` needs to know of a machine; a test can describe any."""

    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choices:
    """How a run uses the machine, and the reason of each choice."""

    strategy: str
    devices: int
    precision: str
    threads: int
    reasons: dict[str, str]

    def line(self, machine: Machine) -> str:
        """All choices in one line, for people."""
        gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
        chosen = {
            "strategy": self.strategy,
            "devices": f"{self.devices} {'GPU' if machine.gpus else 'CPU'}",
            "precision": self.precision,
            "threads": self.threads,
        }
        parts = [f"{name} {value} ({self.reasons[name]})" for name, value in chosen.items()]
        return f"hardware: {machine.processor}, {machine.cores} cores, {gpus}: " + ", ".join(parts)


def describe_machine() -> Machine:
    """The machine this process runs on. Touches no device that TensorFlow has not been told about yet."""
    gpus = []
    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        gpus.append(Gpu(details.get("device_name", "GPU"), details.get("compute_capability", (0, 0))))
    return Machine(_processor_name(), _cores(), _memory_bytes(), tuple(gpus))


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _cores() -> int:
    # The cores this process may use, which in a container can be fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose(machine: Machine, config: SharedConfig) -> Choices:
    """Decides strategy, devices, precision and threads: a pure function of its two arguments.

    Raises:
        UserError: the flags ask for something that this machine can't do.
    """
    reasons = {}
    if machine.gpus:
        if config.devices > len(machine.gpus):
            raise UserError(
                f"--devices {config.devices}: this machine has {len(machine.gpus)} GPU(s); ask for fewer"
            )
        devices = config.devices or len(machine.gpus)
        reasons["devices"] = "--devices" if config.devices else "all GPUs"
    else:
        devices = config.devices or 1
        reasons["devices"] = "the CPU split by --devices" if config.devices else "no GPU"

    if config.strategy == "none":
        if config.devices > 1:
            raise UserError(
                f"--strategy none: uses one device, not --devices {config.devices}; leave one flag out"
            )
        devices, reasons["devices"] = 1, "--strategy none"
    if config.strategy == "mirrored" and devices == 1:
        raise UserError(
            "--strategy mirrored: there is only one device; add --devices 2 to split the CPU, "
            "or leave the flag out"
        )
    if config.strategy == "auto":
        strategy = "mirrored" if devices > 1 else "none"
        reasons["strategy"] = "several devices" if devices > 1 else "one device"
    else:
        strategy = config.strategy
        reasons["strategy"] = "--strategy"
    if config.batch_size < devices and strategy == "mirrored":
        raise UserError(
            f"--batch-size {config.batch_size}: {devices} devices need at least one example each; "
            f"use --batch-size {devices} or more"
        )

    precision, reasons["precision"] = _choose_precision(machine, config)
    threads = config.threads or machine.cores
    reasons["threads"] = "--threads" if config.threads else "one per core"
    return Choices(strategy, devices, precision, threads, reasons)


def _choose_precision(machine: Machine, config: SharedConfig) -> tuple[str, str]:
    if config.precision == "mixed_float16" and not machine.gpus:
        raise UserError(
            "--precision mixed_float16: a CPU computes float16 many times slower than float32; "
            "use float32 or mixed_bfloat16"
        )
    if config.precision != "auto":
        return config.precision, "--precision"
    if not machine.gpus:
        return "float32", "the safe choice on a CPU"
    if all(gpu.compute_capability >= _AMPERE for gpu in machine.gpus):
        return "mixed_bfloat16", "Ampere or newer"
    return "mixed_float16", "GPU older than Ampere"


def apply(choices: Choices, deterministic: bool) -> tf.distribute.Strategy:
    """Sets TensorFlow and Keras up as chosen; before TensorFlow has touched a device, where that matters.

    In plain Keras: `tf.config.experimental.set_memory_growth`, `keras.config.set_dtype_policy` and
    `tf.distribute.MirroredStrategy()`.

    Raises:
        UserError: TensorFlow runs already, with fewer logical CPU devices or other threads.
    """
    gpus = tf.config.list_physical_devices("GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        # Without --threads, nothing to set: TensorFlow's own default is one per core too.
        if choices.reasons["threads"] == "--threads":
            _set_threads(choices.threads)
        configured = tf.config.get_logical_device_configuration(cpu) or [None]
        if not gpus and len(configured) < choices.devices:
            devices = [tf.config.LogicalDeviceConfiguration()] * choices.devices
            tf.config.set_logical_device_configuration(cpu, devices)
    except RuntimeError as error:
        raise UserError(
            "hardware flags: TensorFlow runs already in this process with other settings; "
            "start a new process to change --threads or --devices"
        ) from error
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(choices.precision)
    if choices.strategy == "none":
        return tf.distribute.get_strategy()
    cure_symbolic_build()
    return _mirrored("GPU" if gpus else "CPU", choices.devices)


def _set_threads(threads: int) -> None:
    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


@functools.cache
def _mirrored(kind: str, devices: int) -> tf.distribute.Strategy:
    # One for the whole process: the collective operations of a second one would take the keys of the first.
    return tf.distribute.MirroredStrategy([f"/{kind}:{index}" for index in range(devices)])


def hardware_record(machine: Machine, choices: Choices) -> dict[str, Any]:
    """What `result.json` says of the hardware."""
    record = dataclasses.asdict(machine)
    record["gpus"] = [gpu.name for gpu in machine.gpus]
    for name in ("strategy", "devices", "precision", "threads"):
        record[name] = getattr(choices, name)
    return record
