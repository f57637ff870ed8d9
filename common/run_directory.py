"""Which folder a run writes to, that no other process does, and whether what is in it may be resumed."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import platform
from typing import Any, BinaryIO

from common.cli import BESIDE_TRAINING, AlreadyFinishedError, SharedConfig, UserError, warn
from common.records import file_sha256, read_sealed, sealed, unsealed

# What may be left of a run that was killed before it had begun.
TRACES = {"lock", "config.json.part"}
_locks: dict[pathlib.Path, BinaryIO] = {}


def choose_directory(recipe: str, config: SharedConfig) -> pathlib.Path:
    """`--run-dir`, or with `--resume` alone the latest unfinished run, or a new one, named by the time."""
    if config.run_dir:
        try:
            config.run_dir.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"--run-dir {config.run_dir!r}: TensorFlow can't write there; give a name in UTF-8"
            ) from error
        return pathlib.Path(config.run_dir)
    runs = []
    if config.resume:
        found = (*pathlib.Path("runs").glob("*/config.json"), *pathlib.Path("runs").glob("*/*/config.json"))
        runs = [file.parent for file in sorted(found, key=os.path.getmtime) if _recipe_of(file.parent) == recipe]
    unfinished = [run for run in runs if not (run / "result.json").exists()]
    new = pathlib.Path("runs", recipe, datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    return (unfinished or runs or [new])[-1]


def _recipe_of(directory: pathlib.Path) -> str:
    try:
        return read_sealed(directory / "config.json")["recipe"]
    except UserError:  # Damaged, as `resumed_settings` is going to say.
        return directory.parent.name


def is_used(directory: pathlib.Path, resume: bool) -> bool:
    """Whether there is a run in `directory`, which then is locked; refuses one that may not be used."""
    try:
        found = set(os.listdir(directory)) - TRACES
    except FileNotFoundError:
        found = set()
    except OSError as error:
        raise UserError(f"--run-dir {directory}: {error.strerror}; choose an empty or a new one") from error
    if not found:
        return False
    if resume or (directory / "lock").exists():
        lock(directory)
    if not resume:
        unlock(directory)
        raise UserError(f"--run-dir {directory}: is not empty; choose a new folder, or go on with its run by --resume")
    return True


def lock(directory: pathlib.Path) -> None:
    """Keeps other processes out of a run directory, until this one ends in whatever way.

    Raises:
        UserError: another process is at work in it, or it can't be written to.
    """
    path = (directory / "lock").resolve()
    if path in _locks:  # An earlier run of this process.
        _locks.pop(path).close()
    new, file = not path.exists(), None
    try:
        file = open(path, "a+b")  # noqa: SIM115
        file.seek(0)
        try:
            holder = "process {pid} on {host}".format(**unsealed(file.read()))
        except ValueError:
            holder = ""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not new and not holder:
            warn(f"{path}: damaged; taken over, as no process holds it")
        file.truncate(0)
        file.write(sealed({"pid": os.getpid(), "host": platform.node()}).encode())
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # On a full disk, closing tries to write once more.
            if new and not isinstance(error, BlockingIOError):
                path.unlink()
            if file:
                file.close()
        problem = f"{error.strerror}; choose an empty or a new one"
        if isinstance(error, BlockingIOError):
            problem = f"in use by {holder or 'another process'}; wait for it, or choose another"
        raise UserError(f"--run-dir {directory}: {problem}") from error
    _locks[path] = file


def unlock(directory: pathlib.Path) -> bool:
    """Gives the lock of a run directory back; whether this process had it."""
    path = (directory / "lock").resolve()
    held = _locks.pop(path, None)
    if held:
        path.unlink(missing_ok=True)
        held.close()
    return held is not None


def resumed_settings(directory: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in `directory`, if `settings` are the same."""
    if not (directory / "config.json").exists():
        raise UserError(f"--run-dir {directory}: holds no run; choose a new folder, or that of a run to resume")
    before = read_sealed(directory / "config.json")
    if before["recipe"] != settings["recipe"]:
        raise UserError(
            f"--run-dir {directory}: a run of {before['recipe']}, not of {settings['recipe']}; choose another"
        )
    differing = {}
    for part in ("config", "chosen", "files"):
        was = before.get(part, {})  # Older runs name no files.
        for name in {**was, **settings[part]}:
            old, new = was.get(name), settings[part].get(name)
            exact = part == "config" or name != "threads" or settings["config"]["deterministic"]
            if old != new and exact and name not in BESIDE_TRAINING:
                differing[name] = f"{name} was {old!r} and is {new!r}"
    if differing:
        raise UserError(
            f"--resume: in {directory}, {'; '.join(differing.values())}; give the same flags, or start a new run"
        )
    if (directory / "result.json").exists():
        result, model = read_sealed(directory / "result.json"), directory / "model.keras"
        if not model.is_file() or file_sha256(model) != result["model_sha256"]:
            raise UserError(f"{model}: missing, or not what the training wrote; get it back, or start a new run")
        raise AlreadyFinishedError(f"{directory}: finished already; a new run needs another folder, and no --resume")
    return {**before, "resumed": before["resumed"] + 1}
