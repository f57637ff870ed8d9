"""What takes many processes or many fits: kills at random moments, and memory."""

import json

import pytest
from conftest import ROOT, run_program

SMALL = ("--", "--smoke", "--data", "sample", "--batch-size", "90", "--checkpoint-every", "2")


def test_killed_again_and_again(recipe):
    """The quick part of scripts/torture.py, for every recipe."""
    run = run_program("scripts/torture.py", recipe.__name__, "--kills", "3", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 x KILL (1 inside a checkpoint write)" in run.stdout
    assert "identical to the run left alone" in run.stdout


def test_asked_again_and_again_to_stop():
    run = run_program("scripts/torture.py", "text_classifier", "--kills", "3", "--signal", "TERM", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 x TERM" in run.stdout


@pytest.mark.parametrize(("workers", "signal"), [("2", "STOP"), ("3", "KILL")])
def test_a_worker_of_a_group_is_lost(workers, signal):
    flags = ["--workers", workers, "--kills", "1", "--signal", signal, *SMALL]
    run = run_program("scripts/torture.py", "dense_classifier", *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"1 x {signal} (of {workers} workers)" in run.stdout
    assert "identical to the run left alone; slowest exit" in run.stdout


def test_ten_fits_in_one_process_keep_no_memory(tmp_path):
    """Each a run of its own; what the first two leave behind are caches."""
    run = run_program("-c", TEN_FITS, str(tmp_path), cwd=ROOT / "tests")  # Where it finds conftest.
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout.splitlines()[-1])
    assert sum(grown[3:]) / len(grown[3:]) < 1, grown


TEN_FITS = """
import ctypes, gc, json, pathlib, sys
from conftest import load_recipe, smoke_config, smoke_data
recipe, data, sizes = load_recipe("mnist_cnn"), smoke_data("mnist_cnn"), []
for number in range(10):
    recipe.train(smoke_config(recipe, pathlib.Path(sys.argv[1]) / str(number)), data)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20)
print(json.dumps([after - before for before, after in zip([0, *sizes], sizes)]))
"""
