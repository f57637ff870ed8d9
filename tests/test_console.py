"""What a person sees: lines that fit the terminal, and never a silence while the program works."""

import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time

from common import console
from common.console import end_status, print_line, say, status, status_line
from common.progress import EpochLine
from common.runs import below_baseline

import keras
import numpy as np
import pytest
from programs import ROOT

CONTROLS = r"\x1b\[[0-9;]*[A-Za-z]"
SENTENCE = "hardware: " + ", ".join(["precision mixed_bfloat16 (Ampere or newer)"] * 4)
CLASSIFIER = {"accuracy": 0.7712, "loss": 0.8123, "val_accuracy": 0.7541, "val_loss": 0.9, "examples_per_second": 2340}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self) -> list[str]:
        """All lines that were ever shown, also those that others have replaced."""
        return [line for line in re.split(r"[\r\n]", re.sub(CONTROLS, "", self.getvalue())) if line]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "shown", True)
    return Terminal()


def test_a_long_line_is_wrapped_between_words_in_a_terminal_only(terminal, capsys):
    with contextlib.redirect_stdout(terminal):
        print_line(SENTENCE)
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 80
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(map(str.strip, lines)) == SENTENCE
    print_line(SENTENCE, sys.stderr)
    assert capsys.readouterr().err == f"{SENTENCE}\n"


def test_a_path_and_a_command_stay_whole(terminal):
    path, command = "/very" * 30, "  tensorboard --logdir " + "run/" * 30
    with contextlib.redirect_stdout(terminal):
        print_line(f"error: {path}: not a folder")
        print_line(command)
    assert path in terminal.getvalue()
    assert command in terminal.getvalue().splitlines()


def test_a_slow_phase_ticks_until_it_ends(terminal):
    third = threading.Event()
    texts = iter(range(1000))

    def text():
        number = next(texts)
        if number == 2:
            third.set()
        return f"evaluating {number}" + " and more" * 20

    with contextlib.redirect_stdout(terminal), status_line(text, interval=0.001):
        assert third.wait(60)
        print_line("a line between")
    ended = terminal.getvalue()
    assert ended.endswith(console._CLEAR)
    lines = terminal.lines()
    assert lines[0].startswith("evaluating 0 and more")
    assert "a line between" in lines
    assert max(map(len, lines)) < 80
    time.sleep(0.01)
    assert terminal.getvalue() == ended
    assert not console._status_lines


def test_the_inner_phase_is_shown_and_then_the_outer_one_again(terminal):
    seen = {"outer": threading.Event(), "inner": threading.Event()}

    def shows(name):
        def text():
            seen[name].set()
            return name

        return text

    with contextlib.redirect_stdout(terminal), status_line(shows("outer"), interval=0.001):
        with status_line(shows("inner"), interval=0.001):
            assert seen["inner"].wait(60)
            seen["outer"].clear()
        assert seen["outer"].wait(60)
        end_status()
    assert terminal.lines()[-1] == "outer"


def test_a_phase_is_a_line_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "shown", True)

    @status("evaluating")
    def evaluate():
        return 3

    assert (evaluate(), evaluate()) == (3, 3)
    assert capsys.readouterr().out == "evaluating\n" * 2
    monkeypatch.setattr(console, "shown", False)
    evaluate()
    say("not with --quiet")
    assert capsys.readouterr().out == ""


