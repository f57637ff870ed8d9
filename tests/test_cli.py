import dataclasses
import errno
import re
import shlex
import signal
import subprocess
import sys

from common.cli import (
    EXIT_INTERRUPTED,
    AlreadyFinishedError,
    Count,
    Parser,
    Share,
    SharedConfig,
    TrainingFailedError,
    UserError,
    field_comments,
    parse_config,
    run_recipe,
)

import pytest
import tensorflow as tf
from programs import run_program


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: Count = 7  # passes, 100 % of them
    warmup: Share = 0.1  # share
    shift: int = 2  # plain number


def test_flags_become_fields_of_their_types():
    config = parse_config(Config, ["--batch-size", "8", "--warmup", "0.5", "--deterministic", "--no-baseline"])
    assert (config.batch_size, config.warmup, config.deterministic, config.baseline) == (8, 0.5, True, False)
    assert config.epochs == 7


def test_smoke_shortens_training_and_changes_nothing_else():
    plain, smoke = parse_config(Config, []), parse_config(Config, ["--smoke"])
    assert dataclasses.replace(smoke, smoke=False, epochs=plain.epochs) == plain
    assert smoke.epochs == 2
    assert parse_config(Config, ["--smoke", "--epochs", "1"]).epochs == 1


def test_help_shows_the_comment_of_each_field(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(Config, ["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "passes, 100 % of them (default: 7)" in shown
    assert "step size of the optimizer" in shown


def test_help_lists_the_flags_in_groups_within_80_columns(recipe, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_config(recipe.Config, ["--help"], recipe.__doc__)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    titles = re.findall(r"^(\w+):$", shown, flags=re.MULTILINE)
    assert titles == ["options", "recipe", "data", "training", "hardware", "run"]
    groups = dict(zip(titles, re.split(r"^\w+:$", shown, flags=re.MULTILINE)[1:], strict=True))
    own = {field.name for field in dataclasses.fields(recipe.Config)} - {
        field.name for field in dataclasses.fields(SharedConfig)
    }
    flags = {title: re.findall(r"^  --([\w-]+)", text, flags=re.MULTILINE) for title, text in groups.items()}
    assert {name.replace("-", "_") for name in flags["recipe"]} == own
    assert flags["data"] == ["data", "data-dir", "test-data", "skip-broken", "cache-dir", "validation-size"]
    assert (flags["training"][0], flags["hardware"][0], flags["run"][-1]) == ("epochs", "strategy", "quiet")


def test_the_description_keeps_its_entries_and_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "42")
    parser = Parser(
        "Title: a sentence of several words\nin a paragraph.\n\n    a command\n\nData      many long words of text"
    )
    assert (
        parser.format_help().splitlines()[2:9]
        == [
            "Title: a sentence of several words in a",
            "paragraph.",
            "",
            "    a command",
            "",
            "Data      many long words of",
            "          text",
        ]
        or parser.format_help()
    )


def test_every_field_has_a_comment(recipe):
    comments = field_comments(recipe.Config)
    for field in dataclasses.fields(recipe.Config):
        assert comments.get(field.name), f"{recipe.__name__}: --{field.name} has no help"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--batch", "8"], "--batch"),
        (["--batch-size", "0"], "--batch-size: 0 must be at least 1"),
        (["--batch-size", "many"], "--batch-size"),
        (["--epochs", "-1"], "--epochs: -1 must be at least 1"),
        (["--learning-rate", "0"], "--learning-rate: 0.0 must be at least 1e-30"),
        (["--learning-rate", "nan"], "--learning-rate: nan must be finite"),
        (["--learning-rate", "inf"], "--learning-rate: inf must be finite"),
        (["--validation-size", "1"], "--validation-size: 1.0 must be at least 0 and less than 1"),
        (["--seed", "-3"], "--seed: -3 must be at least 0"),
        (["--strategy", "fast"], "--strategy"),
        (["--precision", "int8"], "--precision"),
        (["--devices", "-2"], "--devices: -2"),
        (["--validation-size", "-1"], "--validation-size: -1"),
        (["--warmup", "1"], "--warmup: 1.0 must be at least 0 and less than 1"),
        (["--shift", "-1"], "--shift: -1 must be at least 0"),
        (["extra"], "extra"),
    ],
)
def test_bad_flags_are_named(flags, named):
    with pytest.raises(UserError, match="--") as error:
        parse_config(Config, flags)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"batch_size": 0}, "--batch-size: 0 must be at least 1"),
        ({"batch_size": "8"}, "--batch-size: '8' is not an int"),
        ({"batch_size": True}, "--batch-size: True is not an int"),
        ({"learning_rate": float("nan")}, "--learning-rate: nan must be finite"),
        ({"warmup": 1}, "--warmup: 1 must be at least 0 and less than 1"),
        ({"strategy": "fast"}, "--strategy: 'fast' must be one of auto, none, mirrored"),
        ({"checkpoint_every": "5 hours"}, "--checkpoint-every: '5 hours' is not an int"),
    ],
)
def test_limits_hold_in_python_too(values, named):
    with pytest.raises(UserError) as error:
        Config(**values)
    assert str(error.value).startswith(named)
    with pytest.raises(UserError):
        dataclasses.replace(Config(), **values)


