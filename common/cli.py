"""Command line of the recipes: parses flags into a validated configuration and maps errors to exit codes."""

import argparse
import contextlib
import dataclasses
import errno
import gc
import inspect
import math
import os
import pathlib
import re
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NoReturn

from common.console import end_status, print_line

import tensorflow as tf

# Numbers with limits: an inclusive minimum and an exclusive maximum.
Count = Annotated[int, 1, math.inf]
Positive = Annotated[float, 1e-30, math.inf]
Share = Annotated[float, 0, 1]
EXIT_INTERRUPTED = 75
# Signals that ask a program to exit: Ctrl-C, and preemption by a cluster.
STOPPING = (signal.SIGINT, signal.SIGTERM)
# Functions to call when a recipe exits, with its exit code and last line of output.
exit_hooks: list[Callable[[int, str], None]] = []
# Flags that do not affect the training result; a resumed run may change them.
RUNTIME_FLAGS = {
    *("data_dir", "cache_dir", "run_dir", "resume", "checkpoint_every", "cluster_timeout", "quiet"),
    *("baseline", "histograms", "profile"),
}
# Errors that the user can fix wherever they occur: a full or write-protected disk.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
# The first flag of each group of shared flags in --help.
_GROUPS = {"data": "data", "epochs": "training", "strategy": "hardware", "baseline": "run"}


class UserError(Exception):
    """An error that the user can fix. The message is one line: location, problem and remedy."""


class TrainingFailedError(Exception):
    """Training diverged: the loss or a variable is NaN or infinite."""


class AlreadyFinishedError(Exception):
    """The run to resume is finished."""


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The flags of every recipe. A recipe's `Config` adds fields and overrides defaults."""

    data: str = "auto"  # auto, tfds, sample, or the path of your own files
    data_dir: str = ""  # folder of prepared TFDS data; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    test_data: str = ""  # another file or folder with the test examples
    skip_broken: bool = False  # leave out files and rows that can't be read
    cache_dir: str = ""  # folder for sets of images that are too large for memory; empty: ~/.cache/keras_recipes
    validation_size: Share = 0.1  # share of the training examples to use for validation; 0: none
    epochs: Count = 10  # passes over the training examples
    batch_size: Count = 128  # examples per step, summed over all devices
    learning_rate: Positive = 0.001  # step size of the optimizer; the peak, if there is a learning rate schedule
    init_from: str = ""  # a finished run, or a .keras file, whose weights to begin with; empty: random weights
    patience: Annotated[int, 0, 1_000_000] = 0  # epochs without better validation, then stop, keep the best; 0: never
    seed: Annotated[int, 0, 2**32] = 0  # seed of initial weights, shuffling, augmentation and validation split
    strategy: Literal["auto", "none", "mirrored", "multi-worker", "tpu"] = "auto"  # auto: by devices and workers
    devices: Annotated[int, 0, 1025] = 0  # GPUs, or logical devices to split the CPU into; 0: all GPUs, else one CPU
    cluster_timeout: Annotated[int, 1, 1_000_000] = 60  # seconds to wait for the other workers
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # auto: depends on hardware
    threads: Annotated[int, 0, 1025] = 0  # threads per operation; 0: one per core
    deterministic: bool = False  # the same command gives bit-identical weights; slower
    baseline: bool = True  # also train the baseline that the result is compared with
    run_dir: str = ""  # folder for all files of this run; empty: runs/<recipe>/<time>
    resume: bool = False  # continue the run in --run-dir, else the latest unfinished run of this recipe
    checkpoint_every: Annotated[int, 0, 1_000_000_000] = 0  # steps; 0: as often as costs 1 % of training time
    smoke: bool = False  # quick test that the recipe runs: a few examples, at most two epochs
    histograms: bool = False  # write histograms of the weights to TensorBoard after each epoch
    profile: bool = False  # write a TensorBoard profile of a few steps
    quiet: bool = False  # print errors only

    def __post_init__(self):
        """Raises a `UserError` if a value has the wrong type or is outside its limits. Shortens a smoke test."""
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            if problem := _problem(getattr(self, name), kind):
                raise UserError(f"--{name.replace('_', '-')}: {problem}")
        if self.smoke:
            object.__setattr__(self, "epochs", min(self.epochs, 2))


def _problem(value: Any, kind: Any) -> str:
    """Describes why a value does not fit a type, which may be `Literal` or annotated with limits; empty if it fits."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return "" if value in choices else f"{value!r} must be one of {', '.join(choices)}"
    number, minimum, maximum = typing.get_args(kind) or (kind, 0, math.inf)
    fits = isinstance(value, (int, float) if number is float else number)
    if not fits or (isinstance(value, bool) and number is not bool):
        return f"{value!r} is not {'an' if number is int else 'a'} {number.__name__}"
    if number not in (int, float) or minimum <= value < maximum:
        return ""
    limits = f"at least {minimum:,}" + (f" and less than {maximum:,}" if maximum < math.inf else "")
    return f"{value} must be {limits if math.isfinite(value) else 'finite'}"


class _Help(argparse.HelpFormatter):
    """Wraps the paragraphs of a description. Keeps indented lines, and lines that begin with a word and two spaces.

    If such a line is too long, it continues below its text.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kept, blocks = re.compile(r"\w* {2,}|$"), [""]
        for line in text.splitlines():
            if kept.match(line) or kept.match(blocks[-1]):
                blocks.append(line)
            else:
                blocks[-1] += f" {line}"
        wrapped = []
        for block in blocks[1:]:
            below = " " * (start.end() if (start := kept.match(block)) else 0)
            wrapped += textwrap.wrap(block, width, subsequent_indent=below, break_on_hyphens=False) or [""]
        return "\n".join(wrapped)


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors. Disallows abbreviated flags: a new flag could make them ambiguous."""

    def __init__(self, description: str | None, **options: Any):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` instead of printing the usage."""
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the flags")


