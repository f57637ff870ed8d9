"""Checks this machine for what prevents training; prints a remedy for each.

    python scripts/doctor.py

The exit code is 0 if there is no problem, otherwise 2. A dataset that is not
available is reported, but is not a problem: the recipes then train on their
samples.
"""

import argparse
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
GIB = 1 << 30
# Releases that can be installed and imported but have a known defect, with the reason.
KNOWN_BAD = {
    ("keras", "3.15.0"): "lacks a security fix of 3.15.1",
    ("protobuf", "3."): "TensorFlow 2.21 needs protobuf 5 or newer",
}


class Finding(NamedTuple):
    """The result of one check. `remedy` says how to fix a problem, and is optional."""

    subject: str
    message: str
    remedy: str = ""
    trouble: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; the only flag is --help\n")
    parser.parse_args()
    findings = [check_python(sys.version_info[:2])]
    if not findings[0].trouble:
        import tomllib  # New in Python 3.11.

        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        findings += check_packages(project["dependencies"], installed_versions())
    if any(finding.trouble for finding in findings):
        findings.append(Finding("machine", "not checked until Python and the packages are in order"))
    else:
        findings += look_at_machine()
    for finding in findings:
        print(f"{'TROUBLE' if finding.trouble else 'ok     '} {finding.subject}: {finding.message}")
        if finding.remedy:
            print(f"        {'remedy' if finding.trouble else 'advice'}: {finding.remedy}")
    sys.exit(2 if any(finding.trouble for finding in findings) else 0)


def look_at_machine() -> Iterable[Finding]:
    """Yields the findings that need TensorFlow, which may not be installed yet."""
    from common.cli import SharedConfig
    from common.data import CIFAR10, IMDB, MNIST, prepared_version, reachable, tfds_folder
    from common.hardware import describe_machine
    from common.upstream import PATCHES

    machine = describe_machine()
    yield check_gpu(driver_sees_gpus(), [name for name, _ in machine.gpus])
    if not machine.gpus:
        # Small matrices, because emulated bfloat16 is slow. The precisions alternate, because other programs may use
        # the machine at any moment.
        peaks = [[measure_peak(name, 512, 5) for name in ("float32", "mixed_bfloat16")] for _ in range(5)]
        yield check_precision(*map(max, zip(*peaks, strict=True)))
    yield from map(check_patch, PATCHES.items())
    yield check_threads(machine.cores, os.environ)
    yield check_memory(machine.memory_bytes)
    folder = tfds_folder(SharedConfig())
    for path in (pathlib.Path.cwd(), folder):
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        yield check_disk(path, shutil.disk_usage(existing).free, os.access(existing, os.W_OK))
    for dataset in (MNIST, CIFAR10, IMDB):
        prepared = prepared_version(dataset, SharedConfig())
        yield check_data(
            dataset.title, folder / dataset.folder, prepared, prepared is not None or reachable(dataset.probe)
        )


def installed_versions() -> dict[str, str]:
    """Returns the version of every installed package by its normalized name: lowercase, with `-` for `_`."""
    return {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
    }


def check_python(version: tuple[int, int]) -> Finding:
    """Checks that the recipes support this version of Python."""
    message = ".".join(map(str, version))
    if (3, 11) <= version <= (3, 13):
        return Finding("Python", message)
    remedy = "install Python 3.11, 3.12 or 3.13, then: rm -r .venv; PYTHON=/path/to/it scripts/run.sh linear_regression"
    return Finding("Python", f"{message}; the recipes need 3.11 to 3.13", remedy, trouble=True)


def check_packages(requirements: Iterable[str], installed: dict[str, str]) -> Iterable[Finding]:
    """Checks that each required package is installed in a supported version."""
    from packaging.requirements import Requirement

    remedy = f"{sys.executable} -m pip install -r requirements.txt -c constraints.txt"
    for requirement in map(Requirement, requirements):
        version = installed.get(requirement.name.lower().replace("_", "-"))
        if version is None:
            yield Finding(requirement.name, "not installed", remedy, trouble=True)
        elif version not in requirement.specifier:
            yield Finding(requirement.name, f"{version}; tested with {requirement.specifier}", remedy, trouble=True)
        else:
            yield Finding(requirement.name, version)
    for (name, version), reason in KNOWN_BAD.items():
        if installed.get(name, "").startswith(version):
            yield Finding(
                name, f"{installed[name]}: {reason}", f"{sys.executable} -m pip install -U {name}", trouble=True
            )


