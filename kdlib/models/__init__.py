"""Models: load a teacher, build a student, and reach the parts that training and measuring need."""

from kdlib.models.adapters import lora, merge
from kdlib.models.counting import Operations, extent, operations, parameters_by_component, window_lengths
from kdlib.models.loading import load, load_teacher, load_tokenizer
from kdlib.models.parts import attention_mask, body, has_linear_head, head, precision
from kdlib.models.saving import save
from kdlib.models.shapes import Shape, build

__all__ = [
    "Operations",
    "Shape",
    "attention_mask",
    "body",
    "build",
    "extent",
    "has_linear_head",
    "head",
    "load",
    "load_teacher",
    "load_tokenizer",
    "lora",
    "merge",
    "operations",
    "parameters_by_component",
    "precision",
    "save",
    "window_lengths",
]
