"""The scripts that set up, publish and compare."""

import argparse
import contextlib
import errno
import inspect
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from common import records
from common.cli import EXIT_INTERRUPTED

import keras
import numpy as np
import pictures
import publish
import published
import pytest
import tables
from programs import ROOT, run_program
from test_readme import load_script

reproduce, measure = load_script("reproduce"), load_script("measure")


def fake_run(accuracy: float, seed: int) -> dict:
    return {
        "recipe": "mnist_cnn",
        "seed": seed,
        "command": f"python recipes/mnist_cnn.py --data tfds --quiet --epochs 15 --seed {seed}",
        "metrics": {"accuracy": accuracy, "logistic_regression_accuracy": 0.92},
        "seconds": {"total": 110.0 + seed, "evaluate": 8.0},
        "data": {"name": "MNIST", "source": "tfds", "train": 54_000, "validation": 6_000, "test": 10_000},
        "hardware": {"cores": 2, "processor": "Some CPU", "gpus": []},
        "versions": {"tensorflow": "2.21.0", "keras": "3.15.1"},
        "history": [{"val_accuracy": 0.9, "val_loss": 1.0}, {"val_accuracy": 0.95, "val_loss": 0.9}],
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project that the scripts may write to."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for name in publish.PAGES:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(published, "ROOT", tmp_path)
    return tmp_path


def rows(page: pathlib.Path) -> list[str]:
    """The rows of a table of recipes."""
    return [line for line in page.read_text("utf-8").splitlines() if line.startswith("| [`")]


def publish_runs(project: pathlib.Path, runs: list[dict]) -> None:
    code = published.code_sha256(project / "recipes" / "mnist_cnn.py")
    published.write_record("mnist_cnn", {"recipe": "mnist_cnn", "code_sha256": code, "runs": runs})


def test_publishing_writes_mean_and_deviation(project):
    runs = [fake_run(accuracy, seed) for seed, accuracy in enumerate((0.991, 0.993, 0.995))]
    publish_runs(project, runs)
    publish.publish()
    page = (project / "docs" / "results.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| [`mnist_cnn`]")]
    assert row.startswith("| [`mnist_cnn`](../recipes/mnist_cnn.py)<br>`--epochs 15` | ")
    assert "accuracy 99.30 ± 0.20 %" in row
    assert "logistic regression: 92.00 ± 0.00 % (7.30 points below)" in row
    assert "MNIST (tfds): 54,000 train, 6,000 validation, 10,000 test" in row
    assert "| 1.7 min, 2 cores of Some CPU | 0, 1, 2 |" in row
    assert "2 cores of Some CPU, TensorFlow 2.21.0, Keras 3.15.1" in page
    short = "[`mnist_cnn`](recipes/mnist_cnn.py)<br>`--epochs 15`"
    readme, chinese = (rows(project / name) for name in ("README.md", "README.zh-CN.md"))
    assert re.match(
        rf"\| {re.escape(short)} \| .+ \| MNIST \| accuracy 99.30 ± 0.20 %, 3 seeds \| 1.7 min \|$", readme[6]
    )
    assert re.match(
        rf"\| {re.escape(short)} \| .+ \| MNIST \| 准确率 99.30 ± 0.20 %，3 个种子 \| 1.7 min \|$", chinese[6]
    )
    assert [len(readme), len(chinese)] == [len(published.recipe_paths())] * 2
    assert "not yet measured" in readme[0]
    source = (project / "recipes" / "mnist_cnn.py").read_text()
    line = "Result    test accuracy 99.30 ± 0.20 % over 3 seeds, 1.7 min, 2 cores of Some CPU,\n"
    line += "          with --epochs 15\n"
    assert source.count(line) == 1
    assert (project / "results" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = page, source
    publish.publish()
    assert ((project / "docs" / "results.md").read_text(), (project / "recipes" / "mnist_cnn.py").read_text()) == before


def test_on_a_full_disk_what_was_published_stays(project, monkeypatch):
    publish_runs(project, [fake_run(0.99, 0)])
    before = (project / "README.md").read_text()

    write = pathlib.Path.write_bytes

    def write_bytes(path, content):
        if ".png" in path.name:
            return write(path, content)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(pathlib.Path, "write_bytes", write_bytes)
        with pytest.raises(publish.UserError, match=r"README.md.part: No space left on device; make room"):
            publish.publish()
    assert (project / "README.md").read_text() == before


def test_a_record_of_other_code_is_shown_as_stale(project):
    path = project / "recipes" / "mnist_cnn.py"
    publish_runs(project, [fake_run(0.99, 0)])
    changed = path.read_text().replace("# The dataset is shuffled already.", "# Has been shuffled.")
    assert changed != path.read_text()
    path.write_text(changed)
    publish.publish()
    assert not [row for row in rows(project / "docs" / "results.md") if ", stale |" in row]
    assert "†" not in (project / "README.md").read_text("utf-8")
    path.write_text(path.read_text().replace("weight_decay=config.weight_decay", "weight_decay=0.0"))
    publish.publish()
    page = (project / "docs" / "results.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| [`mnist_cnn`]")]
    assert "| 1.7 min, 2 cores of Some CPU, stale | 0 |" in row
    assert "Stale: the recipe has changed since" in page
    readme = (project / "README.md").read_text("utf-8")
    assert "seeds † | 1.7 min |" in readme
    assert "\n† The recipe has changed" in readme
    assert "1.7 min, 2 cores of Some CPU, stale,\n" in path.read_text()


