"""Trainings that are killed at random moments."""

import sys

import pytest
import torture
from conftest import small_flags
from programs import run_program

pytestmark = pytest.mark.long
SHORT = ("--", "--smoke", "--data", "sample", "--batch-size", "8", "--checkpoint-every", "2", "--no-baseline")


def test_killed_again_and_again(recipe, monkeypatch, capsys):
    """The quick part of tools/torture.py, for every recipe; in this process, as TensorFlow takes long to import."""
    small = small_flags(recipe.__name__)
    monkeypatch.setattr(sys, "argv", ["torture.py", recipe.__name__, "--kills", "3", *SHORT, *small])
    with pytest.raises(SystemExit) as ended:
        torture.main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.out + printed.err
    assert "3 x KILL (1 inside a checkpoint write)" in printed.out
    assert "identical to the run left alone" in printed.out


def test_asked_again_and_again_to_stop():
    run = run_program("tools/torture.py", "text_classifier", "--kills", "3", "--signal", "TERM", *SHORT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 x TERM" in run.stdout


@pytest.mark.parametrize(("workers", "signal"), [("2", "STOP"), ("3", "KILL")])
def test_a_worker_of_a_group_is_lost(workers, signal):
    flags = ["--workers", workers, "--kills", "1", "--signal", signal, *SHORT, "--batch-size", "6"]
    run = run_program("tools/torture.py", "dense_classifier", *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"1 x {signal} (of {workers} workers)" in run.stdout
    assert "identical to the run left alone; slowest exit" in run.stdout
