"""Exports a trained model in every format and quantization, and compares size, accuracy, latency and memory.

    python tools/ship.py runs/my_run
    python tools/ship.py runs/my_run --data-dir ~/tensorflow_datasets --rounds 5

The model is exported with scripts/export.py. LiteRT supports int8 weights (dynamic), float16 weights, and int8 weights
and activations; Keras supports int8 for networks without convolutions. Measured for each artefact: size on disk; number
of parameters and of nonzero parameters; accuracy, or mean squared error, on the whole test split; latency of a call
with 1 and with 64 inputs, on one thread and on one thread per core; and the additional memory of the process. Each
artefact runs in its own process. The artefacts alternate, and latencies are medians over the rounds. ONNX is skipped
unless the packages of `[export]` are installed. Results are written to results/ship-RECIPE.json and docs/, except
for runs with `--smoke`, on a sample, or on your own files.
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
    parser.add_argument("--data-dir", default="", help="folder of prepared TFDS data, if not that of the run")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each (default: 5)")
    arguments = parser.parse_args()
    record = ship(arguments.run_dir, arguments.data_dir, arguments.rounds)
    Console(width=max(Console().width, 140)).print(as_table(record))  # Narrower columns would truncate the numbers.
    if record["smoke"] or record["data"]["source"] in ("sample", "files"):
        print(
            f"not recorded: a run on {record['data']['name']} ({record['data']['source']}), not on all of the real data"
        )
        return
    path = write_record(f"ship-{record['recipe']}", record)
    publish()
    print(f"record: {path}")


def ship(run_dir: pathlib.Path, data_dir: str, rounds: int) -> dict[str, Any]:
    """Exports and measures all variants, and returns the record."""
    result, model = artefacts.load_run(run_dir)
    model = export.in_float32(model)
    data = export.run_data(result, data_dir)
    inputs, examples = export.first_inputs(data, export.COMPARED), data.train.arrays(slice(export.EXAMPLES))[0]
    weights = model.get_weights()
    counts = {"parameters": sum(map(np.size, weights)), "nonzero": int(sum(map(np.count_nonzero, weights)))}
    variants, paths = {}, {}
    for form, quantization in variants_of(model):
        name = form if quantization == "none" else f"{form} {quantization}"
        paths[name] = run_dir / "exported" / quantization / (result["recipe"] + export.SUFFIXES[form])
        tolerance = export.TOLERANCES[quantization]
        parity = export.export(model, result, form, paths[name], inputs, tolerance, quantization, examples)
        if not parity["passed"]:
            print(f"parity failed: {name} differs from the model: {parity}", file=sys.stderr)
            sys.exit(3)
        outputs = artefacts.load(paths[name]).answer(data.test.inputs.numpy())
        variants[name] = {"parity": parity, "bytes": size(paths[name]), **counts, **metric(outputs, data.test)}
    with tempfile.TemporaryDirectory() as folder:
        inputs_file = pathlib.Path(folder, "inputs.npy")
        largest_batch, _ = data.test.arrays(slice(max(BATCHES)))
        np.save(inputs_file, largest_batch.astype("S") if largest_batch.dtype == object else largest_batch)
        for name, measured in latencies(paths, inputs_file, rounds).items():
            variants[name] |= measured
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
    """Returns the (format, quantization) pairs of scripts/export.py that support a model."""
    convolutions = any(isinstance(layer, keras.layers.Conv2D) for layer in model.layers)
    variants = [(form, kind) for form, kinds in export.QUANTIZATIONS.items() for kind in kinds]
    if not importlib.util.find_spec("tf2onnx"):
        print("no tf2onnx: ONNX is left out; .venv/bin/pip install -e '.[export]'")
        variants = [variant for variant in variants if variant[0] != "onnx"]
    return [variant for variant in variants if not (convolutions and variant == ("keras", "int8"))]


def size(path: pathlib.Path) -> int:
    """Returns the size in bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def metric(outputs: np.ndarray, test: Split) -> dict[str, float]:
    """Returns the accuracy for classes, or the mean squared error for values."""
    targets = test.targets.numpy()
    if targets.shape[1] > 1:
        return {"accuracy": float(np.mean(outputs.argmax(axis=1) == targets.argmax(axis=1)))}
    return {"mse": float(np.mean((outputs - targets) ** 2))}


def latencies(paths: dict[str, pathlib.Path], inputs: pathlib.Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures median seconds per call, by threads and batch size, and the memory of each artefact."""
    script = ROOT / "tools" / "measure_artefact.py"
    workers = {
        (name, threads): subprocess.Popen(
            [sys.executable, str(script), str(path), str(inputs), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only this process, which kills the workers.
        )
        for name, path in paths.items()
        for threads in (1, 0)
    }
    seconds = {key: {batch: [] for batch in BATCHES} for key in workers}
    try:
        for _ in range(rounds):
            for key, worker in workers.items():
                for batch in BATCHES:
                    worker.stdin.write(f"{batch}\n")
                    worker.stdin.flush()
                    seconds[key][batch].append(float(worker.stdout.readline()))
        memory = {key: int(worker.communicate()[0]) for key, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    return {
        name: {
            "seconds": {
                f"batch {batch}, {'one thread' if threads else 'all threads'}": statistics.median(
                    seconds[name, threads][batch]
                )
                for threads in (1, 0)
                for batch in BATCHES
            },
            "memory_bytes": memory[name, 0],
        }
        for name in paths
    }


def as_table(record: dict[str, Any]) -> Table:
    """Formats the record as a table for the terminal."""
    header, *rows = shipped_rows(record)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    run_script(main)