@pytest.mark.long
def test_reproducing_goes_on_where_it_was(project, monkeypatch):
    """A seed that fails leaves those before it done."""
    commands, run_training = [], reproduce.run_training

    def remember(command):
        commands.append(command)
        return run_training(command)

    monkeypatch.setattr(reproduce, "run_training", remember)
    flags = ["--smoke", "--quiet", "--no-baseline"]
    with pytest.raises(SystemExit, match=r"^2$"):
        reproduce.reproduce("linear_regression", [3, -1], flags)
    assert not list((project / "results").iterdir())
    (first,) = (project / "runs" / "reproduce").glob("*/3/result.json")
    trained = json.loads(first.read_text())
    reproduce.reproduce("linear_regression", [3, 5], flags)
    record = json.loads((project / "results" / "linear_regression.json").read_text())
    assert record["runs"][0] == {**trained, "command": record["runs"][0]["command"]}
    assert [run["seed"] for run in record["runs"]] == [3, 5]
    assert ["--resume" in command for command in commands] == [False, False, True, False]
    assert not list((project / "runs" / "reproduce").iterdir())


@pytest.mark.long
def test_no_run_goes_on_with_other_code(project, monkeypatch):
    """Its first part would come from the code before."""
    commands, run_training = [], reproduce.run_training
    flags = ["--smoke", "--quiet", "--no-baseline"]
    with pytest.raises(SystemExit, match=r"^2$"):
        reproduce.reproduce("linear_regression", [3, -1], flags)
    (project / "common").mkdir()
    (project / "common" / "changed.py").write_text("order = 'another'")
    monkeypatch.setattr(reproduce, "run_training", lambda command: commands.append(command) or run_training(command))
    reproduce.reproduce("linear_regression", [3], flags)
    assert ["--resume" in command for command in commands] == [False]


@pytest.mark.long
def test_a_change_while_a_seed_trains_is_noticed(project, monkeypatch):
    """Or the record would hold two codes under one digest."""
    run_training = reproduce.run_training
    (project / "common").mkdir()

    def change(command):
        (project / "common" / "changed.py").write_text("order = 'another'")
        return run_training(command)

    flags = ["--smoke", "--quiet", "--no-baseline"]
    monkeypatch.setattr(reproduce, "run_training", change)
    with pytest.raises(reproduce.UserError, match=r"^seed 3: the code changed during training; "):
        reproduce.reproduce("linear_regression", [3], flags)
    assert not list((project / "results").iterdir())
    assert not list((project / "runs" / "reproduce").glob("*/*"))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_beginning(tmp_path):
    """What changes while a program runs is not what it runs."""
    (tmp_path / "recipe.py").write_text("before")
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "before"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    begun = records.commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", begun)
    (tmp_path / "recipe.py").write_text("after")
    assert records.commit(tmp_path) == begun
    records.commit.cache_clear()
    assert records.commit(tmp_path) == f"{begun}-dirty"


