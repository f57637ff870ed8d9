"""The README's commands run, and its figures are those of results/."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from common.records import load_program

import numpy as np
import pandas as pd
import publish
import pytest
import tables
from conftest import RECIPES
from PIL import Image
from programs import ROOT, run_program

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PROGRAMS = [each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "saved_model" in each]
QUICK = ("--smoke", "--no-baseline")
# What is appended to a command so that it takes seconds; the rest of it runs as it is written.
SHORTENED = {
    "scripts/run.sh": lambda words: [] if "--help" in words else QUICK,
    ".venv/bin/python": lambda words: (
        ["--rounds", "1"] if "ship" in words[1] else QUICK if "recipes/" in words[1] or "--" in words else []
    ),
    "scripts/test.sh": lambda words: [
        "--collect-only",
        "--quiet",
        "tests/test_gpu.py" if "gpu" in words else "tests/test_cli.py",
    ],
    ".venv/bin/tensorboard": lambda words: ["--inspect"],
}
# What only a cluster has: tests/test_multiworker.py runs the script under a stand-in, and checks the manifest.
OF_A_CLUSTER = {"sbatch", "kubectl"}
# Publishing takes an hour and writes into the project: tests/test_scripts.py runs these on copies.
ELSEWHERE = {"tools/reproduce.py", "tools/benchmark.py", "tools/publish.py"}


def load_script(name: str):
    (path,) = (path for folder in ("scripts", "tools") for path in (ROOT / folder).glob(f"{name}.py"))
    return load_program(path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a user's own files beside it, and this environment as its `.venv`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "templates", "scripts", "tools", "common", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)
    (folder / ".venv" / "installed").mkdir(parents=True)
    for path in pathlib.Path(sys.prefix).iterdir():
        if path.name != "installed":
            (folder / ".venv" / path.name).symlink_to(path)
    # Nothing to install: that is the business of tests/test_scripts.py.
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"):
        note = f"cat {name} constraints.txt pyproject.toml | cksum > .venv/installed/{name}"
        subprocess.run(["bash", "-c", note], cwd=folder, check=True)
    for number, name in enumerate(("cat", "dog")):
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(12):
            image = np.full((20, 30, 3), 100 * number + index, np.uint8)
            Image.fromarray(image).save(folder / "pictures" / name / f"{index}.png")
    (folder / "new").mkdir()
    for name in ("one.png", "two.jpg"):
        Image.new("RGB", (40, 20), "grey").save(folder / "new" / name)
    texts = pd.DataFrame({"review": ["fine film", "poor film"] * 15, "verdict": ["good", "bad"] * 15})
    texts.to_csv(folder / "texts.csv", index=False)
    table = pd.DataFrame({"length": range(30), "width": range(30), "species": ["a", "b", "c"] * 10})
    table.to_csv(folder / "table.csv", index=False)
    (folder / "runs").mkdir()
    return folder


@functools.cache
def flags_of(program: str) -> set[str]:
    run = run_program(program, "--help")
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"--[\w-]+", run.stdout))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_of_their_programs(command):
    """What the long test of the commands runs, this one only parses."""
    words = shlex.split(command)
    if words[0] == "scripts/run.sh":
        words[:2] = [f"recipes/{words[1]}.py"]
    programs = [word for word in words if word.endswith(".py") and (ROOT / word).is_file()]
    known = set().union(*map(flags_of, programs)) | {"--"}
    if programs:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
    else:
        assert words[0] in (*OF_A_CLUSTER, "scripts/test.sh", ".venv/bin/tensorboard") or "my_" in command, command


def forked(words: list[str]) -> list[str]:
    """The program and flags of a command that trains, or only reads: no process of its own is needed."""
    script, *flags = words[1:]
    if words[0] == "scripts/run.sh" and (ROOT / "recipes" / f"{script}.py").exists() and "--help" not in flags:
        return [str(ROOT / "recipes" / f"{script}.py"), *flags]
    reads_only = {f"scripts/{name}.py" for name in ("predict", "export", "compare")}
    return [str(ROOT / script), *flags] if words[0] == ".venv/bin/python" and script in reads_only else []


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the tests do not run in a virtual environment")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.long
def test_commands_run(command, checkout):
    words = shlex.split(command)
    if words[0] in OF_A_CLUSTER:
        assert pathlib.Path(ROOT, words[-1]).exists()
        return
    if set(words) & ELSEWHERE:
        assert pathlib.Path(ROOT, *(set(words) & ELSEWHERE)).exists()
        return
    words += SHORTENED[words[0]](words)
    if "--data" not in words and "recipes/" not in words[1] and words[0] == "scripts/run.sh":
        words += ["--data", "sample"]
    environment = {"TFDS_DATA_DIR": "/nowhere", "HTTPS_PROXY": "http://127.0.0.1:9"}
    if program := forked(words):
        run = run_program(*program, cwd=checkout, **environment)
    else:
        environment = {**os.environ, **environment}
        run = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the tests do not run in a virtual environment")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.long
def test_programs_run(program, checkout):
    """After the commands, which make what these read."""
    run = subprocess.run([".venv/bin/python", "-c", program], cwd=checkout, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_every_recipe_is_in_the_table():
    table = README.partition("<!-- results:")[2].partition("<!-- end of results -->")[0]
    for recipe in RECIPES:
        assert f"[`{recipe}`](recipes/{recipe}.py)" in table


def test_the_tables_and_result_lines_are_those_of_the_results():
    assert publish.with_part(README, "results", tables.results_table()) == README
    assert publish.with_part(README, "benchmark", tables.benchmark_table()) == README
    assert publish.with_part(README, "shipped", tables.shipped_tables()) == README
    assert publish.with_part(README, "distributed", tables.distributed_table()) == README
    for recipe in RECIPES:
        path = ROOT / "recipes" / f"{recipe}.py"
        assert publish.with_result_line(path, tables.result_line(recipe)) == path.read_text()


def test_no_figure_stands_outside_the_tables():
    """Percentages and factors belong between the markers, where the script writes them."""
    prose = re.sub(r"<!-- (\w+): .*?<!-- end of \1 -->", "", README, flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]* ?(?:%|times|x\b|images)", prose)


def test_no_record_says_where_a_machine_keeps_its_data():
    for path in (ROOT / "results").glob("*.json"):
        assert not re.findall(r'--data-dir|"(?:python )?/', path.read_text()), path


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
