"""Packages, the wheel, the workflows and the image: what is said in two places is the same."""

import glob
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

from common.upstream import PATCHES

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from programs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def installed_program(name: str) -> str:
    """Returns the path of a program of the extra `dev`."""
    path = pathlib.Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: scripts/setup.sh does it")
    return str(path)


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.stem)
def test_requirements_files_install_what_pyproject_lists(path):
    """`requirements.txt` lists the same packages; `requirements-gpu.txt` is the extra `gpu`."""
    _, _, extra = path.stem.partition("-")
    assert lines_of(path.name) == ([f"-e .[{extra}]"] if extra else ["-e .", *PROJECT["dependencies"]])
    assert not extra or EXTRAS[extra]


def test_constraints_are_versions_that_the_requirements_allow():
    pinned = dict(line.split("==") for line in lines_of("constraints.txt"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["export"]]):
        if requirement.name != PROJECT["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
            assert "<" in str(requirement.specifier), f"{requirement}: no upper bound"


def test_the_wheel_holds_common_and_its_requirements(tmp_path):
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        required = set(re.findall(r"^Requires-Dist: ([^;\n]+)$", wheel.read(metadata).decode(), flags=re.MULTILINE))
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {str(file.relative_to(ROOT)) for file in (ROOT / "common").glob("*.py")}
    assert set(map(Requirement, required)) == set(map(Requirement, PROJECT["dependencies"]))


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_follow_the_schema(schema):
    command = [installed_program("check-jsonschema"), "--builtin-schema", schema, *map(str, WORKFLOWS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    pins = re.findall(r"uses: (.*)", text)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", pin) for pin in pins), pins
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    named = set(re.findall(r"[\w.-]*/?[\w-]+\.(?:sh|py|txt)\b", "\n".join(commands)))
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert missing <= {"upstream.txt"}  # Written by a step before.


def test_the_weekly_workflow_applies_patches_to_any_version(tmp_path):
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "newest.yml").read_text())["jobs"]["newest"]["steps"]
    (command,) = (step["run"] for step in steps if step.get("run", "").startswith("sed "))
    (tmp_path / "common").mkdir()
    path = pathlib.Path(shutil.copy(ROOT / "common" / "upstream.py", tmp_path / "common"))
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    assert path.read_text().count('">=0"') == len(PATCHES)


def test_the_image_is_built_from_files_that_exist():
    subprocess.run([installed_program("hadolint"), str(ROOT / "Dockerfile")], check=True)
    for line in (line for line in DOCKERFILE if line.startswith("COPY ")):
        for source in line.split()[1:-1]:
            assert glob.glob(str(ROOT / source)), f"{line}: no {source}"


def test_the_manifest_runs_in_the_image():
    """docs/kubernetes.yaml gives paths within the image's folder, and a group that may write to the volume."""
    *_, job = yaml.safe_load_all((ROOT / "docs" / "kubernetes.yaml").read_text())
    specification = job["spec"]["template"]["spec"]
    (container,) = specification["containers"]
    assert "workingDir" not in container
    (command,) = (line.removeprefix("CMD ") for line in DOCKERFILE if line.startswith("CMD "))
    for program, path, *_ in (container["command"], json.loads(command)):
        assert program == "python"
        assert (ROOT / path).is_file()
    (user,) = (line.removeprefix("USER ") for line in DOCKERFILE if line.startswith("USER "))
    assert specification["securityContext"]["fsGroup"] == int(user)
    assert DOCKERFILE[0].endswith(f"docker build -t {container['image'].removesuffix(':latest')} .")


def test_the_development_container_sets_up_as_the_scripts_do():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    shell, option, command = shlex.split(container["postCreateCommand"])
    assert (shell, option, command) == ("bash", "-c", "source scripts/setup.sh test")
    assert 'source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test' in (ROOT / "scripts" / "test.sh").read_text()
