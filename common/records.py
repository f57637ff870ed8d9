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

import keras
import numpy as np

_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "tensorboard", "numpy", "scikit-learn")


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all: under another name first, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over the weights in the model's order: equal digests, bit-identical weights."""
    sha256 = hashlib.sha256()
    for weight in model.weights:
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(weight))
        sha256.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return sha256.hexdigest()


def peak_memory_bytes() -> int:
    """The most memory this process has held at any one time."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def commit() -> str | None:
    """The commit of the code, with a mark where files differ from it; None outside a repository."""
    here = pathlib.Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def command() -> str:
    """The command that started this process, as one would type it."""
    return shlex.join(["python", *sys.argv])
