"""What a result states beside its metrics: which weights, which code, which versions, how much memory."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
import types
from typing import Any

from common.cli import UserError

import keras
import numpy as np


def write_file(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: under another name first, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def sealed(content: dict[str, Any]) -> str:
    """JSON that holds the SHA-256 of its own content."""
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=2) + "\n"


def unsealed(text: bytes) -> dict[str, Any]:
    """What was given to `sealed`; a ValueError if a single byte is another."""
    try:
        content = json.loads(text)
        del content["sha256"]
        whole = sealed(content)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError("not written by a recipe, or damaged") from error
    if text != whole.encode():
        raise ValueError("changed since it was written")
    return content


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that was written as `write_file(path, sealed(content))`.

    Raises:
        UserError: the file is not there, or a byte of it is another.
    """
    try:
        return unsealed(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name the folder of a run, below runs/") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; take another run, or train again") from error


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """The result of a finished run, and under `config` its configuration.

    Raises:
        UserError: the folder holds no such run.
    """
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        raise UserError(f"{folder}: a run that is not finished; go on with it by --resume, or name another")
    result, settings = read_sealed(folder / "result.json"), read_sealed(folder / "config.json")
    return {**result, "config": settings["config"]}


def load_program(path: pathlib.Path) -> types.ModuleType:
    """Imports a recipe or a script from its file, under the name of that file.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such program; give the name of one in that folder, or a run of one")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # Dataclasses look their module up.
    specification.loader.exec_module(module)
    return module


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: keras.Model) -> str:
    """SHA-256 over the weights in the model's order: equal digests, bit-identical weights."""
    sha256 = hashlib.sha256()
    for values in map(np.ascontiguousarray, model.get_weights()):
        sha256.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return sha256.hexdigest()


def provenance() -> dict[str, Any]:
    """Which program with which packages gave a result, and the most memory it held at any one time.

    The commit is that of the program's folder as the process found it first, as that is the code that it runs; marked
    where files differ from it; None outside a repository.
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


@functools.cache
def commit(folder: pathlib.Path) -> str | None:
    """The commit of the repository around `folder`, marked where files differ from it; None if there is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