def test_a_damaged_record_is_named_before_the_training(project, monkeypatch):
    (project / "results" / "target.json").write_text("{")
    monkeypatch.setattr(reproduce, "run_training", None)
    with pytest.raises(reproduce.UserError, match=r"target\.json: "):
        reproduce.reproduce("linear_regression", [3], [])


@pytest.mark.long
def test_reproducing_trains_once_per_seed(project):
    flags = ["--smoke", "--quiet", "--no-baseline", "--data-dir", "/some/place"]
    reproduce.reproduce("linear_regression", [3, 5], flags, "short")
    (path,) = (project / "results").iterdir()
    assert path.name == "linear_regression-short.json", "the record of the table stays as it is"
    record = json.loads(path.read_text())
    assert [run["seed"] for run in record["runs"]] == [3, 5]
    assert record["runs"][1]["command"] == (
        "python recipes/linear_regression.py --smoke --quiet --no-baseline --seed 5"
    )
    assert record["runs"][0]["weights_sha256"] != record["runs"][1]["weights_sha256"]
    assert record["runs"][0]["metrics"]["mse"] > 0


@pytest.mark.long
def test_a_recipe_that_fails_publishes_nothing(project):
    with pytest.raises(SystemExit, match=r"^2$"):
        reproduce.reproduce("linear_regression", [0], ["--no-such-flag"])
    assert not list((project / "results").iterdir())


def test_an_unknown_recipe_is_named():
    run = run_program(str(ROOT / "tools" / "reproduce.py"), "no_such_recipe")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no recipe 'no_such_recipe'; choose one of cifar10_cnn, ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("../recipes/mnist_cnn", "no recipe '../recipes/mnist_cnn'; choose one of cifar10_cnn, "),
        ("mnist_cnn --seeds 0 1 0", "--seeds 0 1 0: give each once"),
        ("mnist_cnn --smoke", "--smoke: not allowed for published results; leave it out"),
        ("mnist_cnn --seed=3", "--seed: not allowed for published results; leave it out"),
        ("mnist_cnn --variant ../a", "--variant ../a: give letters, digits, - and _"),
    ],
)
def test_what_can_not_be_published_is_named(project, monkeypatch, words, says):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words.split()])
    with pytest.raises(reproduce.UserError) as error:
        reproduce.main()
    assert str(error.value).startswith(says)
    assert not list((project / "results").iterdir())


@pytest.mark.parametrize("text", ["", "{}", '{"runs": []}', "[]", '{"runs": ', "NaN"])
def test_a_damaged_record_is_named(project, text):
    path = project / "results" / "mnist_cnn.json"
    path.write_text(text)
    before = (project / "README.md").read_text()
    with pytest.raises(publish.UserError, match=r"mnist_cnn\.json: not written by .*; restore it with git"):
        publish.publish()
    assert (project / "README.md").read_text() == before


def test_a_figure_that_is_changed_by_hand_is_not_published(project):
    publish_runs(project, [fake_run(0.99, 0)])
    path = project / "results" / "mnist_cnn.json"
    path.write_text(path.read_text().replace('"accuracy": 0.99,', '"accuracy": 0.999,'))
    before = (project / "README.md").read_text()
    with pytest.raises(publish.UserError, match=r"mnist_cnn\.json: changed since it was written; restore it with git"):
        publish.publish()
    assert (project / "README.md").read_text() == before


def test_a_record_under_another_name_is_not_published(project):
    publish_runs(project, [fake_run(0.99, 0)])
    before = (project / "README.md").read_text()
    (project / "results" / "mnist_cnn.json").rename(project / "results" / "benchmark-mnist_cnn.json")
    with pytest.raises(publish.UserError, match=r"benchmark-mnist_cnn\.json: written under another name; restore it"):
        publish.publish()
    assert (project / "README.md").read_text() == before


@pytest.mark.parametrize("name", publish.PAGES)
def test_a_page_without_its_markers_is_left_alone(project, name):
    page = project / name
    page.write_text(page.read_text("utf-8").replace(publish.END, ""), "utf-8")
    before = page.read_bytes()
    with pytest.raises(publish.UserError, match=rf"{name}: lacks .*; put them where the table"):
        publish.publish()
    assert page.read_bytes() == before


