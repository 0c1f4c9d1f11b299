"""`fastcorl generate`."""

from dataclasses import dataclass
from pathlib import Path

from fastcorl.commands.shared import check_counts, load, sample, sampling_params, writable_file, writable_folder
from fastcorl.places import check_janus


@dataclass
class Generate:
    """Draw pictures of a caption."""

    prompt: str
    """What to draw."""
    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    grid: Path = Path("drawing.png")
    """Picture that shows all drawings."""
    out: Path | None = None
    """Folder for each drawing as a picture of its own."""
    num: int = 1
    """How many drawings."""
    seed: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    guidance: float = 1.0
    """Classifier-free guidance; Janus-Pro is published with 5, the quickstart model is trained at 1."""
    top_k: int | None = None
    """Draw each token from the k most likely ones."""
    top_p: float | None = None
    """Draw each token from the most likely ones that have together this probability."""
    max_rows: int | None = None
    """Rows decoded at once, two per guided drawing; None is all."""
    device: str = "auto"

    def run(self) -> None:
        check_counts(self, "num", "max_rows")
        check_janus(self.model, "--model")
        writable_file("--grid", self.grid, ".png", ".jpg", ".jpeg", ".webp")
        if self.out is not None:
            writable_folder("--out", self.out)

        import numpy as np
        import torch
        from PIL import Image

        from fastcorl.records import Prompt

        params = sampling_params(self, guidance=self.guidance)
        policy = load(self.model, self.device)
        blank = Image.new("RGB", (policy.image_size, policy.image_size))
        prompt = Prompt("cli", self.prompt, blank, "", "", "OE")
        rollout = sample(self, policy, prompt, params, "drawing", self.num * policy.num_image_tokens, answer=False)
        columns = min(8, self.num)
        pixels = rollout.images.pixels.cpu()
        rows = -(-self.num // columns)
        # Tiny drawings are enlarged so that a viewer shows them.
        factor = max(1, 128 // policy.image_size)

        def save(pixels: torch.Tensor, path: Path) -> None:
            image = Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path)

        if self.out is not None:
            for index, drawing in enumerate(pixels):
                save(drawing, self.out / f"{index:03d}.png")
        filled = torch.cat([pixels, pixels.new_zeros(rows * columns - self.num, *pixels.shape[1:])])
        save(filled.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3), self.grid)
        print(f"{self.num} drawing{'s' * (self.num > 1)} of {self.prompt!r}: {self.grid}")
