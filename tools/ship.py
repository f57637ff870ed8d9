"""Makes a trained model small in every way there is, and prints what each costs.

    python tools/ship.py runs/my_run
    python tools/ship.py runs/my_run --data-dir ~/tensorflow_datasets --rounds 5

The model goes through scripts/export.py in every format and with every quantization: for LiteRT weights in int8
(dynamic), weights in float16, or weights and calculations in int8; for networks of dense and embedding layers alone
also Keras' own int8. For each: size on disk; the model's parameters, and how many are not zero;
accuracy, or mean squared error, on the whole test split, as the artefact answers; the time of one call with one input
and with 64, with one thread and with one per core, as the median over rounds in which the artefacts take turns, each in
a process of its own; and the memory that a process holds more with it. ONNX needs the packages of `[export]`, and is
left out without them. Written to results/ship-RECIPE.json and README.md, but for runs of `--smoke`, on a sample or on
files of your own.
"""

import dataclasses
import importlib.util
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from common import artefacts
from common.batches import Split
from common.cli import Parser, run_script
from common.hardware import describe_machine
from common.records import load_program, provenance

import keras
import numpy as np
from publish import publish
from published import without, without_data_dir, write_record
from rich.console import Console
from rich.table import Table
from tables import shipped_rows

ROOT = pathlib.Path(__file__).parent.parent
BATCHES = (1, 64)
export = load_program(ROOT / "scripts" / "export.py")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--data-dir", default="", help="folder of prepared TFDS data, where it is not the run's")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    arguments = parser.parse_args()
    record = ship(arguments.run_dir, arguments.data_dir, arguments.rounds)
    Console(width=max(Console().width, 140)).print(as_table(record))  # Cut figures say nothing.
    if record["smoke"] or record["data"]["source"] in ("sample", "files"):
        print(
            f"not recorded: a run on {record['data']['name']} ({record['data']['source']}), not on all of the real data"
        )
        return
    path = write_record(f"ship-{record['recipe']}", record)
    publish()
    print(f"record: {path}")


def ship(run_dir: pathlib.Path, data_dir: str, rounds: int) -> dict[str, Any]:
    """The record: what was measured of each variant, on which machine, data and weights."""
    result, model = artefacts.load_run(run_dir)
    model = export.in_float32(model)
    data = export.run_data(result, data_dir)
    compared, examples = export.first_inputs(data, export.COMPARED), data.train.arrays(slice(export.EXAMPLES))[0]
    weights = model.get_weights()
    counts = {"parameters": sum(map(np.size, weights)), "nonzero": int(sum(map(np.count_nonzero, weights)))}
    variants, paths = {}, {}
    for form, quantization in variants_of(model):
        name = form if quantization == "none" else f"{form} {quantization}"
        paths[name] = run_dir / "exported" / quantization / (result["recipe"] + export.SUFFIXES[form])
        tolerance = export.TOLERANCES[quantization]
        parity = export.export(model, result, form, paths[name], compared, tolerance, quantization, examples)
        if not parity["passed"]:
            print(f"parity failed: {name} answers otherwise than the model: {parity}", file=sys.stderr)
            sys.exit(3)
        answers = artefacts.load(paths[name]).answer(data.test.inputs.numpy())
        variants[name] = {"parity": parity, "bytes": size(paths[name]), **counts, **metric(answers, data.test)}
    with tempfile.TemporaryDirectory() as folder:
        inputs = pathlib.Path(folder, "inputs.npy")
        largest, _ = data.test.arrays(slice(max(BATCHES)))
        np.save(inputs, largest.astype("S") if largest.dtype == object else largest)
        for name, found in latencies(paths, inputs, rounds).items():
            variants[name] |= found
    return {
        "recipe": result["recipe"],
        "data": result["data"],
        "weights_sha256": result["weights_sha256"],
        "seed": result["seed"],
        "trained_by": shlex.join(without(shlex.split(result["command"]), "--data-dir", "--run-dir")),
        "rounds": rounds,
        "smoke": result["config"]["smoke"],
        "variants": variants,
        "hardware": dataclasses.asdict(describe_machine()),
        **provenance(),
        "command": shlex.join(["python", "tools/ship.py", *without_data_dir(sys.argv[1:])]),
    }


def variants_of(model: keras.Model) -> list[tuple[str, str]]:
    """Formats and quantizations, as scripts/export.py calls them, that suit a model."""
    convolutions = any(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
    variants = [(form, each) for form, kinds in export.QUANTIZATIONS.items() for each in kinds]
    if not importlib.util.find_spec("tf2onnx"):
        print("no tf2onnx: ONNX is left out; .venv/bin/pip install -e '.[export]'")
        variants = [variant for variant in variants if variant[0] != "onnx"]
    return [variant for variant in variants if not (convolutions and variant == ("keras", "int8"))]


def size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def metric(answers: np.ndarray, test: Split) -> dict[str, float]:
    """Accuracy, or of values the mean squared error."""
    targets = test.targets.numpy()
    if targets.shape[1] > 1:
        return {"accuracy": float(np.mean(answers.argmax(axis=1) == targets.argmax(axis=1)))}
    return {"mse": float(np.mean((answers - targets) ** 2))}


def latencies(paths: dict[str, pathlib.Path], inputs: pathlib.Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of a call of each artefact, by threads and batch size, and the memory that it takes."""
    script = ROOT / "tools" / "measure_artefact.py"
    workers = {
        (name, threads): subprocess.Popen(
            [sys.executable, str(script), str(path), str(inputs), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends them.
        )
        for name, path in paths.items()
        for threads in (1, 0)
    }
    found = {key: {batch: [] for batch in BATCHES} for key in workers}
    try:
        for _ in range(rounds):
            for key, worker in workers.items():
                for batch in BATCHES:
                    worker.stdin.write(f"{batch}\n")
                    worker.stdin.flush()
                    found[key][batch].append(float(worker.stdout.readline()))
        memory = {key: int(worker.communicate()[0]) for key, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    return {
        name: {
            "seconds": {
                f"batch {batch}, {'one thread' if threads else 'all threads'}": statistics.median(
                    found[name, threads][batch]
                )
                for threads in (1, 0)
                for batch in BATCHES
            },
            "memory_bytes": memory[name, 0],
        }
        for name in paths
    }


def as_table(record: dict[str, Any]) -> Table:
    """The record for people."""
    header, *rows = shipped_rows(record)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    run_script(main)
