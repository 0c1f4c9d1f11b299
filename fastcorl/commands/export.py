"""`fastcorl export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastcorl.errors import UserError
from fastcorl.places import check_new_folder, model_folder


@dataclass
class Export:
    """Write a Janus in the transformers format, or back in the original layout."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Folder or hub name: the original layout (deepseek-ai/Janus-Pro-1B, mm-vl/ULM-R1) or the transformers format."""
    out: Path
    """New folder."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None keeps it."""
    to: Literal["transformers", "multi_modality"] = "transformers"
    """multi_modality is the original layout."""
    like: str | None = None
    """With --to multi_modality: the original checkpoint that the model descends from. Its configuration, tokenizer and
    processor files are copied."""

    def run(self) -> None:
        check_new_folder(self.out, f"--out {self.out}")
        if (self.to == "multi_modality") != (self.like is not None):
            raise UserError("--to multi_modality needs --like, the original checkpoint; nothing else takes it")
        model_folder(self.source, "--from")
        if self.like is not None:
            model_folder(self.like, "--like")

        import torch

        from fastcorl.model import convert
        from fastcorl.runtime.card_parts import CARD
        from fastcorl.runtime.durable import write_text
        from fastcorl.runtime.model_card import conversion_card

        dtype = getattr(torch, self.dtype) if self.dtype else None
        with _flag("--like"):
            like = convert.checkpoint_folder(self.like) if self.like is not None else None
            if like is not None and convert.layout(like) != "multi_modality":
                raise UserError(f"{like}: is not in the original layout, multi_modality")
        with _flag("--from"):
            folder = convert.checkpoint_folder(self.source)
            kind = convert.layout(folder)
            if kind not in ("multi_modality", "janus"):
                raise UserError(f"{folder}: is a {kind!r} model, not a Janus")
            if kind == self.to:
                raise UserError(f"{folder}: is in the original layout already")
            if like is not None:
                report = convert.restore_checkpoint(folder, like, self.out, dtype)
            elif kind == "multi_modality":
                report = convert.convert_checkpoint(folder, self.out, dtype)
            else:
                report = convert.rewrite_checkpoint(folder, self.out, dtype)
        weights = str(report.dtype).removeprefix("torch.")
        if self.to == "transformers":  # which is what cards say how to load
            write_text(self.out / CARD, conversion_card(self.source, folder, weights))
        size = f"{report.parameters / 1e6:.1f} M numbers in {report.tensors} tensors"
        left = f"; {len(report.unused)} unused tensors left out" if report.unused else ""
        print(f"{self.out}: {size}, {weights}{left}")


@contextmanager
def _flag(name: str) -> Iterator[None]:
    """Begin the message of a UserError with the flag that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} {error}") from error
