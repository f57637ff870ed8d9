"""From a recipe's dataclass to a checked configuration, and from errors to exit codes."""

import argparse
import contextlib
import dataclasses
import errno
import gc
import inspect
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NoReturn

import tensorflow as tf

# Numbers with limits: the lowest value allowed, and the one that all must stay below.
Count = Annotated[int, 1, math.inf]
Positive = Annotated[float, 1e-30, math.inf]
Share = Annotated[float, 0, 1]
EXIT_INTERRUPTED = 75
# What asks a program to end: Ctrl-C, and a cluster that wants its machine back.
STOPPING = (signal.SIGINT, signal.SIGTERM)
# Functions that are called when a recipe ends, with its exit code and last line.
exit_hooks: list[Callable[[int, str], None]] = []
# Flags that do not affect the training result; a resumed run may change them.
RUNTIME_FLAGS = {
    *("data_dir", "run_dir", "resume", "checkpoint_every", "cluster_timeout", "quiet"),
    *("baseline", "histograms", "profile"),
}
# What a user can fix wherever it shows: a disk that is full or may not be written to.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class UserError(Exception):
    """Something the user can fix. The message is one line: what, where, and the remedy."""


class TrainingFailedError(Exception):
    """The loss is not a finite number."""


class AlreadyFinishedError(Exception):
    """There is nothing left to resume."""


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The flags that every recipe has. A recipe's own `Config` adds fields and sets other defaults."""

    data: str = "auto"  # auto, tfds, sample, or the path of your own files
    data_dir: str = ""  # folder of prepared TFDS data; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    validation_size: Share = 0.1  # share of the training examples kept for validation; 0: none
    epochs: Count = 10  # passes over the training examples
    batch_size: Count = 128  # examples per step, over all devices together
    learning_rate: Positive = 0.001  # step size of the optimizer; the peak where there is a schedule
    seed: Annotated[int, 0, 2**32] = 0  # decides initial weights, order, augmentation, validation cut
    strategy: Literal["auto", "none", "mirrored", "multi-worker", "tpu"] = "auto"  # auto: by devices and workers
    devices: Annotated[int, 0, 1025] = 0  # GPUs, or parts to split a CPU into; 0: all GPUs, else one CPU
    cluster_timeout: Annotated[int, 1, 1_000_000] = 60  # seconds to wait for the other workers
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # auto: by hardware
    threads: Annotated[int, 0, 1025] = 0  # threads for one operation; 0: one per core
    deterministic: bool = False  # the same command gives bit for bit the same weights; slower
    baseline: bool = True  # also train what the result is compared with
    run_dir: str = ""  # folder for everything this run writes; empty: runs/<recipe>/<time>
    resume: bool = False  # continue the run in --run-dir, else the latest unfinished one of this recipe
    checkpoint_every: Annotated[int, 0, 1_000_000_000] = 0  # steps; 0: as often as takes a hundredth of the time
    smoke: bool = False  # a few examples, two epochs at most: does it run at all?
    histograms: bool = False  # write histograms of the weights to TensorBoard after each epoch
    profile: bool = False  # write a TensorBoard profile of a few steps
    quiet: bool = False  # print errors only

    def __post_init__(self):
        """Raises a `UserError` if a value is not of its field's type or beyond its limits; keeps a smoke test short."""
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            if problem := _problem(getattr(self, name), kind):
                raise UserError(f"--{name.replace('_', '-')}: {problem}")
        if self.smoke:
            object.__setattr__(self, "epochs", min(self.epochs, 2))


