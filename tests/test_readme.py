"""The commands of README and docs/ run, their links resolve, and their figures are those of results/."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

from common.cli import EXIT_INTERRUPTED
from common.multiworker import EXIT_WORKER_LOST
from common.records import load_program

import numpy as np
import pandas as pd
import publish
import pytest
import tables
from conftest import RECIPES
from PIL import Image
from programs import ROOT, run_program

# In the order in which the tests run their commands: some need what those before them have made.
PAGES = [
    *("README.md", "docs/own-data.md", "docs/predict-export-serve.md", "docs/resume.md", "docs/hardware.md"),
    *("docs/tensorboard.md", "docs/small-models.md", "docs/write-a-recipe.md", "docs/results.md"),
    *("docs/benchmarks.md", "docs/troubleshooting.md", "CONTRIBUTING.md"),
]
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in (*PAGES, "README.zh-CN.md")}


def blocks(text: str, language: str) -> list[str]:
    """The fenced code of a page, without indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indentation}", "", code, flags=re.MULTILINE) for indentation, code in found]


def commands(text: str) -> list[str]:
    """The commands of a page, in blocks and within lines; not those with a NAME or FILE to put in."""
    within = re.findall(r"`((?:scripts|\.venv/bin)/[^`\s]+ [^`\n]+)`", text)
    found = [line for block in blocks(text, "sh") for line in block.splitlines()] + within
    found = [command for command in found if not re.search(r"\b[A-Z]{4}\b", command)]
    return sorted(found, key=text.index)


