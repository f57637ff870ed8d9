"""Trains a recipe with several seeds and publishes the results.

    python tools/reproduce.py cifar10_cnn --seeds 0 1 2 --data tfds
    python tools/reproduce.py pruning --variant half --sparsity 0.5 --data tfds

The first command writes results/cifar10_cnn.json, the second one results/pruning-half.json. tools/publish.py then
updates README.md, docs/ and the docstrings of the recipes. Unknown flags are passed to the recipe. If interrupted, the
training saves a checkpoint, and the same command resumes it.
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
    parser.add_argument("recipe", help="name of the recipe; its published results are replaced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per seed (default: 0 1 2)")
    parser.add_argument("--variant", default="", help="a name for runs with other flags than those of the table")
    arguments, flags = parser.parse_known_args()
    if not re.fullmatch(r"[\w-]*", arguments.variant):
        raise UserError(f"--variant {arguments.variant}: give letters, digits, - and _")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {' '.join(map(str, arguments.seeds))}: give each once")
    for flag in ("--seed", "--smoke", "--run-dir", "--resume"):
        if flag in (word.partition("=")[0] for word in flags):
            raise UserError(f"{flag}: not allowed for published results; leave it out")
    reproduce(arguments.recipe, arguments.seeds, flags, arguments.variant)
    publish()


def reproduce(recipe: str, seeds: list[int], flags: list[str], variant: str = "") -> None:
    """Trains once per seed in new processes, and finally writes results/<recipe>[-<variant>].json."""
    names = [recipe_path.stem for recipe_path in recipe_paths()]
    if recipe not in names:
        raise UserError(f"no recipe {recipe!r}; choose one of {', '.join(names)}")
    published.read_records("*")  # Report a damaged record now, not after hours of training.
    path, runs = published.ROOT / "recipes" / f"{recipe}.py", []

    def code_hashes() -> list[str]:
        return list(map(code_sha256, [path, *sorted((published.ROOT / "common").glob("*.py"))]))

    # All seeds must use the same code, including common/. After a change, unfinished runs are not resumed.
    initial = code_hashes()
    unfinished = published.ROOT / "runs" / "reproduce" / hashlib.sha256(f"{initial}{flags}".encode()).hexdigest()[:16]
    for seed in seeds:
        directory = unfinished / str(seed)
        command = [sys.executable, str(path), *flags, "--seed", str(seed), "--run-dir", str(directory)]
        exit_code = run_training(command + ["--resume"] * directory.exists())
        if exit_code == EXIT_INTERRUPTED:
            print("reproduce: repeat the same command to continue", file=sys.stderr)
        if exit_code:
            sys.exit(exit_code)  # The recipe has printed the reason.
        if code_hashes() != initial:
            shutil.rmtree(directory)
            raise UserError(f"seed {seed}: the code changed during training; the same command trains it again")
        result = json.loads((directory / "result.json").read_text())
        # The published command omits the data folder of this machine, which does not affect the result.
        result["command"] = shlex.join(
            ["python", f"recipes/{recipe}.py", *without_data_dir(flags), "--seed", str(seed)]
        )
        runs.append(result)
    record = {"recipe": recipe, "code_sha256": initial[0], "runs": runs}
    write_record(f"{recipe}-{variant}" if variant else recipe, record)
    shutil.rmtree(unfinished)


def run_training(command: list[str]) -> int:
    """Runs a recipe and returns its exit code. Forwards signals, and waits until the recipe has saved and exited."""
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(number)

    # Ctrl-C reaches both processes, other signals reach only this one.
    previous_handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
    }
    processes.append(subprocess.Popen(command))
    code = processes[0].wait()
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)
    return code


if __name__ == "__main__":
    run_script(main)
