"""What a result states beside its metrics: which weights, which code, which versions, how much memory."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
from typing import Any

from common.cli import UserError

import keras
import numpy as np


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all: under another name first, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """The result of a finished run, and under `config` its configuration.

    Raises:
        UserError: the folder holds no such run.
    """
    try:
        result, config = (json.loads((folder / name).read_text("utf-8")) for name in ("result.json", "config.json"))
        for name in ("recipe", "metrics", "class_names", "columns", "history"):
            result[name]
        return {**result, "config": dict(config)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not the folder of a finished run ({error}); choose one below runs/") from error


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over the weights in the model's order: equal digests, bit-identical weights."""
    sha256 = hashlib.sha256()
    for values in map(np.ascontiguousarray, model.get_weights()):
        sha256.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return sha256.hexdigest()


def provenance() -> dict[str, Any]:
    """Which program with which packages gave a result, and the most memory it held at any one time.

    The commit is that of the program's folder, marked where files differ from it; None outside a repository.
    """
    packages = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(pathlib.Path(sys.argv[0]).parent),
        "command": shlex.join(["python", *sys.argv]),
        # Linux counts in KiB, macOS in bytes.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def commit(folder: pathlib.Path) -> str | None:
    """The commit of the repository around `folder`, marked where files differ from it; None if there is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
