"""The run directory: its choice, its lock, and whether the run in it may be resumed."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import platform
from typing import Any, BinaryIO

from common.cli import RUNTIME_FLAGS, AlreadyFinishedError, SharedConfig, UserError
from common.records import RESULT, file_sha256, read_json

# What may be there before a run begins: its lock, and a file that was not finished.
IGNORED_FILES = {"lock", "config.json.part"}
_locks: dict[pathlib.Path, BinaryIO] = {}


def choose_directory(recipe: str, config: SharedConfig) -> pathlib.Path:
    """`--run-dir`, or with `--resume` alone the latest unfinished run, or a new one, named by the time."""
    if config.run_dir:
        return pathlib.Path(config.run_dir)
    runs = []
    if config.resume:
        found = sorted(pathlib.Path("runs").rglob("config.json"), key=os.path.getmtime)
        runs = [file.parent for file in found if _recipe_of(file.parent) == recipe]
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    new = pathlib.Path("runs", recipe, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    return (unfinished or runs or [new])[-1]


def _recipe_of(directory: pathlib.Path) -> str:
    with contextlib.suppress(UserError):  # Damaged: `resumed_settings` reports it.
        return read_json(directory / "config.json", "recipe")["recipe"]
    return directory.parent.name


def is_used(directory: pathlib.Path, resume: bool) -> bool:
    """Whether there is a run in `directory`; a UserError if it may not be used."""
    try:
        found = set(os.listdir(directory)) - IGNORED_FILES
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    if found and not resume:
        raise UserError(f"--run-dir {directory}: is not empty; choose a new folder, or continue its run with --resume")
    return bool(found)


def lock(directory: pathlib.Path) -> None:
    """Keeps other processes out of a run directory until `unlock`, or until this process ends.

    The file stays: if it was deleted, two processes could each lock a file of that name. A `UserError` says which
    process has locked it, or why it can't be written to.
    """
    unlock(directory)  # An earlier run of this process may have locked it.
    path = (directory / "lock").resolve()
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            holder = path.read_text(errors="replace") or "another process"
        raise UserError(f"--run-dir {directory}: in use by {holder}; wait for it, or choose another") from error
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    _locks[path] = file
    with contextlib.suppress(OSError):  # A full disk: this is only for the message above.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())


def unlock(directory: pathlib.Path) -> bool:
    """Unlocks a run directory; returns whether this process had locked it."""
    file = _locks.pop((directory / "lock").resolve(), None)
    if file:
        file.close()
    return file is not None


def resumed_settings(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Locks the run in `directory` and returns its settings, with `resumed` counted up.

    Raises:
        UserError: there is no run, it is damaged or in use, or it has other settings than `settings`.
        AlreadyFinishedError: the run has its result.
    """
    if not (directory / "config.json").exists():
        raise UserError(f"--run-dir {directory}: holds no run; choose a new folder, or that of a run to resume")
    before = read_json(directory / "config.json", "recipe", "config", "chosen", "files", "resumed")
    if before["recipe"] != (recipe := settings["recipe"]):
        raise UserError(f"--run-dir {directory}: a run of {before['recipe']}, not of {recipe}; choose another")
    free = RUNTIME_FLAGS if settings["config"]["deterministic"] else {*RUNTIME_FLAGS, "threads"}
    found = {}
    for part, names in (("config", RUNTIME_FLAGS), ("chosen", free), ("files", ())):
        for name in [name for name in {**before[part], **settings[part]} if name not in names]:
            old, new = before[part].get(name), settings[part].get(name)
            if old != new:
                found[name] = f"{name} was {old!r} and is {new!r}"
    if found:
        run = f"{directory}{', a finished run' * (directory / 'result.json').exists()}"
        raise UserError(f"--resume: in {run}, {'; '.join(found.values())}; give the same flags, or start a new run")
    lock(directory)
    if (directory / "result.json").exists():
        unlock(directory)
        result, model = read_json(directory / "result.json", *RESULT), directory / "model.keras"
        if not model.is_file() or file_sha256(model) != result["model_sha256"]:
            raise UserError(f"{model}: missing, or not what the training wrote; get it back, or start a new run")
        raise AlreadyFinishedError(f"{directory}: finished already; a new run needs another folder, and no --resume")
    return {**before, "resumed": before["resumed"] + 1}