def parse_config(config_class: type, arguments: Sequence[str], description: str = "") -> Any:
    """Parses command-line arguments into `config_class`, a dataclass. Raises a `UserError` that names an invalid flag.

    A field `batch_size` becomes the flag `--batch-size`; the comment at the end of its line becomes the help text. The
    help lists the fields that `config_class` adds to `SharedConfig` first.
    """
    parser = Parser(description, usage="%(prog)s [flags]")
    groups = {title: parser.add_argument_group(title) for title in ("recipe", *_GROUPS.values())}
    group, shared = "", [field.name for field in dataclasses.fields(SharedConfig)]
    types, comments = typing.get_type_hints(config_class, include_extras=True), field_comments(config_class)
    for field in dataclasses.fields(config_class):  # The shared fields come first, in their order.
        group = _GROUPS.get(field.name, group) if field.name in shared else "recipe"
        kind, text = types[field.name], comments.get(field.name, "").replace("%", "%%")
        options: dict[str, Any] = {"help": f"{text} (default: {field.default!r})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["metavar"] = f"{{{','.join(typing.get_args(kind))}}}"
        elif kind is not str:
            number = (typing.get_args(kind) or (kind,))[0]
            options |= {"type": number, "metavar": number.__name__}
        groups[group].add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    return config_class(**vars(parser.parse_args(arguments)))


def field_comments(config_class: type) -> dict[str, str]:
    """Returns the trailing comment of each field of a class and its base classes; empty if there is no source code."""
    try:
        source = "".join(inspect.getsource(base) for base in reversed(config_class.__mro__[:-1]))
    except (OSError, TypeError):  # In a notebook, there is no source file.
        source = ""
    return dict(re.findall(r"^ {4}(\w+): .*?  # (.*)$", source, flags=re.MULTILINE))


def some(items: Iterable[Any], most: int = 10) -> str:
    """Returns items for a message: the first ones, and how many more there are."""
    items = list(map(str, items))
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def listed(names: Iterable[Any], most: int = 10) -> str:
    """Returns names for a message, like `some`, in quotation marks."""
    return some((repr(str(name)) for name in names), most)


def warn(line: str) -> None:
    """Prints a warning to stderr, even with --quiet."""
    text = re.sub(r"{{.*?}} | \[Op:\w*\]( name: )?", "", line)  # TensorFlow's references to its own code.
    print_line("warning: " + " ".join(text.split()), sys.stderr)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script. A `UserError` exits with one line and code 2; Ctrl-C and `SIGTERM` exit with code 75."""
    for number in STOPPING:  # Raise an exception, so that temporary files are removed.
        signal.signal(number, signal.default_int_handler)
    _run(main)


def run_recipe(train: Callable[[Any], dict], config_class: type, description: str | None = None) -> None:
    """Runs a recipe as a program: parses the flags, trains, and exits the process.

    Exit codes: 0 success; 2 user error; 3 training diverged; 75 interrupted; 76 another worker was lost. From now on,
    Ctrl-C and `SIGTERM` exit the process at once; during training, after saving a checkpoint.
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
    """Runs a program, prints its last line and exits with its exit code."""
    gc.freeze()  # Excludes the million objects of imported modules from garbage collection.
    code, line = 0, ""
    try:
        _check_checkout()
        main()
        sys.stdout.flush()
    except AlreadyFinishedError as finished:
        line = str(finished)
    except UserError as error:
        code, line = 2, f"error: {error}"
    except TrainingFailedError as error:
        code, line = 3, f"training failed: {error}"
    except BrokenPipeError:  # The reader, such as `head`, has exited.
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
        signal.signal(number, signal.SIG_IGN)  # The exit code must not change any more.
    end_status()
    try:
        if line:
            print_line(line, sys.stderr if code else sys.stdout)
        sys.stdout.flush()
    except OSError:  # Python would flush again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _check_checkout() -> None:
    """Raises a `UserError` if the program is part of another copy of the project, whose own `common` was not used."""
    program, used = getattr(sys.modules["__main__"], "__file__", None), pathlib.Path(__file__).parent
    for folder in pathlib.Path(program).resolve().parents[:2] if program else ():
        if (folder / "common" / "cli.py").is_file() and not used.samefile(folder / "common"):
            remedy = f"install it: pip install -e {folder}"
            raise UserError(
                f"{program}: the package common of this Python is {used}, not that of the program; {remedy}"
            )


def _exit_when_stopped() -> None:
    """Installs signal handlers that exit at once, with one line and exit code 75.

    They raise no exception, because a library might swallow it. `fit` replaces them by handlers that save first; at any
    other time there is nothing to save.
    """
    line = "interrupted: the same command with --resume continues"

    def exit_interrupted(number: int, frame: Any) -> None:
        with contextlib.suppress(RuntimeError, OSError):  # The signal may arrive during a `print`.
            sys.stdout.flush()
        end_status()
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        for hook in exit_hooks:
            hook(EXIT_INTERRUPTED, line)
        os._exit(EXIT_INTERRUPTED)

    for number in STOPPING:
        signal.signal(number, exit_interrupted)
