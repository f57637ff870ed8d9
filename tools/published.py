"""Writes and reads the records in results/, and compares them with the recipes."""

import ast
import hashlib
import json
import pathlib
import re
import shlex
import statistics
from typing import Any

from common.cli import UserError
from common.records import write_file

ROOT = pathlib.Path(__file__).parent.parent


def with_checksum(content: dict[str, Any]) -> str:
    """Returns `content` as JSON, with an additional SHA-256 checksum."""
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=2) + "\n"


def verified(text: bytes) -> dict[str, Any]:
    """Inverts `with_checksum`. Raises a ValueError if any byte of the text has changed."""
    try:
        content = json.loads(text)
        del content["sha256"]
        expected = with_checksum(content)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("not written by a recipe, or damaged") from error
    if text != expected.encode():
        raise ValueError("changed since it was written")
    return content


def write_record(name: str, record: dict[str, Any]) -> pathlib.Path:
    """Writes results/<name>.json with its name and a checksum, and returns its path."""
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_file(path, with_checksum({"record": name, **record}))
    return path


def read_record(name: str) -> dict[str, Any]:
    """Reads a record written by `write_record`; returns an empty dict if there is none.

    Raises:
        UserError: the record was changed, was written under another name, or can't be read.
    """
    path = ROOT / "results" / f"{name}.json"
    try:
        record = verified(path.read_bytes())
        if record.pop("record", "") != name:
            raise ValueError("written under another name")
        return record
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); restore it with git") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; restore it with git, or measure again") from error


def read_records(pattern: str) -> list[dict[str, Any]]:
    """Reads all records whose names match a glob pattern such as `ship-*`, sorted by name."""
    return [read_record(path.stem) for path in sorted((ROOT / "results").glob(f"{pattern}.json"))]


def variant_records(recipe: str) -> list[dict[str, Any]]:
    """Reads the records of a recipe trained with other flags, see --variant of tools/reproduce.py."""
    return [record for record in read_records(f"{recipe}-*") if record.get("recipe") == recipe]


def recipe_paths() -> list[pathlib.Path]:
    """Returns the paths of all recipes, sorted by name."""
    return sorted((ROOT / "recipes").glob("*.py"))


def docstring_entry(path: pathlib.Path, name: str) -> str:
    """Returns an entry, such as Teaches or Data, in the docstring of a recipe as one line; empty if there is none."""
    entry = re.search(rf"^{name} +(.*(?:\n {{10}}.*)*)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return " ".join(entry[1].split()) if entry else ""


def code_sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of the code in a Python file, ignoring comments, docstrings and formatting."""

    def as_tuples(node: Any) -> Any:
        # Skip empty fields: they differ between Python versions.
        if isinstance(node, ast.AST):
            fields = [(name, as_tuples(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
            return type(node).__name__, fields
        return [as_tuples(item) for item in node] if isinstance(node, list) else node

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(repr(as_tuples(tree)).encode()).hexdigest()


def stale(record: dict[str, Any]) -> str:
    """Returns ", stale" if the code of the recipe has changed since the record was written, else an empty string."""
    path = ROOT / "recipes" / f"{record['recipe']}.py"
    return "" if path.exists() and record["code_sha256"] == code_sha256(path) else ", stale"


def marks(record: dict[str, Any]) -> str:
    """Returns the marks of a record for a table: stale, uncommitted, both or none."""
    return (stale(record) if "code_sha256" in record else "") + uncommitted(record)


def uncommitted(record: dict[str, Any]) -> str:
    """Returns ", uncommitted" if there were uncommitted changes when the record was written, else an empty string."""
    commits = [run.get("commit") or "" for run in (record, *record.get("runs", ()))]
    return ", uncommitted" if any(commit.endswith("-dirty") for commit in commits) else ""


def load_runs(recipe: str) -> list[dict]:
    """Returns the published runs of a recipe, or an empty list."""
    return read_record(recipe).get("runs", [])


def with_metric(runs: list[dict], metric: str) -> list[dict]:
    """Returns the runs that have a metric; runs with --no-baseline lack those of the baselines."""
    return [run for run in runs if metric in run["metrics"]]


def mean(runs: list[dict], metric: str) -> float:
    """Returns the mean of a metric over the runs."""
    return statistics.mean(run["metrics"][metric] for run in runs)


def main_metric(runs: list[dict]) -> str:
    """Returns the name of the metric that is reported for a recipe."""
    return "accuracy" if "accuracy" in runs[0]["metrics"] else "mse"


def machine_of(record: dict) -> str:
    """Returns the CPU or GPUs that a run or a record was measured on."""
    machine = record["hardware"]
    # Processors of the same name may differ in bfloat16. Old records lack this field; their processors support it.
    suffix = "" if machine.get("bfloat16", True) else " without bfloat16"
    return ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}{suffix}"


def benchmark_name(record: dict) -> str:
    """Returns the name of a benchmark record, which includes the machine."""
    machine = re.sub(r"\W+", "-", re.sub(r"\(\w+\)", "", machine_of(record))).strip("-").lower()
    return f"benchmark-{record['recipe']}-{record['precision']}-{machine}"


def benchmarks() -> dict[str, list[dict]]:
    """Returns the records of tools/benchmark.py by machine: one per recipe and precision."""
    by_machine: dict[str, list[dict]] = {}
    for record in read_records("benchmark-*"):
        by_machine.setdefault(machine_of(record), []).append(record)
    return dict(sorted(by_machine.items()))


def precision_suffix(record: dict) -> str:
    """Returns the suffix for recipes measured in mixed precision, else an empty string."""
    return " in bfloat16" if record["precision"] == "mixed_bfloat16" else ""


def pruned() -> list[tuple[str, float, list[dict]]]:
    """Returns (kind, sparsity, runs) for each record of pruning; the kind is weights or filters."""
    results = []
    for runs in (record["runs"] for record in read_records("pruning*")):
        words = shlex.split(runs[0]["command"].replace("=", " "))
        flags = {word: words[index + 1] for index, word in enumerate(words) if word in ("--remove", "--sparsity")}
        results.append((flags.get("--remove", "weights"), float(flags.get("--sparsity", 0.9)), runs))
    return sorted(results, key=lambda result: result[:2])


def without_data_dir(flags: list[str]) -> list[str]:
    """Removes `--data-dir FOLDER` from a list of flags."""
    return without(flags, "--data-dir")


def without(words: list[str], *flags: str) -> list[str]:
    """Removes flags and their values, written as `--flag value` or `--flag=value`."""
    return [
        word
        for word, previous in zip(words, ["", *words], strict=False)
        if previous not in flags and word.partition("=")[0] not in flags
    ]


def recipe_flags(command: str) -> str:
    """Returns the flags in the command of a run, except those for data, seed and display."""
    words = without(shlex.split(command)[2:], "--data", "--seed")
    return shlex.join(word for word in words if word not in ("--quiet", "--no-baseline"))
