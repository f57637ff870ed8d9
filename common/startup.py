"""Imports TensorFlow without its start-up banner, and out of the garbage collector's way."""

import contextlib
import gc
import os
import sys
import tempfile
import types
from collections.abc import Iterator

from common.cli import exit_when_stopped, terminals

# These recipes are TensorFlow's, whatever backend others are set to.
os.environ.update(KERAS_BACKEND="tensorflow")
# What matters comes as an exception; the native log repeats it, among much that is harmless.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# By itself, TensorFlow 2.21 uses oneDNN on processors with VNNI only, but those with AVX2 alone gain as well: a step of
# cifar10_cnn takes three quarters of the time.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextlib.contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Holds back what native code writes to file descriptor 2; shows it after all if the block fails.

    Setting `TF_CPP_MIN_LOG_LEVEL` is not enough: TensorFlow 2.21 prints its oneDNN and CUDA lines before
    its logging has read that variable ("All log messages before absl::InitializeLog() is called are
    written to STDERR").
    """
    try:
        saved = os.dup(2)
    except OSError:  # The process was started without a stderr: nothing to keep quiet.
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        terminals.append(saved)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            terminals.remove(saved)
            os.close(saved)


def is_program(frame: types.FrameType | None) -> bool:
    """Whether what imports `common` is a program that is run, and not, say, a test or a notebook."""
    while frame and frame.f_globals["__name__"].partition(".")[0] in ("common", "importlib"):
        frame = frame.f_back
    return frame is not None and frame.f_globals["__name__"] == "__main__" and "__file__" in frame.f_globals


# The imports take seconds. A signal would end them with a traceback from somewhere in their middle.
if is_program(sys._getframe()):
    exit_when_stopped("interrupted before it had begun")


# TensorFlow is 700,000 objects that stay. Python's garbage collector would go through them again and again, here, in
# training and at the end: 40 % of the time of a process that does nothing else.
collecting = gc.isenabled()
gc.disable()
with quiet_native_stderr():
    import tensorflow as tf

    # In Python, it warns of several models in one process ("retracing").
    tf.get_logger().setLevel("ERROR")
    # The first look for GPUs prints lines of its own.
    tf.config.list_physical_devices()
gc.freeze()
if collecting:
    gc.enable()
