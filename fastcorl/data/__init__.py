"""Rows in, prompts out: sources, validation, quarantine, and which prompts a step takes."""

from fastcorl.data.held_out import evaluation_order, hold_out, hold_out_of_stream
from fastcorl.data.images import ImageError, decode_image
from fastcorl.data.lengths import PromptLengths
from fastcorl.data.prompts import MapPrompts, PromptData, PromptSource
from fastcorl.data.quarantine import Quarantine
from fastcorl.data.rows import Rows, RowStream
from fastcorl.data.sampler import PromptSampler
from fastcorl.data.schema import Needs, Schema
from fastcorl.data.sources import load_rows, open_stream
from fastcorl.data.streaming import StreamPrompts
from fastcorl.data.validation import BadRow, PromptCheck, check_rows, examine

__all__ = [
    "BadRow",
    "ImageError",
    "MapPrompts",
    "Needs",
    "PromptCheck",
    "PromptData",
    "PromptLengths",
    "PromptSampler",
    "PromptSource",
    "Quarantine",
    "RowStream",
    "Rows",
    "Schema",
    "StreamPrompts",
    "check_rows",
    "evaluation_order",
    "decode_image",
    "examine",
    "hold_out",
    "hold_out_of_stream",
    "load_rows",
    "open_stream",
]
