"""`python -m fastcorl.quickstart.warm_start [--output DIR] [--scale 1.0]`: remake the shipped weights."""

import argparse
from pathlib import Path

import torch
from transformers import BlipForConditionalGeneration, JanusForConditionalGeneration, JanusProcessor

from fastcorl.quickstart.warm_start.architecture import make_processor, make_tokenizer, vq_config
from fastcorl.quickstart.warm_start.captioner import make_image_processor, train_captioner
from fastcorl.quickstart.warm_start.language import Cycle, make_janus, train_language, train_letters
from fastcorl.quickstart.warm_start.vision import train_vision
from fastcorl.quickstart.warm_start.vq import train_vq

VQ_STEPS, VISION_STEPS, LETTER_STEPS, CAPTIONER_STEPS = 1800, 1500, 200, 1000
# The letters come between the two, and cost some of what the first has taught.
LANGUAGE_CYCLES = (Cycle(3600, 1.5e-3, concludes=False), Cycle(500, 1.0e-3, concludes=True))
SEED = 0


def save_janus(janus: JanusForConditionalGeneration, processor: JanusProcessor, folder: Path) -> None:
    """Weights in 16 bits; float16, because its ten bits of mantissa lose less of such small weights than bfloat16."""
    janus.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_captioner(blip: BlipForConditionalGeneration, processor: JanusProcessor, folder: Path) -> None:
    blip.to(torch.float16).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcorl.quickstart.warm_start", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "weights")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the training steps (tests use a tiny one)"
    )
    arguments = parser.parse_args()

    def steps(full: int) -> int:
        return max(2, round(full * arguments.scale))

    processor = make_processor(make_tokenizer())
    vq = train_vq(vq_config(), steps=steps(VQ_STEPS), seed=SEED)
    janus = make_janus(processor, vq, SEED)
    train_vision(janus.model.vision_model, steps=steps(VISION_STEPS), seed=SEED)
    first, second = (cycle._replace(steps=steps(cycle.steps)) for cycle in LANGUAGE_CYCLES)
    train_language(janus, processor, first, seed=SEED)
    train_letters(janus, processor, steps=steps(LETTER_STEPS), seed=SEED)
    train_language(janus, processor, second, seed=SEED + 1)
    blip = train_captioner(
        processor.tokenizer, vq, vision_steps=steps(VISION_STEPS), steps=steps(CAPTIONER_STEPS), seed=SEED
    )
    save_janus(janus, processor, arguments.output / "janus")
    save_captioner(blip, processor, arguments.output / "captioner")


if __name__ == "__main__":
    main()