def test_numbers_and_smoke_tests_in_python():
    assert Config(learning_rate=1, warmup=0).learning_rate == 1
    assert Config(smoke=True).epochs == 2


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("file.csv: no rows;\nadd some"), 2, "error: file.csv: no rows; add some\n"),
        (AlreadyFinishedError("run: finished already"), 0, "run: finished already\n"),
        (TrainingFailedError("the loss is nan"), 3, "training failed: the loss is nan\n"),
        (KeyboardInterrupt("saved in run"), 75, "interrupted: saved in run\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "x.npz"),
            2,
            "error: x.npz: Read-only file system; make room, or choose a place that can be written to\n",
        ),
        (MemoryError(), 2, "error: --batch-size 128: does not fit into memory; try 64\n"),
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
            2,
            "error: --batch-size 128: does not fit into memory; try 64\n",
        ),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, line):
    def train(config):
        raise raised

    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(SystemExit) as left:
        run_recipe(train, Config)
    assert left.value.code == code
    assert capsys.readouterr() == (("", line) if code else (line, ""))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_script_that_is_stopped_leaves_nothing_behind(number, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # What a shell starts in the background ignores it.
    words = [sys.executable, "-c", STOPPED, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout.readline() == "at work\n", script.stderr.read()
        script.send_signal(number)
        assert script.stderr.read() == "interrupted\n"
    assert script.returncode == EXIT_INTERRUPTED
    assert not list(tmp_path.iterdir())


def test_importing_changes_nothing_of_the_process():
    run = run_program("-c", IMPORTED)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


@pytest.mark.long
def test_a_program_whose_reader_has_seen_enough_is_interrupted():
    train = "lambda config: [print('x' * 1_000_000) for _ in range(3)]"
    words = f"from common.cli import SharedConfig, run_recipe; run_recipe({train}, SharedConfig)"
    command = f'{shlex.quote(sys.executable)} -c "{words}" | head -c 1; echo " ${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stdout == f"x {EXIT_INTERRUPTED}\n"
    assert run.stderr == "interrupted: nobody reads the output any more\n"


@pytest.mark.long
def test_a_script_on_a_full_disk_says_so_in_one_line():
    words = "from common.cli import run_script; run_script(lambda: print('x' * 1_000_000))"
    command = f'{shlex.quote(sys.executable)} -c "{words}" > /dev/full'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: output: No space left on device; make room, or choose a place that can be written to\n"


IMPORTED = """
import gc, inspect, os, signal
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")  # Else Keras and TensorFlow print.
import keras
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
def process():
    collector = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()
    classes = {keras.Model, TensorFlowTrainer}
    for module in (keras.layers, keras.optimizers, keras.losses, keras.metrics, keras.callbacks, keras.distillation):
        classes |= {each for each in vars(module).values() if inspect.isclass(each)}
    attributes = {(each, name): id(value) for each in classes for name, value in vars(each).items()}
    return [signal.getsignal(number) for number in signal.valid_signals()], collector, attributes
before = process()
import common, common.runs
after = process()
for name, was, now in zip(("handlers", "garbage collector", "classes"), before, after):
    if was != now:
        print(name, was if name != "classes" else was.items() ^ now.items(), now if name != "classes" else "")
"""
STOPPED = """
import sys, tempfile, time
from common.cli import run_script
def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        print("at work", flush=True)
        time.sleep(600)
run_script(main)
"""


def test_a_program_of_another_copy_of_the_project_is_refused(tmp_path):
    """Its Python has another `common` installed, whose code would give other results."""
    for name in ("common", "recipes"):
        (tmp_path / name).mkdir()
    (tmp_path / "common" / "cli.py").touch()
    program = tmp_path / "recipes" / "my_recipe.py"
    program.write_text("from common.cli import run_script\nrun_script(lambda: print('trained'))")
    run = run_program(program)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(rf"error: {program}: the package common .* not that of the program; .*{tmp_path}\n", run.stderr)
