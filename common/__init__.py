"""Shared code of all recipes: data, hardware, batches, runs and evaluation.

Imports TensorFlow first, without its log messages, so that the import order in a recipe does not matter.
"""

from common import startup as startup
