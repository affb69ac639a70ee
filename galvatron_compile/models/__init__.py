"""Models by name: built-in shapes, Hugging Face configs, and the user's own functions.

Importing this package does not import torch.
"""

from galvatron_compile.models.families import FAMILIES, family
from galvatron_compile.models.load import Workable, load_model, load_shape
from galvatron_compile.models.shape import DecoderShape

__all__ = ["FAMILIES", "DecoderShape", "Workable", "family", "load_model", "load_shape"]
