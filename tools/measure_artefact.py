"""Measures the latency and memory of a model in a separate process, for tools/ship.py.

    python tools/measure_artefact.py runs/my_run/exported/mnist_cnn.tflite inputs.npy --threads 1

Loads the model, reads one batch size per line from standard input, and prints the median seconds per call for each. At
the end of input, prints the increase in memory since before the model was loaded, in bytes.
"""

import pathlib
import statistics
import sys
import time

from common import artefacts
from common.cli import Parser, run_script

import numpy as np
import psutil
import tensorflow as tf

CALLS = 30


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=pathlib.Path, help="folder of a run, or what scripts/export.py wrote")
    parser.add_argument("inputs", type=pathlib.Path, help="inputs, a file from numpy.save")
    parser.add_argument("--threads", type=int, default=0, help="threads per operation; 0: one per core")
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    inputs = np.load(arguments.inputs)
    inputs = inputs.astype(object) if inputs.dtype.kind == "S" else inputs
    before = psutil.Process().memory_info().rss
    predict = artefacts.load(arguments.model, arguments.threads).answer
    for line in sys.stdin:
        batch, seconds = inputs[: int(line)], []
        for _ in range(CALLS + 3):  # The first 3 calls are for warm-up.
            start = time.perf_counter()
            predict(batch)
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds[3:]), flush=True)
    print(psutil.Process().memory_info().rss - before)


if __name__ == "__main__":
    run_script(main)
