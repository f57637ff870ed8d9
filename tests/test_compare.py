"""A row per run: what differs is shown, what the runs share is not."""

import io
import math
import shutil

from common.cli import UserError
from common.evaluation import figure_png
from common.records import read_run

import pytest
import rich.console
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


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]


def test_all_runs_below_runs(folder):
    run = run_program(str(ROOT / "scripts" / "compare.py"), cwd=folder, COLUMNS="200")
    assert (run.returncode, run.stderr) == (0, "")
    first, _, header, _, *lines = run.stdout.splitlines()
    assert first == "linear_regression: 2 runs on noisy line (generated)"
    assert cells(header)[:2] == ["run", "--seed"]
    assert [cells(line)[:2] for line in lines[:2]] == [["seed 0", "0"], ["seed 1", "1"]]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_narrow_terminal_gets_several_tables_with_whole_words(folder):
    runs = {name: read_run(folder / "runs" / "linear_regression" / name) for name in ("seed 0", "seed 1")}
    values = compare.rows(runs)
    console = rich.console.Console(width=50, file=io.StringIO())
    tables = compare.tables(values, 50)
    console.print(*tables)
    lines = console.file.getvalue().splitlines()
    assert len(tables) > 1
    assert max(map(len, lines)) <= 50
    assert sum(line.startswith("│ seed 1 ") for line in lines) == len(tables)
    words = {word for line in lines for cell in cells(line) for word in cell.split()}
    assert {word for column in values["seed 0"] for word in column.replace("_", " ").split()} <= words
    assert len(compare.tables(values, 300)) == 1


def test_the_figures_are_those_of_the_results(folder):
    runs = {path.name: read_run(path) for path in sorted((folder / "runs" / "linear_regression").iterdir())}
    compared = list(compare.rows(runs).values())
    assert [row["--seed"] for row in compared] == [0, 1]
    for row, run in zip(compared, runs.values(), strict=True):
        assert {name: row[name] for name in run["metrics"]} == run["metrics"]
        assert row["parameters"] == 3
        assert not row.keys() & {"recipe", "data", "--epochs", "--run-dir"}  # They are equal, or do not matter.
    figure = compare.curves(runs)
    assert [chart.get_title() for chart in figure.axes] == ["loss"]
    for style, prefix in (("--", ""), ("-", "val_")):
        lines = [line for line in figure.axes[0].lines if line.get_linestyle() == style]
        assert [list(line.get_ydata()) for line in lines] == [
            [epoch[f"{prefix}loss"] for epoch in run["history"]] for run in runs.values()
        ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["train", "validation", "seed 0: --seed 0", "seed 1: --seed 1"]
    train, validation, *drawn = legend.legend_handles
    assert (train.get_linestyle(), validation.get_linestyle()) == ("--", "-")
    assert [handle.get_color() for handle in drawn] == [line.get_color() for line in lines]


def made_up(recipe: str, metrics: dict[str, float], history: dict[str, float], **settings) -> dict:
    run = {"recipe": recipe, "data": {"name": "made up", "source": "generated"}, "config": settings}
    run |= {"metrics": metrics, "parameters": 1, "seconds": {"train": 1.0}, "examples_per_second": None}
    return {**run, "history": [history]}


RUNS = {
    "a": made_up("one", {"accuracy": 0.5, "loss": 1.0}, {"loss": 1.0, "accuracy": 0.1, "val_accuracy": 0.2}, seed=0),
    "b": made_up("one", {"accuracy": math.nan, "loss": 0.9}, {"loss": 2.0}, seed=1, quiet=True),
    "c": made_up("two", {"mse": 2.0}, {"loss": 3.0, "val_loss": 3.0}, seed=2, width=[4, 5]),
    "d": made_up("one", {"accuracy": 0.75, "loss": 1.5}, {"loss": 1.0}, seed=1),
}


@pytest.mark.parametrize(
    ("column", "names"),
    [("accuracy", "dabc"), ("loss", "badc"), ("seed", "abdc"), ("--seed", "abdc"), ("recipe", "abdc"), ("mse", "cabd")],
)
def test_the_best_comes_first_and_what_has_no_value_last(column, names):
    assert "".join(compare.sort(RUNS, column)) == names


def test_an_unknown_column_names_the_known_ones():
    known = "recipe, seed, width, accuracy, loss, mse, parameters, training_seconds, examples_per_second"
    with pytest.raises(UserError) as refused:
        compare.sort(RUNS, "speed")
    assert str(refused.value) == f"--sort speed: not a column of the table; choose one of {known}"


def test_recipes_with_settings_of_their_own():
    assert compare.differing(RUNS)["c"] == {"recipe": "two", "--seed": 2, "--width": [4, 5]}
    assert compare.differing(RUNS)["d"] == {"recipe": "one", "--seed": 1}
    assert compare.heading(RUNS) == "one, two: 4 runs on made up (generated)"
    assert [list(runs) for runs in compare.by_recipe(RUNS)] == [["a", "b", "d"], ["c"]]
    figure = compare.curves(RUNS)
    assert {axes.get_title(): len(axes.lines) for axes in figure.axes} == {"loss": 5, "accuracy": 2}


def test_the_lines_of_many_runs_have_different_colors():
    figure = compare.curves({f"run {number}": RUNS["a"] for number in range(40)})
    assert len({line.get_color() for line in figure.legends[0].legend_handles}) == 41
    assert len(figure_png(figure)) > 1000


def test_what_cannot_be_compared_is_named(folder, tmp_path):
    program = str(ROOT / "scripts" / "compare.py")
    one = str(folder / "runs" / "linear_regression" / "seed 0")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").touch()
    for words, named in (
        ((), "runs: no finished runs"),
        ((str(tmp_path),), "result.json: can't be read (No such file or directory)"),
        ((str(begun),), "begun: a run that is not finished; continue it with --resume, or name another"),
        ((one, "--recipe", "mnist_cnn"), "no finished runs of this recipe; there are runs of linear_regression"),
        ((one, "--sort", "speed"), "--sort speed: not a column of the table; choose one of mse, mae, r2, "),
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
