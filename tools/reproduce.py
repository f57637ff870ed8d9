"""Trains a recipe with several seeds and publishes the outcome.

    python tools/reproduce.py cifar10_cnn --seeds 0 1 2 --data tfds
    python tools/reproduce.py pruning --variant half --sparsity 0.5 --data tfds

The first writes results/cifar10_cnn.json, the second results/pruning-half.json; then tools/publish.py brings
README.md and the recipes' docstrings in step. Flags that are not its own go to the recipe. Interrupted, it lets the
training save, and the same command goes on there.
"""

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import Any

from common.cli import EXIT_INTERRUPTED, Parser, UserError, run_script

import published
from publish import publish
from published import code_sha256, recipe_paths, without_data_dir, write_record


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", help="its published runs are replaced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each (default: 0 1 2)")
    parser.add_argument("--variant", default="", help="a name for runs with other flags than those of the table")
    arguments, flags = parser.parse_known_args()
    if not re.fullmatch(r"[\w-]*", arguments.variant):
        raise UserError(f"--variant {arguments.variant}: give letters, digits, - and _")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {' '.join(map(str, arguments.seeds))}: give each once")
    for flag in ("--seed", "--smoke", "--run-dir", "--resume"):
        if flag in (word.partition("=")[0] for word in flags):
            raise UserError(f"{flag}: not for results that are published; leave it out")
    reproduce(arguments.recipe, arguments.seeds, flags, arguments.variant)
    publish()


def reproduce(recipe: str, seeds: list[int], flags: list[str], variant: str = "") -> None:
    """Trains once per seed, in fresh processes, and writes results/<recipe>[-<variant>].json when all are done."""
    names = [found.stem for found in recipe_paths()]
    if recipe not in names:
        raise UserError(f"no recipe {recipe!r}; choose one of {', '.join(names)}")
    published.read_records("*")  # One that is damaged shall show now, not after hours.
    path, runs = published.ROOT / "recipes" / f"{recipe}.py", []

    def code() -> list[str]:
        return list(map(code_sha256, [path, *sorted((published.ROOT / "common").glob("*.py"))]))

    # All seeds are trained by the same code: after a change, also of common/, none goes on that was begun before it.
    begun = code()
    unfinished = published.ROOT / "runs" / "reproduce" / hashlib.sha256(f"{begun}{flags}".encode()).hexdigest()[:16]
    for seed in seeds:
        directory = unfinished / str(seed)
        command = [sys.executable, str(path), *flags, "--seed", str(seed), "--run-dir", str(directory)]
        code_of_exit = run_training(command + ["--resume"] * directory.exists())
        if code_of_exit == EXIT_INTERRUPTED:
            print("reproduce: the same command, as it is, goes on there", file=sys.stderr)
        if code_of_exit:
            sys.exit(code_of_exit)  # It said why.
        if code() != begun:
            shutil.rmtree(directory)
            raise UserError(f"seed {seed}: the code was changed while it trained; the same command trains it anew")
        result = json.loads((directory / "result.json").read_text())
        # As anybody would type it: where this machine keeps its data says nothing about the result.
        result["command"] = shlex.join(
            ["python", f"recipes/{recipe}.py", *without_data_dir(flags), "--seed", str(seed)]
        )
        runs.append(result)
    record = {"recipe": recipe, "code_sha256": begun[0], "runs": runs}
    write_record(f"{recipe}-{variant}" if variant else recipe, record)
    shutil.rmtree(unfinished)


def run_training(command: list[str]) -> int:
    """Runs a recipe; its exit code. One that is told to end saves first, so this waits for it."""
    training: list[subprocess.Popen] = []

    def pass_on(number: int, frame: Any) -> None:
        for each in training:
            each.send_signal(number)

    # Ctrl-C reaches both processes; other signals this one alone.
    earlier = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    training.append(subprocess.Popen(command))
    code = training[0].wait()
    for number, handler in earlier.items():
        signal.signal(number, handler)
    return code


if __name__ == "__main__":
    run_script(main)
