"""Runs beside each other: what differs is shown, what they share is not."""

import shutil

from common.records import read_run

import pytest
from conftest import load_recipe, smoke_config
from programs import ROOT, run_program
from test_readme import load_script

compare = load_script("compare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    recipe = load_recipe("linear_regression")
    for seed in (0, 1):
        config = smoke_config(recipe, folder / "runs" / "linear_regression" / f"seed {seed}", seed=seed)
        recipe.train(config)
    return folder


def test_all_runs_below_runs(folder):
    run = run_program(str(ROOT / "scripts" / "compare.py"), cwd=folder, COLUMNS="200")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert "runs/linear_regression/seed 0" in run.stdout
    (seed,) = [line for line in lines if "--seed" in line]
    assert [cell.strip() for cell in seed.strip("│").split("│")] == ["--seed", "0", "1"]
    assert not [line for line in lines if "--epochs" in line or "--run-dir" in line]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_are_those_of_the_results(folder):
    runs = {str(path): read_run(path) for path in sorted((folder / "runs" / "linear_regression").iterdir())}
    compared = list(compare.rows(runs).values())
    assert [row["--seed"] for row in compared] == [0, 1]
    for row, run in zip(compared, runs.values(), strict=True):
        assert {name: row[name] for name in run["metrics"]} == run["metrics"]
        assert (row["parameters"], row["data"]) == (3, "noisy line (generated)")
    axes = compare.curves(runs).axes
    assert [chart.get_title() for chart in axes] == ["loss", "mae"]
    solid = [line.get_ydata() for line in axes[0].lines if line.get_linestyle() == "-"]
    assert [list(values) for values in solid] == [
        [epoch["val_loss"] for epoch in run["history"]] for run in runs.values()
    ]


def test_what_cannot_be_compared_is_named(folder, tmp_path):
    program = str(ROOT / "scripts" / "compare.py")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").touch()
    for words, named in (
        ((), "runs: no finished runs"),
        ((str(tmp_path),), "result.json: can't be read (No such file or directory)"),
        ((str(begun),), "begun: a run that is not finished; continue it with --resume, or name another"),
    ):
        run = run_program(program, *words, cwd=tmp_path)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
        assert named in run.stderr
    shutil.copytree(folder / "runs", tmp_path / "runs")
    run = run_program(program, "-o", str(tmp_path / "no" / "x.png"), cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert "can't be written (No such file or directory)" in run.stderr
    run = run_program(program, "-o", "x.pdf", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (2, "error: -o x.pdf: give a name that ends in .png\n")


FULL = """
import pathlib, runpy, sys
def write(path, content, **named):
    with open(path, "wb") as file:
        file.write(b"the beginning")
    raise OSError(28, "No space left on device", str(path))
pathlib.Path.write_bytes = pathlib.Path.write_text = write
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_on_a_full_disk_nothing_half_written_is_left(folder, tmp_path):
    """The picture that was there stays."""
    (tmp_path / "full.py").write_text(FULL)
    (tmp_path / "before.png").write_bytes(b"before")
    words = (str(folder / "runs" / "linear_regression" / "seed 0"), "-o", "before.png")
    run = run_program("full.py", str(ROOT / "scripts" / "compare.py"), *words, cwd=tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert "can't be written (No space left on device)" in run.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["before.png", "full.py"]
    assert (tmp_path / "before.png").read_bytes() == b"before"
