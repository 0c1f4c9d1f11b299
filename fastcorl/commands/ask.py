"""`fastcorl ask`."""

from dataclasses import dataclass
from pathlib import Path

from fastcorl.commands.shared import check_counts, load, sample, sampling_params
from fastcorl.errors import UserError
from fastcorl.places import check_janus


@dataclass
class Ask:
    """Ask a question about a picture."""

    image: Path
    """The picture."""
    question: str
    model: str = "quickstart"
    """Folder or hub name of a Janus in the transformers format."""
    num: int = 1
    """How many answers."""
    seed: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    max_new_tokens: int = 512
    """Longest answer in tokens; less where the model's context ends."""
    top_k: int | None = None
    """Draw each token from the k most likely ones."""
    top_p: float | None = None
    """Draw each token from the most likely ones that have together this probability."""
    max_rows: int | None = None
    """Answers decoded at once; None is all."""
    device: str = "auto"

    def run(self) -> None:
        check_counts(self, "num", "max_rows")
        if not self.image.is_file():
            raise UserError(f"--image {self.image}: no such file")
        check_janus(self.model, "--model")

        from fastcorl.data import ImageError, decode_image
        from fastcorl.records import Prompt

        sampling_params(self, max_new_tokens=self.max_new_tokens)
        try:
            image = decode_image(self.image.read_bytes(), None)
        except ImageError as error:
            raise UserError(f"--image {self.image}: {error}") from error
        policy = load(self.model, self.device)
        room = policy.janus.config.text_config.max_position_embeddings - len(policy.encoder.ask(self.question))
        if room < 1:
            raise UserError(f"--question is too long: {1 - room} tokens over the model's context")
        params = sampling_params(self, max_new_tokens=min(self.max_new_tokens, room))
        prompt = Prompt("cli", "", image, self.question, "", "OE")
        rollout = sample(self, policy, prompt, params, "answering", None, draw=False)
        for answer in rollout.texts.answers:
            print(answer)