def test_a_dumb_terminal_gets_no_control_characters(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(terminal), status("evaluating"):
        print_line("done", bold=True)
    assert terminal.getvalue() == "evaluating\ndone\n"


def epoch_line(logs, epochs=30, phase="", space=79):
    line = EpochLine()
    line.set_params({"verbose": 1, "epochs": epochs, "steps": 351})
    line.on_epoch_begin(epochs - 1)
    line._logs = logs
    return line._line(space, phase)


@pytest.mark.parametrize(
    ("logs", "settings", "expected"),
    [
        (CLASSIFIER, {}, "epoch 30/30  loss 0.8123  accuracy 0.7712  val_accuracy 0.7541  2,340/s  00:00"),
        (
            CLASSIFIER,
            {"space": 1000},
            "epoch 30/30  loss 0.8123  accuracy 0.7712  val_loss 0.9000  val_accuracy 0.7541  2,340/s  00:00",
        ),
        (CLASSIFIER, {"space": 62}, "epoch 30/30  loss 0.8123  val_accuracy 0.7541  2,340/s  00:00"),
        (CLASSIFIER, {"space": 20}, "epoch 30/30  00:00"),
        (
            {"loss": float("nan"), "mae": 123456.789},
            {"epochs": 100, "phase": "350/351"},
            "epoch 100/100  350/351  loss nan  mae 1.235e+05  00:00",
        ),
        ({"loss": 0.00012, "mae": 0.0}, {}, "epoch 30/30  loss 1.200e-04  mae 0.0000  00:00"),
        ({}, {"phase": "compiling"}, "epoch 30/30  compiling  00:00"),
    ],
)
def test_the_line_of_an_epoch(logs, settings, expected):
    assert epoch_line(logs, **settings) == expected


def test_twenty_metrics_fit_into_a_terminal_of_any_width():
    logs = {f"{part}{name}": 0.5 for part in ("", "val_") for name in ("loss", *(f"metric_{n}" for n in range(20)))}
    for space in range(30, 300):
        assert len(epoch_line(logs, space=space)) <= space


def fit(verbose, line):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    data = np.zeros([8, 1], np.float32)
    model.fit(data, data, batch_size=2, epochs=2, validation_data=(data, data), verbose=verbose, callbacks=[line])


def test_training_prints_a_line_per_epoch_and_nothing_of_keras(capsys, monkeypatch):
    monkeypatch.setattr(console, "shown", True)
    fit(1, EpochLine("baseline"))
    begun, *epochs = capsys.readouterr().out.splitlines()
    assert begun == "baseline: epochs 2, steps per epoch 4"
    assert [re.sub(r"[\d.]+(e-\d+)?", "1", line) for line in epochs] == [
        "epoch 1/1  loss 1  mae 1  val_loss 1  val_mae 1  1:1"
    ] * 2
    fit(0, EpochLine("baseline"))
    assert capsys.readouterr().out == ""


def test_training_in_a_terminal_ends_without_a_status_line(terminal):
    with contextlib.redirect_stdout(terminal):
        fit(1, EpochLine())
    first, *_, last = terminal.lines()
    assert first == "training: epochs 2, steps per epoch 4"
    assert re.match(r"epoch 2/2  loss \S+  mae \S+  val_loss \S+  val_mae \S+  \d\d:\d\d$", last)
    assert not console._status_lines


@pytest.mark.parametrize(
    ("baselines", "expected"),
    [
        ({"naive_accuracy": 0.45}, ["below the baseline: accuracy 0.4100 < naive accuracy 0.4500"]),
        ({"naive_accuracy": 0.41}, []),
        ({"ridge_mse": 0.01}, ["below the baseline: mse 0.0200 > ridge mse 0.0100 (lower is better)"]),
        ({"ridge_mse": 0.03, "majority_accuracy": 0.1}, []),
        ({"linear_top_accuracy": 0.5}, []),
    ],
)
def test_a_baseline_that_is_better_is_named(baselines, expected):
    assert below_baseline({"accuracy": 0.41, "top_accuracy": 0.9, "mse": 0.02}, baselines) == expected


@pytest.mark.long
def test_run_sh_in_a_terminal_of_80_columns_wraps_nothing_and_is_never_silent(tmp_path):
    """The whole way of a user, but for the installation of packages."""
    for path in (*ROOT.glob("*.txt"), *(ROOT / name for name in ("pyproject.toml", "recipes"))):
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    flags = ("--data", "sample", "--epochs", "1", "--naive-epochs", "1", "--run-dir", "run")
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    moments, output = [time.monotonic()], b""
    with subprocess.Popen(
        [tmp_path / "scripts" / "run.sh", "cifar10_cnn", *flags],
        **{"cwd": tmp_path, "env": environment, "start_new_session": True},
        **{"stdin": terminal, "stdout": terminal, "stderr": terminal},
    ) as program:
        os.close(terminal)
        try:
            while received := os.read(controller, 65536):
                output += received
                moments.append(time.monotonic())
        except OSError:  # Linux reports the end of a terminal as an error.
            pass
        os.close(controller)
    output = re.sub(CONTROLS, "", output.decode())
    assert program.returncode == 0, output
    lines = [line for line in re.split(r"[\r\n]+", output) if "tensorboard" not in line]  # Its path may be long.
    assert [line for line in lines if len(line) > 80] == []
    for line in (
        "cifar10_cnn: test split of drawn shapes (sample)",
        "training: epochs 1, steps per epoch 17",
        "run directory: run",
    ):
        assert line in lines
    assert max(np.diff(moments)) < 10, "silent for that many seconds"