def _problem(value: Any, kind: Any) -> str:
    """What is wrong with a value for a field of a type, which may be `Literal` or annotated with limits; or nothing."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return "" if value in choices else f"{value!r} is none of {', '.join(choices)}"
    number, lowest, below = typing.get_args(kind) or (kind, 0, math.inf)
    fits = isinstance(value, (int, float) if number is float else number)
    if not fits or (isinstance(value, bool) and number is not bool):
        return f"{value!r} is no {number.__name__}"
    if number not in (int, float) or lowest <= value < below:
        return ""
    limits = f"at least {lowest:,}" + (f" and less than {below:,}" if below < math.inf else "")
    return f"{value} must be {limits if math.isfinite(value) else 'finite'}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. Flags can't be abbreviated: a new flag could make that ambiguous."""

    def __init__(self, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` instead of printing the usage."""
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the flags")


def parse_config(config_class: type, arguments: Sequence[str], description: str = "") -> Any:
    """Turns command-line arguments into a `config_class`, a dataclass; a `UserError` says which flag does not fit.

    A field `batch_size` becomes the flag `--batch-size`, and the comment behind it the help.
    """
    parser = Parser(description)
    types, comments = typing.get_type_hints(config_class, include_extras=True), field_comments(config_class)
    for field in dataclasses.fields(config_class):
        kind, text = types[field.name], comments.get(field.name, "").replace("%", "%%")
        options: dict[str, Any] = {"help": f"{text} (default: {field.default!r})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["metavar"] = f"{{{','.join(typing.get_args(kind))}}}"
        elif kind is not str:
            number = (typing.get_args(kind) or (kind,))[0]
            options |= {"type": number, "metavar": number.__name__}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    return config_class(**vars(parser.parse_args(arguments)))


def field_comments(config_class: type) -> dict[str, str]:
    """The comment behind each field of a class and of those it stands on; none where there is no source."""
    try:
        source = "".join(inspect.getsource(each) for each in reversed(config_class.__mro__[:-1]))
    except (OSError, TypeError):  # As in a notebook.
        source = ""
    return dict(re.findall(r"^ {4}(\w+): .*?  # (.*)$", source, flags=re.MULTILINE))


def warn(line: str) -> None:
    """Says what went wrong and did not stop the program."""
    without_marks = re.sub(r"{{.*?}} | \[Op:\w*\]( name: )?", "", line)  # Where in its own code TensorFlow was.
    print("warning: " + " ".join(without_marks.split()), file=sys.stderr, flush=True)


def run_script(main: Callable[[], None]) -> None:
    """The whole of a script: a `UserError` ends it with one line and exit code 2, Ctrl-C and `SIGTERM` with 75."""
    for number in STOPPING:  # By an exception, so that no temporary files are left.
        signal.signal(number, signal.default_int_handler)
    _run(main)


def run_recipe(train: Callable[[Any], dict], config_class: type, description: str | None = None) -> None:
    """The whole of a recipe's `main`: reads the flags, trains, and ends the process with the exit code.

    0 done; 2 something the user can fix; 3 the loss is not finite; 75 interrupted; 76 another worker is lost. From here
    on Ctrl-C and `SIGTERM` end the process at once, in training once it is saved.
    """
    _exit_when_stopped()

    def main() -> None:
        config = parse_config(config_class, sys.argv[1:], description or "")
        try:
            train(config)
        except (MemoryError, tf.errors.ResourceExhaustedError) as error:
            size = config.batch_size
            remedy = f"try {size // 2}" if size > 1 else "try fewer or smaller examples"
            raise UserError(f"--batch-size {size}: does not fit into memory; {remedy}") from error

    _run(main)


def _run(main: Callable[[], None]) -> NoReturn:
    """Runs a program to its exit code and its last line."""
    gc.freeze()  # The modules are a million objects that stay: the garbage collector need not look at them again.
    code, line = 0, ""
    try:
        main()
        sys.stdout.flush()
    except AlreadyFinishedError as finished:
        line = str(finished)
    except UserError as error:
        code, line = 2, f"error: {error}"
    except TrainingFailedError as error:
        code, line = 3, f"training failed: {error}"
    except BrokenPipeError:  # A reader, such as `head`, has gone.
        code, line = EXIT_INTERRUPTED, "interrupted: nobody reads the output any more"
    except OSError as error:
        if error.errno not in _DISK:
            raise
        problem = f"{error.filename or 'output'}: {error.strerror}"
        code, line = 2, f"error: {problem}; make room, or choose a place that can be written to"
    except KeyboardInterrupt as interruption:
        code, line = EXIT_INTERRUPTED, f"interrupted: {interruption}".rstrip(": ")
    line = " ".join(line.split())
    for hook in exit_hooks:
        hook(code, line)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # The outcome is settled.
    if line:
        print(line, file=sys.stderr if code else sys.stdout)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _exit_when_stopped() -> None:
    """Lets a signal that asks the program to end do so at once, with one line and exit code 75.

    During `fit` another handler saves first. At any other time nothing is unsaved, and a library might swallow an
    exception.
    """
    line = "interrupted: the same command with --resume continues"

    def exit_interrupted(number: int, frame: Any) -> None:
        with contextlib.suppress(RuntimeError, OSError):  # The signal came while a line was being printed.
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        for hook in exit_hooks:
            hook(EXIT_INTERRUPTED, line)
        os._exit(EXIT_INTERRUPTED)

    for number in STOPPING:
        signal.signal(number, exit_interrupted)