def test_a_project_without_readme_or_result_line_is_left_alone(project):
    readme, path = project / "README.md", project / "recipes" / "mnist_cnn.py"
    path.write_text(path.read_text().replace("Result  ", "Outcome "))
    before = readme.read_text(), path.read_text()
    with pytest.raises(publish.UserError, match=r"mnist_cnn\.py: no line of its docstring begins with 'Result"):
        publish.publish()
    assert (readme.read_text(), path.read_text()) == before
    readme.unlink()
    with pytest.raises(publish.UserError, match=r"README\.md: can't be read \(No such file or directory\); restore it"):
        publish.publish()


def test_runs_with_other_flags_have_their_own_row(project):
    publish_runs(project, [fake_run(0.99, 0)])
    code = published.code_sha256(project / "recipes" / "mnist_cnn.py")
    short = fake_run(0.98, 0) | {"command": "python recipes/mnist_cnn.py --epochs 3 --seed 0"}
    published.write_record("mnist_cnn-short", {"recipe": "mnist_cnn", "code_sha256": code, "runs": [short]})
    publish.publish()
    both = [row for row in rows(project / "docs" / "results.md") if row.startswith("| [`mnist_cnn`]")]
    flags = [row.split("<br>")[1].split(" |")[0] for row in both]
    assert flags == ["`--epochs 15`", "`--epochs 3`"]
    assert ["accuracy 99.00 %" in both[0], "accuracy 98.00 %" in both[1]] == [True, True]
    assert not [row for row in rows(project / "README.md") if "--epochs 3`" in row]
    source = (project / "recipes" / "mnist_cnn.py").read_text()
    assert "          with --epochs 15\n          test accuracy 98.00 % over 1 seeds, " in source
    assert source.count("with --epochs") == 2
    publish.publish()
    assert (project / "recipes" / "mnist_cnn.py").read_text() == source


def test_a_record_of_uncommitted_code_is_shown_as_such(project):
    publish_runs(project, [fake_run(0.99, 0) | {"commit": "1234-dirty"}, fake_run(0.99, 1) | {"commit": "1234"}])
    publish.publish()
    page = (project / "docs" / "results.md").read_text()
    assert "| 1.7 min, 2 cores of Some CPU, uncommitted | 0, 1 |" in page
    assert "\nUncommitted: measured with changes" in page
    assert "2 seeds ‡ |" in (project / "README.md").read_text("utf-8")
    publish_runs(project, [fake_run(0.99, 0) | {"commit": "1234"}, fake_run(0.99, 1) | {"commit": None}])
    publish.publish()
    for name in ("README.md", "docs/results.md"):
        assert not re.findall(r"‡|, uncommitted", (project / name).read_text("utf-8"))


def test_the_curves_show_the_metric_that_a_recipe_is_judged_by(project):
    """A weighted loss is another number."""
    run = fake_run(0.99, 0) | {"metrics": {"mse": 2.0}}
    run["history"] = [{"val_loss": 1.0, "val_mse": 4.0}, {"val_loss": 0.5, "val_mse": 2.0}]
    publish_runs(project, [run])
    (axes,) = pictures.curves().axes
    assert list(axes.lines[0].get_ydata()) == [4.0, 2.0]
    assert axes.get_ylabel() == "validation mean squared error"


def fake_benchmark(project: pathlib.Path, processor: str, to_naive: float) -> None:
    interval = {"median": to_naive, "lowest": to_naive - 0.1, "highest": to_naive + 0.1}
    record = {
        "recipe": "mnist_cnn",
        "code_sha256": published.code_sha256(project / "recipes" / "mnist_cnn.py"),
        "precision": "float32",
        "examples_per_second": {"naive": 1000.0, "recipe": 1000 * to_naive},
        "rounds": [
            {"naive": {"examples_per_second": 1000.0}, "recipe": {"examples_per_second": 1000 * (to_naive + offset)}}
            for offset in (-0.1, 0.0, 0.1)
        ],
        "to_naive": interval,
        "to_pytorch": None,
        "better_pytorch": None,
        "to_no_callbacks": {"median": 0.98, "lowest": 0.97, "highest": 0.99},
        "share_of_peak": 0.5,
        "peak_flops": 4e11,
        "first_step_seconds": {"recipe": 5.0},
        "data": {"name": "MNIST", "source": "tfds"},
        "hardware": {"cores": 2, "processor": processor, "gpus": []},
    }
    published.write_record(published.benchmark_name(record), record)