COMMANDS = list(dict.fromkeys(command for name in PAGES for command in commands(TEXTS[name])))
PROGRAMS = [program for name in PAGES for program in blocks(TEXTS[name], "python")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
QUICK = ("--smoke", "--no-baseline")
# What is appended to a command so that it takes seconds; the rest of it runs as it is written.
SHORTENED = {
    "scripts/run.sh": lambda words: [] if "--help" in words else QUICK,
    ".venv/bin/python": lambda words: (
        ["--rounds", "1"] if "ship" in words[1] else QUICK if "recipes/" in words[1] or "--" in words else []
    ),
    "scripts/test.sh": lambda words: ["--collect-only", "--quiet", "tests/test_cli.py"],
    ".venv/bin/tensorboard": lambda words: ["--inspect"],
}
# What only a cluster has: tests/test_multiworker.py runs the script under a stand-in, and checks the manifest.
OF_A_CLUSTER = {"sbatch", "kubectl"}
# Publishing takes an hour and writes into the project: tests/test_scripts.py runs these on copies.
ELSEWHERE = {"tools/reproduce.py", "tools/benchmark.py", "tools/publish.py", "tools/terminal.py"}
# What other tests run: trainings with other flags, programs in a process, and tools with tests of their own.
ONLY_PARSED = {
    "scripts/run.sh cifar10_cnn --epochs 5 --seed 1 --no-baseline",
    "scripts/run.sh cifar10_cnn --help",
    "scripts/run.sh cifar10_cnn --precision mixed_bfloat16",
    "scripts/run.sh cifar10_fast --epochs 5 --label-smoothing 0 --run-dir runs/teacher",
    "scripts/run.sh distillation --teacher runs/teacher/model.keras",
    "scripts/run.sh mnist_cnn --data sample",
    "scripts/run.sh mnist_cnn --devices 2 --strategy mirrored",
    "scripts/run.sh mnist_cnn --profile",
    "scripts/run.sh pruning --remove filters --sparsity 0.5",
    "scripts/run.sh pruning --sparsity 0.95",
    "scripts/run.sh quantization",
    "scripts/test.sh --all",
    "scripts/test.sh -m gpu",
    "scripts/run.sh my_task --smoke",
    ".venv/bin/python ../my_project/train.py --smoke --data sample --no-baseline",
    ".venv/bin/python recipes/cifar10_cnn.py --smoke",
    ".venv/bin/python scripts/doctor.py",
    ".venv/bin/python scripts/launch.py --workers 2 recipes/mnist_cnn.py -- --epochs 2",
    ".venv/bin/python scripts/new_project.py cifar10_cnn ../my_project --notebook",
    ".venv/bin/python templates/image_classifier.py pictures",
    ".venv/bin/python templates/table.py table.csv species",
    ".venv/bin/python tools/damage.py --flips 20 --truncations 5",
    ".venv/bin/python tools/ship.py runs/my_run",
    ".venv/bin/python tools/torture.py linear_regression --kills 2",
}


def load_script(name: str):
    (path,) = (path for folder in ("scripts", "tools") for path in (ROOT / folder).glob(f"{name}.py"))
    return load_program(path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with a user's own files beside it, and this environment as its `.venv`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "templates", "scripts", "tools", "common", "tests", "docs"):
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
    shutil.copytree(folder / "pictures", folder / "labelled")
    (folder / "new").mkdir()
    for name in ("one.png", "two.jpg"):
        Image.new("RGB", (40, 20), "grey").save(folder / "new" / name)
    texts = pd.DataFrame(
        {
            "review": [f"{word} film {row}" for row in range(15) for word in ("fine", "poor")],
            "verdict": ["good", "bad"] * 15,
        }
    )
    texts.to_csv(folder / "texts.csv", index=False)
    squares = np.arange(30) ** 2
    table = pd.DataFrame({"length": squares, "island": ["x", "y"] * 15, "species": ["a", "b", "c"] * 10})
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
    if "install" in words:
        assert re.fullmatch(r"\.\[(\w+)\]", words[-1])[1] in PROJECT["optional-dependencies"]
        return
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
    reads_only = {f"scripts/{name}.py" for name in ("predict", "evaluate", "export", "compare")}
    return [str(ROOT / script), *flags] if words[0] == ".venv/bin/python" and script in reads_only else []


def is_run(command: str) -> bool:
    """Whether the test of the commands runs this one; of the others, the files they name have to exist."""
    words = shlex.split(command)
    assert all(pathlib.Path(ROOT, word).exists() for word in words if word.startswith(("tools/", "docs/")))
    return not (words[0] in OF_A_CLUSTER or set(words) & ELSEWHERE or command in ONLY_PARSED or "install" in words)


def run_shortened(command: str, checkout: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs a command with the flags that make it take seconds, without a network."""
    words = shlex.split(command)
    words += SHORTENED[words[0]](words)
    if "--data" not in words and "recipes/" not in words[1] and words[0] == "scripts/run.sh":
        words += ["--data", "sample"]
    environment = {"TFDS_DATA_DIR": "/nowhere", "HTTPS_PROXY": "http://127.0.0.1:9", "PYTHONPATH": str(checkout)}
    if program := forked(words):
        return run_program(*program, cwd=checkout, **environment)
    environment = {**os.environ, **environment}
    return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the tests do not run in a virtual environment")
@pytest.mark.long
def test_commands_and_programs_run(checkout):
    """In one test: many read what those before them have written. All that fail are named."""
    runs = {command: run_shortened(command, checkout) for command in COMMANDS if is_run(command)}
    failed = {command: run.stderr for command, run in runs.items() if run.returncode != 0}
    assert not failed
    # In one process, which imports TensorFlow once.
    words = [".venv/bin/python", "-c", "\n".join(PROGRAMS)]
    run = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == "\n".join(PROGRAMS).count("print(")


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].encode()) <= 9_000


def test_the_chinese_readme_has_the_same_content():
    english, chinese = TEXTS["README.md"], TEXTS["README.zh-CN.md"]
    assert commands(chinese) == commands(english)
    assert sorted(set(links(chinese)) ^ set(links(english))) == ["README.md", "README.zh-CN.md"]
    assert chinese.count("\n## ") == english.count("\n## ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_table(recipe):
    remedy = f"tools/tables.py: add a line to CHINESE that says in Chinese what {recipe} teaches"
    assert recipe in tables.CHINESE, remedy
    assert f"\n| [`{recipe}`](recipes/{recipe}.py)" in TEXTS["README.md"], "run tools/publish.py"


def test_the_tables_and_result_lines_are_those_of_the_results():
    for name, table in publish.PAGES.items():
        assert publish.with_table(ROOT / name, TEXTS[name], table()) == TEXTS[name]
    for recipe in RECIPES:
        path = ROOT / "recipes" / f"{recipe}.py"
        assert publish.with_result_line(path, tables.result_line(recipe)) == path.read_text()


@pytest.mark.parametrize("page", TEXTS)
def test_no_figure_stands_outside_the_tables(page):
    """Percentages and factors belong between the markers, where the script writes them."""
    prose = re.sub(f"{publish.BEGIN}.*?{publish.END}", "", TEXTS[page], flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]* ?(?:%|times|x\b|images)", prose)


def test_no_record_says_where_a_machine_keeps_its_data():
    for path in (ROOT / "results").glob("*.json"):
        assert not re.findall(r'--data-dir|"(?:python )?/', path.read_text()), path


def links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")]


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_resolve(page):
    for target in links(TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text("utf-8")), target


def test_the_messages_of_troubleshooting_are_those_of_the_programs():
    """Their fixed parts, between the marks of what differs."""
    files = [*(ROOT / "common").glob("*.py"), *(ROOT / "scripts").glob("*.*")]
    source = "\n".join(path.read_text() for path in files)
    page = TEXTS["docs/troubleshooting.md"]
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) + re.findall(r"`([^`]*…[^`]*)`", page)
    assert len(messages) > 10
    for message in messages:
        for part in re.split(" ?… ?", message):
            assert part.strip(":;, ") in source, message


def test_the_exit_codes_of_troubleshooting_are_all():
    page = TEXTS["docs/troubleshooting.md"]
    explained = list(map(int, re.findall(r"^\| (\d+) \|", page, re.MULTILINE)))
    assert explained == [0, 2, 3, EXIT_INTERRUPTED, EXIT_WORKER_LOST]


def test_the_picture_of_the_terminal_needs_no_network():
    output = "hardware: two cores\r\n" + 40 * "before\x1b[1m 1/9\b\b\r\x1b[1mafter\x1b[0m\r\n"
    picture = load_script("terminal").drawn(output, "a title")
    assert "url(" not in picture.replace("url(#", "")
    assert "after" in picture
    assert not re.findall("before|hardware", picture), "only the last lines, and the last state of each"
