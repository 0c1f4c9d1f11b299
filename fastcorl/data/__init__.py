"""Rows in, prompts out: loading, validation, and which prompts a step takes."""

from fastcorl.data.images import ImageError, decode_image
from fastcorl.data.prompts import PromptData
from fastcorl.data.rows import Rows, load_rows
from fastcorl.data.sampler import PromptSampler
from fastcorl.data.validation import validate_rows

__all__ = ["ImageError", "PromptData", "PromptSampler", "Rows", "decode_image", "load_rows", "validate_rows"]
