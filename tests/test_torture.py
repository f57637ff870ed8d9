"""Trainings that are killed: inside a checkpoint write, again and again, and one worker out of several."""

import json
import signal
import sys

import pytest
import torture
from conftest import RECIPES, short_set, small_flags
from programs import run_program, start_program

SHORT = ("--", "--smoke", "--data", "sample", "--batch-size", "8", "--checkpoint-every", "2", "--no-baseline")
TIMED = ("seconds", "examples_per_second")


@short_set("linear_regression", slow=["quantization"])
def test_killed_in_a_checkpoint_write_and_resumed(recipe, finished_run, tmp_path):
    """Ends like the run that nobody killed."""
    name = recipe.__name__
    printed, directory = finished_run(name)
    command = [*printed.args, "--resume", "--checkpoint-every", "1", "--no-baseline"]
    command[0] = str(recipe.__file__)
    killed = run_program(torture.__file__, "victim", "1", *command, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = run_program(*command, cwd=tmp_path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    results = [json.loads((folder / "result.json").read_text()) for folder in (directory, tmp_path / "run")]
    histories = [
        [{key: value for key, value in epoch.items() if key not in TIMED} for epoch in result["history"]]
        for result in results
    ]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert histories[0] == histories[1]
    curves = [torture.curves(folder / "tensorboard") for folder in (directory, tmp_path / "run")]
    curves = [[point for point in points if point[1].startswith(("train/", "validation/"))] for points in curves]
    assert curves[0] == curves[1] != []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param("mnist_cnn", "KILL", marks=pytest.mark.long),
        pytest.param("text_classifier", "TERM", marks=pytest.mark.long),
        *(pytest.param(name, "KILL", marks=pytest.mark.slow) for name in RECIPES if name != "mnist_cnn"),
    ],
)
def test_struck_again_and_again(name, number, monkeypatch, capsys):
    """The quick part of tools/torture.py."""
    flags = ["--kills", "3", "--signal", number, *SHORT, *small_flags(name)]
    monkeypatch.setattr(sys, "argv", ["torture.py", name, *flags])
    with pytest.raises(SystemExit) as ended:
        torture.main(start_program)
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.out + printed.err
    assert f"3 x {number}" in printed.out
    assert "identical to the run left alone" in printed.out


@pytest.mark.parametrize(
    ("workers", "signal"),
    [pytest.param("2", "STOP", marks=pytest.mark.slow), pytest.param("3", "KILL", marks=pytest.mark.long)],
)
def test_a_worker_of_a_group_is_lost(workers, signal):
    flags = ["--workers", workers, "--kills", "1", "--signal", signal, *SHORT, "--batch-size", "6"]
    run = run_program("tools/torture.py", "dense_classifier", *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"1 x {signal} (of {workers} workers)" in run.stdout
    assert "identical to the run left alone; slowest exit" in run.stdout
