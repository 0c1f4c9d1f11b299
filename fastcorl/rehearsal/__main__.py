"""`python -m fastcorl.rehearsal --out FOLDER [--seed 0]`: make the files that configs/rehearsal.yaml names."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from fastcorl.errors import UserError, main_guard
from fastcorl.rehearsal.data_sets import QUESTION_TYPES, make_rows, write_rows
from fastcorl.rehearsal.judges import write_blip, write_vgg16
from fastcorl.rehearsal.policy import make_janus, make_processor
from fastcorl.rehearsal.text_head import fit_text_head

NUM_STATES = 8


@main_guard()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcorl.rehearsal", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and data sets (100 MB)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: {error.strerror}; give a folder that can be written") from error
    write_all(arguments.out, arguments.seed)
    print(
        f"{arguments.out}: a Janus, a BLIP, VGG-16 and {len(QUESTION_TYPES)} data sets; next is configs/rehearsal.yaml"
    )


def write_all(out: Path, seed: int) -> None:
    """Everything that configs/rehearsal.yaml names, below `out`."""
    logging.disable_progress_bar()
    rows = {name: make_rows(name, seed) for name in QUESTION_TYPES}
    for name, mine in rows.items():
        write_rows(mine, out / "data" / name)
    every = [row for mine in rows.values() for row in mine]
    captions = [row["prompt"] for row in every]
    processor = make_processor(
        [text for row in every for text in (row["prompt"], row["qa_problem"], row["qa_solution"])]
    )
    janus = make_janus(processor, seed)
    fit_text_head(janus, processor, every, num_states=NUM_STATES)
    janus.to(torch.bfloat16).save_pretrained(out / "janus")  # as Janus-Pro is published
    processor.save_pretrained(out / "janus")
    write_blip(out / "blip-image-captioning-base", captions, seed)
    write_vgg16(out / "weights" / "vgg16-397923af.pth", seed)


if __name__ == "__main__":
    main()
