"""Imports TensorFlow without its start-up banner."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

# These recipes are TensorFlow's, whatever backend others are set to.
os.environ["KERAS_BACKEND"] = "tensorflow"
# What matters comes as an exception; the native log repeats it, among much that is harmless.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# By itself, TensorFlow 2.21 uses oneDNN on processors with VNNI only, but those with AVX2 alone gain as well: a step of
# cifar10_cnn takes three quarters of the time.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextlib.contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Holds back what native code writes to file descriptor 2; shows it after all if the block fails.

    `TF_CPP_MIN_LOG_LEVEL` is not enough: TensorFlow 2.21 prints its oneDNN and CUDA lines before it has read that
    variable ("All log messages before absl::InitializeLog() is called are written to STDERR").
    """
    saved = os.dup(2)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


with quiet_native_stderr():
    import tensorflow as tf

    # In Python, it warns of several models in one process ("retracing").
    tf.get_logger().setLevel("ERROR")
    # Once TensorFlow has touched a GPU, this fails. The first look for GPUs prints lines of its own.
    for gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)