def test_each_machine_has_its_own_benchmarks(project):
    fake_benchmark(project, "Another(R) CPU", 1.5)
    fake_benchmark(project, "Some CPU", 1.2)
    path = project / "recipes" / "mnist_cnn.py"
    names = [each.name for each in sorted((project / "results").glob("*.json"))]
    assert names == [f"benchmark-mnist_cnn-float32-2-cores-of-{each}-cpu.json" for each in ("another", "some")]
    publish.publish()
    lines = (project / "docs" / "benchmarks.md").read_text().splitlines()
    rest = "| not measured | 50 % of 400 GFLOPS | 5.0 s "
    for machine, row in (
        ("Another(R) CPU", f"| `mnist_cnn` | 1,500 | 1.50 (1.40 to 1.60) {rest}"),
        ("Some CPU", f"| `mnist_cnn` | 1,200 | 1.20 (1.10 to 1.30) {rest}"),
    ):
        assert lines[lines.index(f"On 2 cores of {machine}:") + 4] == f"{row}| 2.0 % (1.0 to 3.0) |"
    assert "with minimum and maximum of 3 rounds in parentheses. " in "".join(lines)
    assert (project / "results" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    middles = {axes.get_title(): axes.containers[0].lines[0].get_xdata() for axes in pictures.speeds().axes}
    assert middles == {"2 cores of Another(R) CPU": [1.5], "2 cores of Some CPU": [1.2]}
    path.write_text(path.read_text().replace("weight_decay=config.weight_decay", "weight_decay=0.0"))
    publish.publish()
    assert (project / "docs" / "benchmarks.md").read_text().count("| `mnist_cnn`, stale | ") == 2


def test_a_benchmark_below_what_is_aimed_at_is_marked(project):
    fake_benchmark(project, "Some CPU", 1.2)
    publish.publish()
    page = project / "docs" / "benchmarks.md"
    assert tables.BELOW not in page.read_text()
    fake_benchmark(project, "Some CPU", 1.19)
    publish.publish()
    text = page.read_text()
    assert "| 1.19 (1.09 to 1.29) ▼ | not measured | 50 % of 400 GFLOPS | 5.0 s | 2.0 % (1.0 to 3.0) |" in text
    assert "\n▼: below the target." in text


def test_processors_of_one_name_that_differ_in_bfloat16_are_told_apart():
    machine = {"cores": 2, "processor": "AMD EPYC", "gpus": []}
    for more, said in (({}, ""), ({"bfloat16": True}, ""), ({"bfloat16": False}, " without bfloat16")):
        assert published.machine_of({"hardware": machine | more}) == f"2 cores of AMD EPYC{said}"


FIXED = '''\
"""A docstring."""

import math as mathematics


class One(dict):
    """Another."""

    two: int = 3

    def three(self, *others: int, **named: float) -> str | None:
        # A comment.
        return f"{self.two!r:>8} and {mathematics.pi * 2:.3f}" if others else None
'''


def test_the_code_is_the_same_to_all_versions_of_python(tmp_path):
    """Those that are installed here, and what 3.11, 3.12 and 3.13 said: another digest would call each record stale."""
    fixed = tmp_path / "fixed.py"
    fixed.write_text(FIXED)
    assert published.code_sha256(fixed) == "6c369a4aea7b500ac9d635e6fecb9575926b038f2fb434841da8d60ec8466502"
    others = [found for minor in range(11, 20) if (found := shutil.which(f"python3.{minor}"))]
    program = f"import ast, hashlib, pathlib, sys\nfrom typing import Any\n{inspect.getsource(published.code_sha256)}"
    program += "print(code_sha256(pathlib.Path(sys.argv[1])))"
    path = ROOT / "recipes" / "distillation.py"
    for python in [sys.executable, *others]:
        found = subprocess.run([python, "-c", program, str(path)], capture_output=True, text=True, check=False)
        if found.returncode == 0:  # A shim may stand for nothing.
            assert found.stdout.strip() == published.code_sha256(path), python


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.long
def test_a_reproduction_that_is_told_to_end_saves_first(tmp_path, number):
    """SIGINT goes to all processes, as Ctrl-C does, SIGTERM to the one that was started."""
    for name in ("recipes", "scripts", "tools", "common"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "tools/reproduce.py", "linear_regression", "--epochs", "100000", "--no-baseline"]
    with subprocess.Popen(
        [*command, "--seeds", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not list(tmp_path.glob("runs/reproduce/*/3/checkpoints/epoch*")) and process.poll() is None:
                time.sleep(0.1)
            os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
            _, errors = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "interrupted: " in errors
    assert errors.endswith("reproduce: repeat the same command to continue\n")
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    "words",
    ["target --rounds 0", "mnist_cnn --rounds -1", "target --naive-epochs 0", "target --precision mixed_bfloat16"],
)
def test_a_benchmark_of_nothing_is_refused(words, monkeypatch):
    benchmark = load_script("benchmark")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    with pytest.raises(benchmark.UserError, match=words.split()[1]):
        benchmark.main()


@pytest.mark.slow
def test_benchmark_measures_all_ways_in_fresh_processes():
    before = set((ROOT / "results").glob("*"))
    run = run_program(str(ROOT / "tools" / "benchmark.py"), "mnist_cnn", "--data", "sample", "--smoke", "--rounds", "1")
    assert run.returncode == 0, run.stderr
    figures = dict(line.split(": ", 1) for line in run.stdout.splitlines() if line.count(": ") >= 1)
    (first_round,) = [
        line for line in run.stdout.splitlines() if line.startswith("round 1, examples per second: naive ")
    ]
    assert ", recipe " in first_round
    assert 0 < json.loads(figures["to no callbacks"])["median"] < 1
    speeds = json.loads(figures["examples per second"])
    assert json.loads(figures["to naive"])["median"] == pytest.approx(speeds["recipe"] / speeds["naive"])
    # Convolutions 3x3 of 1 to 32 filters on 26x26 places and of 32 to 64 on 11x11, then 1600 to 128 to 10.
    forwards = [2 * 9 * 32 * 26**2, 2 * 9 * 32 * 64 * 11**2, 2 * 1600 * 128, 2 * 128 * 10]
    assert json.loads(figures["training flops per example"]) == 3 * sum(forwards) - forwards[0]
    share = 3 * sum(forwards) - forwards[0]
    share *= speeds["recipe"] / json.loads(figures["peak flops"])
    assert json.loads(figures["share of peak"]) == pytest.approx(share)
    assert min(json.loads(figures["first step seconds"]).values()) > 1
    assert set((ROOT / "results").glob("*")) == before


def test_no_operations_are_counted_for_frozen_layers_or_the_gradient_below_them():
    images = keras.Input((None, None, 3))
    frozen = keras.layers.Conv2D(24, 2, trainable=False)
    x = keras.layers.Conv2D(8, 3, padding="same")(frozen(images))
    model = keras.Model(images, keras.layers.Dense(5)(keras.layers.GlobalMaxPooling2D()(x)))
    expected = 2 * 4 * 3 * 24 * 9**2 + 2 * (2 * 9 * 24 * 8 * 9**2) + 3 * (2 * 8 * 5)
    assert measure.training_flops(model, (10, 10, 3)) == expected


def test_the_clock_leaves_out_the_first_execution():
    clock = measure.Clock(10)
    for _ in range(2):
        for last in (31, 63):
            clock.on_train_batch_end(last)
        clock.on_epoch_end(0)
    with pytest.raises(measure.MeasuredError):
        clock.on_train_end()
    assert clock.batches == 96
    assert clock.figures()["examples_per_second"] == pytest.approx(960 / clock.seconds)


def test_the_target_clock_stops_at_the_target():
    class Model:
        stop_training = False

    clock = measure.TargetClock(0.7)
    clock.set_model(Model())
    clock.on_train_begin()
    for epoch, accuracy in enumerate((0.5, 0.71)):
        assert not clock.model.stop_training
        clock.on_epoch_end(epoch, {"val_accuracy": accuracy})
    assert clock.reached
    assert clock.model.stop_training
    assert clock.seconds > 0


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_run_sh_says_how_it_is_used(flag):
    run = subprocess.run([ROOT / "scripts" / "run.sh", flag], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("scripts/run.sh NAME [FLAGS]")
    assert " mnist_cnn " in run.stdout


@pytest.mark.parametrize("name", ["nothing", "../scripts/doctor"])
def test_run_sh_names_the_recipes(name):
    run = subprocess.run([ROOT / "scripts" / "run.sh", name], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    names = " ".join(sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
    assert run.stderr == f"error: no recipe {name!r}; choose one of: {names}\n"


@pytest.fixture
def fake_python(tmp_path):
    """A Python that makes virtual environments whose pip only writes down what it was asked for."""
    log = tmp_path / "pip.log"
    inner = f"""#!/bin/sh
case "$*" in
    "-m pip"*) echo "$*" >>{log}; exit "${{PIP_EXIT:-0}}" ;;
    *recipes*|*pytest*) echo "started $*" ;;
esac
"""
    outer = f"""#!/bin/sh
case "$*" in
    *venv*) for last; do :; done; mkdir -p "$last/bin"; cp {tmp_path}/inner "$last/bin/python" ;;
    --version) echo "Python 3.11.0" ;;
esac
"""
    for name, text in (("inner", inner), ("python", outer)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "python", log


def test_set_up_installs_once_and_again_when_requirements_change(tmp_path, fake_python):
    python, log = fake_python
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    shutil.copytree(ROOT / "recipes", checkout / "recipes")
    for path in (*ROOT.glob("*.txt"), ROOT / "pyproject.toml"):
        shutil.copy(path, checkout)

    def start(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [checkout / "scripts" / script, *words],
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHON": str(python), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    failed = start("run.sh", "mnist_cnn", PIP_EXIT="1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install requirements.txt")
    assert installs(log) == ["requirements.txt"]

    first = start("run.sh", "mnist_cnn", "--epochs", "3")
    assert first.stdout == f"started {checkout}/recipes/mnist_cnn.py --epochs 3\n"
    assert start("run.sh", "mnist_cnn.py").returncode == 0
    assert installs(log) == ["requirements.txt"] * 2

    assert start("test.sh", "-x").stdout == "started -m pytest -x\n"
    assert installs(log) == ["requirements.txt"] * 2 + ["requirements-dev.txt"]

    with open(checkout / "pyproject.toml", "a") as project:
        project.write("# another package\n")
    assert start("run.sh", "mnist_cnn").returncode == 0
    assert installs(log)[3:] == ["requirements.txt"]


def installs(log: pathlib.Path) -> list[str]:
    lines = log.read_text().splitlines()
    assert all("--constraint constraints.txt" in line for line in lines)
    return [line.split("--requirement ")[1].split()[0] for line in lines]


# XLA, which --deterministic excludes: and so does what the tests of this process have in common.
@pytest.mark.filterwarnings("ignore:Model doesn't support `jit_compile=True`")
@pytest.mark.parametrize("name", ["cifar10_cnn", "mnist_cnn", "text_classifier", "dense_regression"])
def test_the_pytorch_twin_computes_what_the_recipe_does(tmp_path, monkeypatch, name):
    """The probabilities of the twin's softmax, from the described network and weights."""
    torch = pytest.importorskip("torch", reason="requirements-benchmark.txt is not installed")
    twin, models = load_script("pytorch_twin"), []
    describe = measure.describe
    monkeypatch.setattr(measure, "describe", lambda model, *others: (models.append(model), describe(model, *others)))
    options = {"recipe": name, "way": "describe", "data": "sample", "data_dir": "", "smoke": True, "seed": 0}
    options["precision"] = "float32"
    arguments = argparse.Namespace(**options)
    measure.measure(arguments, tmp_path)
    described = json.loads((tmp_path / "network.json").read_text())
    with np.load(tmp_path / "arrays.npz") as arrays:
        network = twin.build(described["layers"], [arrays[f"weight_{each}"] for each in range(described["weights"])])
        inputs = arrays["inputs"][:20]
    network.eval()
    with torch.no_grad():
        given = torch.from_numpy(inputs)
        answers = network(given.permute(0, 3, 1, 2) if given.ndim == 4 else given)
    if described["loss"] != "mse":
        answers = answers.softmax(dim=1)
    np.testing.assert_allclose(answers.numpy(), models[0](inputs).numpy(), atol=1e-4)
