"""Imports TensorFlow without its log messages."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from common.console import status_line

# The recipes need the TensorFlow backend. This overrides the user's Keras configuration.
os.environ["KERAS_BACKEND"] = "tensorflow"
# TensorFlow would look for Keras 2.
os.environ["TF_USE_LEGACY_KERAS"] = "0"
# Errors are raised as exceptions; the native log only repeats them among harmless messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# By default, TensorFlow 2.21 uses oneDNN only on CPUs with VNNI. It also helps CPUs with only AVX2: a training step of
# cifar10_cnn takes three quarters of the time.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextlib.contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Suppresses output of native code to file descriptor 2; prints it if the block raises an exception.

    `TF_CPP_MIN_LOG_LEVEL` is not enough: TensorFlow 2.21 prints its oneDNN and CUDA lines before it reads that
    variable ("All log messages before absl::InitializeLog() is called are written to STDERR").
    """
    saved = os.dup(2)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except Exception:
            captured.seek(0)
            os.write(saved, captured.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


with status_line(lambda: "importing TensorFlow"), quiet_native_stderr():
    import tensorflow as tf

    # TensorFlow's Python logger warns about retracing if a process builds several models.
    tf.get_logger().setLevel("ERROR")
    # This fails if GPUs are initialized already. Inside the block, because listing GPUs prints messages.
    for gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(gpu, True)
