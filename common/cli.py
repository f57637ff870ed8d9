"""From a recipe's dataclass to a checked configuration, and from errors to exit codes."""

import argparse
import dataclasses
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn, TypeVar

DONE, USER_ERROR, TRAINING_FAILED, INTERRUPTED = 0, 2, 3, 130


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, and the remedy."""


class TrainingFailedError(Exception):
    """Training came to a loss that is not a finite number."""


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """The flags that every recipe has. A recipe's own `Config` adds fields and sets other defaults."""

    data: str = "auto"  # auto, tfds, sample, or the path of your own files
    data_dir: str = ""  # folder of prepared TFDS data; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    validation_size: float = 0.1  # share of the training examples kept for validation; 0: none
    epochs: int = 10  # passes over the training examples
    batch_size: int = 128  # examples per step, over all devices together
    learning_rate: float = 0.001  # step size of the optimizer; the peak where there is a schedule
    seed: int = 0  # decides initial weights, data order, augmentation and the validation cut
    strategy: Literal["auto", "none", "mirrored"] = "auto"  # auto: mirrored over several devices, else none
    devices: int = 0  # GPUs to use, or logical devices to split a CPU into; 0: all GPUs, else one CPU
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # auto: by hardware
    threads: int = 0  # threads for one operation; 0: one per core
    deterministic: bool = False  # the same command gives bit for bit the same weights; slower
    baseline: bool = True  # also train what the result is compared with
    run_dir: str = ""  # folder for everything this run writes; empty: runs/<recipe>/<time>
    smoke: bool = False  # a few examples, two epochs at most: does it run at all?
    histograms: bool = False  # write histograms of the weights to TensorBoard after each epoch
    profile: bool = False  # write a TensorBoard profile of a few steps
    quiet: bool = False  # print errors only


ConfigType = TypeVar("ConfigType", bound=SharedConfig)

# The values a field may have, for those where not every non-negative number makes sense.
_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "batch_size": (lambda value: value >= 1, "must be at least 1"),
    "epochs": (lambda value: value >= 1, "must be at least 1"),
    "learning_rate": (lambda value: value > 0, "must be greater than 0"),
    "validation_size": (lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
    "warmup": (lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
    "token_dropout": (lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
    "seed": (lambda value: 0 <= value < 2**32, "must be at least 0 and less than 2**32"),
    "threads": (lambda value: 0 <= value <= 1024, "must be from 0 to 1024"),
    "devices": (lambda value: 0 <= value <= 1024, "must be from 0 to 1024"),
    "vocabulary": (lambda value: 3 <= value <= 10**7, "must be from 3 to 10,000,000"),
    "length": (lambda value: 1 <= value <= 10**5, "must be from 1 to 100,000"),
    "dimensions": (lambda value: 1 <= value <= 10**4, "must be from 1 to 10,000"),
    "naive_epochs": (lambda value: value >= 1, "must be at least 1"),
    "label_smoothing": (lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
}
_FINITE = "must be a finite number"
_NOT_NEGATIVE = (lambda value: value >= 0, "must not be negative")
_SMOKE_EPOCHS = 2


def field_comments(config_class: type) -> dict[str, str]:
    """The comment behind each field, of the class and the classes it stands on: the help of the flag."""
    comments: dict[str, str] = {}
    for ancestor in reversed(config_class.__mro__[:-1]):
        try:
            source = inspect.getsource(ancestor)
        except (OSError, TypeError):  # No source at hand, as in a notebook: flags without help.
            continue
        comments.update(re.findall(r"^ {4}(\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    return comments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def parse_config(
    config_class: type[ConfigType], arguments: Sequence[str], description: str = ""
) -> ConfigType:
    """Turns command-line arguments into a checked configuration.

    Args:
        config_class: dataclass of the recipe; a field `batch_size` becomes the flag `--batch-size`.
        arguments: the words behind the program's name.
        description: shown by `--help`, which prints and raises `SystemExit(0)`.

    Raises:
        UserError: an unknown flag, or a value that does not fit its field.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        text = comments.get(field.name, "").replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
            continue
        choices = typing.get_args(field.type) or None
        parser.add_argument(
            flag,
            type=str if choices else field.type,
            choices=choices,
            default=field.default,
            metavar=None if choices else field.type.__name__.upper(),
            help=f"{text} (default: {field.default!r})",
        )
    config = config_class(**vars(parser.parse_args(arguments)))
    check_config(config)
    return dataclasses.replace(config, epochs=min(config.epochs, _SMOKE_EPOCHS)) if config.smoke else config


def check_config(config: SharedConfig) -> None:
    """Raises `UserError` for the first number that is out of its range."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        allowed, rule = _LIMITS.get(field.name, _NOT_NEGATIVE)
        if not math.isfinite(value) or not allowed(value):
            problem = rule if math.isfinite(value) else _FINITE
            raise UserError(f"--{field.name.replace('_', '-')} {value}: {problem}")


def run_recipe(
    train: Callable[[ConfigType], dict], config_class: type[ConfigType], description: str | None = None
) -> None:
    """The whole of a recipe's `main`: reads the flags, trains, and ends the process with the exit code.

    0 done; 2 something the user can mend; 3 the loss is no longer a finite number; 130 interrupted.
    """
    try:
        train(parse_config(config_class, sys.argv[1:], description or ""))
    except UserError as error:
        _leave(USER_ERROR, f"error: {error}")
    except TrainingFailedError as error:
        _leave(TRAINING_FAILED, f"training failed: {error}")
    except KeyboardInterrupt:
        _leave(INTERRUPTED, "interrupted")


def _leave(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
