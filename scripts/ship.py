"""Makes a trained model small in every way there is, and prints what each costs.

    python scripts/ship.py runs/my_run
    python scripts/ship.py runs/my_run --data-dir ~/tensorflow_datasets --rounds 5

The model goes through scripts/export.py in every format, for LiteRT also with weights in int8 (dynamic), in float16, and
with weights and calculations in int8; where it has no layers but Dense and Embedding, also through Keras' own
`quantize`. For each: size on disk; parameters, and how many are not zero; accuracy, or mean squared error, on the whole
test split, as the artefact answers; the time of one call with one input and with 64, with one thread and with one per
core, as the median over rounds in which the artefacts take turns, each in processes of their own; and the memory that
it adds to a process at most. Written to results/ship-RECIPE.json, and from there to README.md.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from common import artefacts
from common.cli import Parser, run_script
from common.hardware import describe_machine
from common.records import provenance, write_file

import export
import numpy as np
import rich
from rich.table import Table

ROOT = pathlib.Path(__file__).parent.parent
BATCHES = (1, 64)
# As scripts/export.py calls them: format, and for LiteRT how it is quantized.
VARIANTS = (
    ("keras", "none"),
    ("saved_model", "none"),
    ("onnx", "none"),
    ("litert", "none"),
    ("litert", "dynamic"),
    ("litert", "float16"),
    ("litert", "int8"),
)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--data-dir", default="", help="folder of prepared TFDS data, where it is not the run's")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    arguments = parser.parse_args()
    record = ship(arguments.run_dir, arguments.data_dir, arguments.rounds)
    rich.print(as_table(record))
    path = ROOT / "results" / f"ship-{record['recipe']}.json"
    write_file(path, json.dumps(record, indent=2) + "\n")
    publish()
    print(f"record: {path}")


def latencies(paths: dict[str, pathlib.Path], inputs: pathlib.Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a call of each artefact, by threads and batch size, and the memory that it takes."""
    script = ROOT / "scripts" / "measure_artefact.py"
    workers = {
        (name, threads): subprocess.Popen(
            [sys.executable, str(script), str(path), str(inputs), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, path in paths.items()
        for threads in (1, 0)
    }
    found = {key: {batch: [] for batch in BATCHES} for key in workers}
    for _ in range(rounds):
        for key, worker in workers.items():
            for batch in BATCHES:
                worker.stdin.write(f"{batch}\n")
                worker.stdin.flush()
                found[key][batch].append(float(worker.stdout.readline()))
    memory = {key: int(worker.communicate()[0]) for key, worker in workers.items()}
    ...
