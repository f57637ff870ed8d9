"""The run directory: its choice, its lock, and whether the run in it may be resumed."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import platform
from typing import Any, BinaryIO

from common.cli import BESIDE_TRAINING, AlreadyFinishedError, SharedConfig, UserError, warn
from common.records import RESULT, file_sha256, read_json

# What may be left of a run that was killed before it had begun.
TRACES = {"lock", "config.json.part"}
# What may be left of a run that was killed before its first checkpoint.
_EARLY = {*TRACES, "config.json", "plots", "checkpoints", "tensorboard"}
_locks: dict[pathlib.Path, BinaryIO] = {}


def choose_directory(recipe: str, config: SharedConfig) -> pathlib.Path:
    """`--run-dir`, or with `--resume` alone the latest unfinished run, or a new one, named by the time."""
    if config.run_dir:
        return pathlib.Path(config.run_dir)
    runs = []
    if config.resume:
        found = (*pathlib.Path("runs").glob("*/config.json"), *pathlib.Path("runs").glob("*/*/config.json"))
        runs = [file.parent for file in sorted(found, key=os.path.getmtime) if _recipe_of(file.parent) == recipe]
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    new = pathlib.Path("runs", recipe, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    return (unfinished or runs or [new])[-1]


def _recipe_of(directory: pathlib.Path) -> str:
    with contextlib.suppress(UserError):  # Damaged: `resumed_settings` reports it.
        return read_json(directory / "config.json", "recipe")["recipe"]
    return directory.parent.name


def is_used(directory: pathlib.Path, resume: bool) -> bool:
    """Whether there is a run in `directory`, which then is locked; a UserError if it may not be used."""
    try:
        found = set(os.listdir(directory)) - TRACES
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    if found and not resume:
        raise UserError(f"--run-dir {directory}: is not empty; choose a new folder, or continue its run with --resume")
    if found:
        lock(directory)
    return bool(found)


def lock(directory: pathlib.Path) -> None:
    """Keeps other processes out of a run directory until `unlock`, or until this process ends.

    A UserError if another process has locked it, or it can't be written to.
    """
    path = (directory / "lock").resolve()
    if path in _locks:  # By an earlier run of this process.
        _locks.pop(path).close()
    try:
        while True:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            file.close()  # Another process had locked this file and has just deleted it.
    except BlockingIOError as error:
        with file:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
        raise UserError(f"--run-dir {directory}: in use by {holder}; wait for it, or choose another") from error
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    with contextlib.suppress(OSError):  # Only for the message above.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
    _locks[path] = file


def unlock(directory: pathlib.Path) -> bool:
    """Unlocks a run directory; returns whether this process had locked it."""
    path = (directory / "lock").resolve()
    file = _locks.pop(path, None)
    if file:
        path.unlink(missing_ok=True)  # While it is locked: see the comparison in `lock`.
        file.close()
    return file is not None


def resumed_settings(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in `directory`, with `resumed` counted up.

    Raises:
        UserError: there is no run, it is damaged, or it has other settings than `settings`.
        AlreadyFinishedError: the run has its result.
    """
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"--run-dir {directory}: holds no run; choose a new folder, or that of a run to resume")
    try:
        before = read_json(path, "recipe", "config", "chosen", "files", "resumed")
    except UserError as error:
        torn = path.is_file() and not path.read_bytes().rstrip().endswith(b"}")
        if not torn or set(os.listdir(directory)) - _EARLY or any(directory.glob("checkpoints/epoch-*")):
            raise
        warn(f"{str(error).split(';')[0]}; the run has no checkpoint yet and starts anew")
        before = settings
    was, now = before["recipe"], settings["recipe"]
    if was != now:
        raise UserError(f"--run-dir {directory}: a run of {was}, not of {now}; choose another")
    differing = {}
    for part in ("config", "chosen", "files"):
        for name in {**before[part], **settings[part]}:
            old, new = before[part].get(name), settings[part].get(name)
            exact = part == "config" or name != "threads" or settings["config"]["deterministic"]
            if old != new and exact and name not in BESIDE_TRAINING:
                differing[name] = f"{name} was {old!r} and is {new!r}"
    if differing:
        found = "; ".join(differing.values())
        raise UserError(f"--resume: in {directory}, {found}; give the same flags, or start a new run")
    if (directory / "result.json").exists():
        result, model = read_json(directory / "result.json", *RESULT), directory / "model.keras"
        if not model.is_file() or file_sha256(model) != result["model_sha256"]:
            raise UserError(f"{model}: missing, or not what the training wrote; get it back, or start a new run")
        raise AlreadyFinishedError(f"{directory}: finished already; a new run needs another folder, and no --resume")
    return {**before, "resumed": before["resumed"] + 1}
