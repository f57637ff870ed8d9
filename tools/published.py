"""The records in results/: how they are written, read and compared with the recipes."""

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


def sealed(content: dict[str, Any]) -> str:
    """JSON that holds the SHA-256 of its own content."""
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=2) + "\n"


def unsealed(text: bytes) -> dict[str, Any]:
    """The content that was given to `sealed`; a ValueError if a single byte of the text differs."""
    try:
        content = json.loads(text)
        del content["sha256"]
        whole = sealed(content)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError("not written by a recipe, or damaged") from error
    if text != whole.encode():
        raise ValueError("changed since it was written")
    return content


def write_record(name: str, record: dict[str, Any]) -> pathlib.Path:
    """Writes results/<name>.json, which holds its name and the SHA-256 of its own content; returns where that is."""
    path = ROOT / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_file(path, sealed({"record": name, **record}))
    return path


def read_record(name: str) -> dict[str, Any]:
    """What was given to `write_record`; empty if there is no such record.

    Raises:
        UserError: a byte of it is another, it was written under another name, or it can't be read.
    """
    path = ROOT / "results" / f"{name}.json"
    try:
        record = unsealed(path.read_bytes())
        if record.pop("record", "") != name:
            raise ValueError("written under another name")
        return record
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); get it back with git") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; get it back with git, or measure again") from error


def read_records(pattern: str) -> list[dict[str, Any]]:
    """The records whose names fit a pattern, as `ship-*`, in the order of their names."""
    return [read_record(path.stem) for path in sorted((ROOT / "results").glob(f"{pattern}.json"))]


def variant_records(recipe: str) -> list[dict[str, Any]]:
    """The records of a recipe with other flags than those of its own record, see tools/reproduce.py."""
    return [record for record in read_records(f"{recipe}-*") if record.get("recipe") == recipe]


def recipe_paths() -> list[pathlib.Path]:
    """The files of all recipes, by name."""
    return sorted((ROOT / "recipes").glob("*.py"))


def code_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a Python file's code: what it says in comments and docstrings, and its layout, make no difference."""

    def said(node: Any) -> Any:
        # Less what is empty: versions of Python differ in which empty fields there are.
        if isinstance(node, ast.AST):
            fields = [(name, said(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
            return type(node).__name__, fields
        return [said(each) for each in node] if isinstance(node, list) else node

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(repr(said(tree)).encode()).hexdigest()


def stale(record: dict[str, Any]) -> str:
    """What to say of a record that was made by other code than the recipe has now; nothing if it was not."""
    path = ROOT / "recipes" / f"{record['recipe']}.py"
    return "" if path.exists() and record["code_sha256"] == code_sha256(path) else ", stale"


def marks(record: dict[str, Any]) -> str:
    """What a table says of a record that is stale, or that was made with changes that were in no commit."""
    return (stale(record) if "code_sha256" in record else "") + uncommitted(record)


def uncommitted(record: dict[str, Any]) -> str:
    """What to say of a record that was made with changes that were in no commit."""
    commits = [each.get("commit") or "" for each in (record, *record.get("runs", ()))]
    return ", uncommitted" if any(commit.endswith("-dirty") for commit in commits) else ""


def load_runs(recipe: str) -> list[dict]:
    """The published runs of a recipe; empty if there are none."""
    return read_record(recipe).get("runs", [])


def with_metric(runs: list[dict], metric: str) -> list[dict]:
    """The runs that have a metric; those made with --no-baseline have none to compare with."""
    return [run for run in runs if metric in run["metrics"]]


def mean(runs: list[dict], metric: str) -> float:
    """Of a metric over the runs."""
    return statistics.mean(run["metrics"][metric] for run in runs)


def main_metric(runs: list[dict]) -> str:
    """What a recipe is judged by."""
    return "accuracy" if "accuracy" in runs[0]["metrics"] else "mse"


def machine_of(record: dict) -> str:
    """Processor or graphics cards that a run or a record was measured on."""
    machine = record["hardware"]
    # Processors of one name differ; records from before this was noted are of some that have it.
    without = "" if machine.get("bfloat16", True) else " without bfloat16"
    return ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}{without}"


def benchmark_name(record: dict) -> str:
    """What the record of a benchmark is called: each machine has its own."""
    machine = re.sub(r"\W+", "-", re.sub(r"\(\w+\)", "", machine_of(record))).strip("-").lower()
    return f"benchmark-{record['recipe']}-{record['precision']}-{machine}"


def benchmarks() -> dict[str, list[dict]]:
    """The records of tools/benchmark.py by machine, one for each recipe and precision measured there."""
    found: dict[str, list[dict]] = {}
    for record in read_records("benchmark-*"):
        found.setdefault(machine_of(record), []).append(record)
    return dict(sorted(found.items()))


def in_bfloat16(record: dict) -> str:
    """What is said of a recipe that was measured in mixed precision."""
    return " in bfloat16" if record["precision"] == "mixed_bfloat16" else ""


def pruned() -> list[tuple[str, float, list[dict]]]:
    """What was removed (weights or filters), which share of it, and the runs of each record of pruning."""
    found = []
    for runs in (record["runs"] for record in read_records("pruning*")):
        words = shlex.split(runs[0]["command"].replace("=", " "))
        given = {word: words[place + 1] for place, word in enumerate(words) if word in ("--remove", "--sparsity")}
        found.append((given.get("--remove", "weights"), float(given.get("--sparsity", 0.9)), runs))
    return sorted(found, key=lambda record: record[:2])


def without_places(flags: list[str]) -> list[str]:
    """The flags less `--data-dir PLACE`."""
    return without(flags, "--data-dir")


def without(words: list[str], *flags: str) -> list[str]:
    """The words less some flags and their values, written as `--flag value` or `--flag=value`."""
    return [
        word
        for word, before in zip(words, ["", *words], strict=False)
        if before not in flags and word.partition("=")[0] not in flags
    ]


def set_flags(command: str) -> str:
    """The flags of a recipe in the command that trained it; those for data, seed and display aside."""
    words = without(shlex.split(command)[2:], "--data", "--seed")
    return shlex.join(word for word in words if word not in ("--quiet", "--no-baseline"))
