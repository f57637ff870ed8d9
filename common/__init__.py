"""What every recipe shares: data, hardware, batches, runs and evaluation.

TensorFlow is imported here first, quietly, so that the order of imports in a recipe does not matter.
"""

from common import startup as startup
