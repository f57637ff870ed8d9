"""What takes many processes or many fits: kills at random moments, and memory."""

import itertools
import json
import sys

import pytest
import torture
from conftest import ROOT, run_program
from worker import SMALL

SHORT = ("--", "--smoke", "--data", "sample", "--batch-size", "8", "--checkpoint-every", "2", "--no-baseline")


def test_killed_again_and_again(recipe, monkeypatch, capsys):
    """The quick part of tools/torture.py, for every recipe; in this process, as TensorFlow takes long to import."""
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.get(recipe.__name__, {}).items()]
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


def test_ten_fits_in_one_process_keep_no_memory(tmp_path):
    """Each a run of its own; what the first two leave behind are caches.

    Counted is what is in use: the process's size also holds what the allocator keeps for later, which jumps.
    """
    run = run_program("-c", TEN_FITS, str(tmp_path), cwd=ROOT / "tests")  # Where it finds conftest.
    assert run.returncode == 0, run.stderr
    sizes, objects = zip(*json.loads(run.stdout.splitlines()[-1]), strict=True)
    growth = sorted(later - earlier for earlier, later in itertools.pairwise(sizes[2:]))
    # MiB for each fit; the graph of one would be 10. But for one fit: a buffer for all that follow may come late.
    assert sum(growth[:-1]) / 6 < 0.2, sizes
    assert (objects[-1] - objects[2]) / 7 < 100, objects


TEN_FITS = """
import ctypes, gc, json, pathlib, sys
from conftest import load_recipe, smoke_config, smoke_data
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in fields.split()]
mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Allocated
recipe, data, kept = load_recipe("mnist_cnn"), smoke_data("mnist_cnn"), []
for number in range(10):
    recipe.train(smoke_config(recipe, pathlib.Path(sys.argv[1]) / str(number)), data)
    gc.collect()
    allocated = mallinfo()
    kept.append(((allocated.uordblks + allocated.hblkhd) / 2**20, sys.getallocatedblocks()))
print(json.dumps(kept))
"""