def driver_sees_gpus() -> bool:
    """Returns True if the NVIDIA driver lists a GPU."""
    try:
        return bool(subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return False


def check_gpu(driver: bool, seen: list[str]) -> Finding:
    """Checks that TensorFlow sees the GPUs that the driver lists."""
    if seen:
        return Finding("GPU", ", ".join(seen))
    if not driver:
        return Finding("GPU", "none; training on the CPU")
    remedy = f"{sys.executable} -m pip install -r requirements-gpu.txt -c constraints.txt"
    return Finding(
        "GPU", "the driver lists one, TensorFlow sees none: its CUDA libraries are missing", remedy, trouble=True
    )


def measure_peak(precision: str, size: int = 2048, tries: int = 10) -> float:
    """Measures floating-point operations per second of a `size` x `size` matrix product: the fastest of `tries`."""
    import keras
    import tensorflow as tf

    durations = []
    matrix = tf.cast(tf.random.normal([size, size]), keras.DTypePolicy(precision).compute_dtype)
    product = tf.function(lambda: tf.reduce_sum(tf.matmul(matrix, matrix)))
    for _ in range(1 + tries):  # The first call traces the graph.
        start = time.perf_counter()
        product().numpy()
        durations.append(time.perf_counter() - start)
    return 2 * size**3 / min(durations[1:])


def check_precision(float32: float, bfloat16: float) -> Finding:
    """Recommends a precision, given operations per second of matrix products in float32 and bfloat16."""
    if bfloat16 > 1.3 * float32:
        message = f"bfloat16 multiplies matrices {bfloat16 / float32:.1f} times as fast as float32"
        return Finding("precision", message, "train the large networks with --precision mixed_bfloat16")
    return Finding("precision", f"float32; bfloat16 multiplies matrices {bfloat16 / float32:.1f} times as fast")


def check_patch(item: tuple[str, Any]) -> Finding:
    """Checks that a patch supports the installed Keras or TensorFlow. Without it, runs print a warning or fail."""
    name, patch = item
    message = f"{patch.package} {importlib.metadata.version(patch.package)}, made for {patch.versions}"
    if patch.fits():
        return Finding(f"patch {name!r}", message)
    remedy = f"{sys.executable} -m pip install '{patch.package}{patch.versions}'"
    return Finding(f"patch {name!r}", f"{message}: {patch.reason}", remedy, trouble=True)


def check_threads(cores: int, environment: Mapping[str, str]) -> Finding:
    """Checks that no environment variable limits TensorFlow to fewer threads than cores."""
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        if environment.get(name, str(cores)).isdigit() and int(environment.get(name, cores)) < cores:
            message = f"{name}={environment[name]} limits TensorFlow to fewer threads than the {cores} cores"
            return Finding("threads", message, f"unset {name}", trouble=True)
    return Finding("threads", f"{cores}, one per core")


def check_memory(total: int) -> Finding:
    """Checks that the largest recipe fits into memory: text_classifier peaks at about 4 GiB."""
    if total >= 5 * GIB:
        return Finding("memory", f"{total / GIB:.0f} GiB")
    remedy = "train with --data sample, and text_classifier with --length 300"
    return Finding("memory", f"{total / GIB:.1f} GiB; the largest recipe needs about 4 GiB", remedy, trouble=True)


def check_disk(folder: pathlib.Path, free: int, writable: bool) -> Finding:
    """Checks that runs or datasets can be written to a folder."""
    if not writable:
        return Finding("disk", f"{folder} is not writable", f"chmod u+w {folder}, or use another folder", trouble=True)
    if free < 2 * GIB:
        remedy = f"free some space below {folder}, or use another disk with --run-dir and --data-dir"
        return Finding(
            "disk", f"{free / GIB:.1f} GiB free for {folder}; CIFAR-10 needs about 1 GiB", remedy, trouble=True
        )
    return Finding("disk", f"{free / GIB:.0f} GiB free for {folder}")


def check_data(title: str, folder: pathlib.Path, prepared: pathlib.Path | None, network: bool) -> Finding:
    """Checks that a dataset is on disk or can be downloaded. Otherwise adds a note, since the sample remains."""
    if prepared:
        return Finding(title, f"prepared in {prepared}")
    if network:
        return Finding(title, "not prepared yet; the first training downloads it")
    remedy = f"run once with a network connection, or copy the prepared data to {folder}"
    return Finding(title, "not prepared, and not reachable; the recipe trains on its sample", remedy)


if __name__ == "__main__":
    main()
