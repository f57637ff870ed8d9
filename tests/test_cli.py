import dataclasses
import errno
import shlex
import signal
import subprocess
import sys

from common.cli import (
    EXIT_INTERRUPTED,
    STOPPING,
    Count,
    Share,
    SharedConfig,
    TrainingFailedError,
    UserError,
    field_comments,
    parse_config,
    run_recipe,
)

import pytest
from conftest import run_program


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
    ("raised", "code", "line"),
    [
        (UserError("file.csv: no rows;\nadd some"), 2, "error: file.csv: no rows; add some\n"),
        (TrainingFailedError("the loss is nan"), 3, "training failed: the loss is nan\n"),
        (KeyboardInterrupt("saved in run"), 75, "interrupted: saved in run\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "x.npz"),
            2,
            "error: x.npz: Read-only file system; make room, or choose a place that can be written to\n",
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
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("number", STOPPING)
def test_a_script_that_is_stopped_leaves_nothing_behind(number, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # What a shell starts in the background ignores it.
    words = [sys.executable, "-c", STOPPED, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout.readline() == "at work\n", script.stderr.read()
        script.send_signal(number)
        assert script.stderr.read() == "interrupted\n"
    assert script.returncode == EXIT_INTERRUPTED
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("module", ["tensorflow.python", "sklearn.metrics"])
def test_a_program_that_is_stopped_while_it_imports_says_so(module, number, tmp_path):
    """Within the import of TensorFlow, when its native messages are held back, and behind it."""
    (tmp_path / "program.py").write_text(STOPPED_IN_AN_IMPORT)
    run = run_program("program.py", module, str(int(number)), cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (EXIT_INTERRUPTED, "", "interrupted before it had begun\n")


def test_signals_of_what_is_no_program_of_ours_are_left_alone():
    """As in a notebook, or where a test imports a recipe."""
    words = "import signal, common; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    run = run_program("-c", words)
    assert (run.stdout, run.stderr) == ("True\n", "")


def test_a_script_whose_reader_has_seen_enough_says_nothing():
    words = "from common.cli import run_script; run_script(lambda: print('x' * 1_000_000))"
    command = f'{shlex.quote(sys.executable)} -c "{words}" | head -c 1; echo " ${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == (f"x {128 + signal.SIGPIPE}\n", "")


def test_a_recipe_whose_reader_has_seen_enough_can_be_resumed():
    train = "lambda config: [print('x' * 1_000_000) for _ in range(3)]"
    words = f"from common.cli import SharedConfig, run_recipe; run_recipe({train}, SharedConfig)"
    command = f'{shlex.quote(sys.executable)} -c "{words}" | head -c 1; echo " ${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stdout == f"x {EXIT_INTERRUPTED}\n"
    assert run.stderr == ("interrupted: nobody reads the output any more; the same command with --resume goes on\n")


def test_a_script_on_a_full_disk_says_so_in_one_line():
    words = "from common.cli import run_script; run_script(lambda: print('x' * 1_000_000))"
    command = f'{shlex.quote(sys.executable)} -c "{words}" > /dev/full'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: output: No space left on device; make room, or choose a place that can be written to\n"


STOPPED_IN_AN_IMPORT = """
import importlib.abc, os, sys
class Stop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), int(sys.argv[2]))
sys.meta_path.insert(0, Stop())
from common.evaluation import Report
print("not to be reached")
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
