# The stubs of TensorFlow that pyright brings lack much of its API (tf.random.experimental) and are wrong in places.
from typing import Any

def __getattr__(name: str) -> Any: ...
