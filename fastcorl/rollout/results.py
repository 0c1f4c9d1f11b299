"""Finished rows as the records that the rest of a step reads."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from fastcorl.model import Policy
from fastcorl.records import ImageSamples, TextSamples
from fastcorl.rollout.rows import ImageRows, TextRows

DECODE_PIXELS_AT_ONCE = 16 * 384**2


class Drawings:
    """The first `count` drawings of a call. Their codes become pixels in batches of neighbours, which are the same in
    whatever order drawings finish.

    With `announce` a batch is decoded as soon as its last drawing is finished, on `stream` if there is one, beside the
    one that samples; `announce` is called after the last batch, with that stream as the current one.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        policy: Policy,
        rows: ImageRows,
        count: int,
        announce: Callable[[ImageSamples], None] | None = None,
        stream: torch.cuda.Stream | None = None,
    ):
        self.policy, self.rows, self.count, self.announce, self._stream = policy, rows, count, announce, stream
        size, device = policy.image_size, policy.device
        self.pixels = torch.empty(count, 3, size, size, device=device)
        at_once = max(1, DECODE_PIXELS_AT_ONCE // size**2)
        self._batches = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
        self._finished: set[int] = set()

    @torch.inference_mode(False)
    def finish(self, places: Iterable[int]) -> None:
        """The drawings at these places are sampled."""
        if not self._batches:
            return
        self._finished.update(places)
        whole = [batch for batch in self._batches if self._finished.issuperset(batch)]
        self._batches = [batch for batch in self._batches if batch not in whole]
        with self._beside():
            for batch in whole:
                part = slice(batch.start, batch.stop)
                self.pixels[part] = self.policy.decode_images(self.rows.out_tokens[part].clone())
        if self.announce is not None and not self._batches:
            samples = self._samples()
            with self._beside():
                self.announce(samples)

    def samples(self) -> ImageSamples:
        """All of them, when every row of the call has ended."""
        self.finish(range(self.count))
        if self._stream is not None:
            torch.cuda.current_stream(self.policy.device).wait_stream(self._stream)
        return self._samples()

    def _samples(self) -> ImageSamples:
        rows = self.rows
        tokens, log_probs, cond_log_probs = (
            each[: self.count].clone() for each in (rows.out_tokens, rows.out_log_probs, rows.out_cond_log_probs)
        )
        return ImageSamples(tokens, log_probs, cond_log_probs, self.pixels)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the other stream, once it has what this one has written."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.policy.device))
        with torch.cuda.stream(self._stream):
            yield


def no_drawings(policy: Policy) -> ImageSamples:
    blank = torch.zeros(0, policy.num_image_tokens, device=policy.device)
    pixels = torch.zeros(0, 3, policy.image_size, policy.image_size, device=policy.device)
    return ImageSamples(blank.long(), blank, blank.clone(), pixels)


def text_samples(policy: Policy, texts: TextRows | None, count: int) -> TextSamples:
    """The first `count` answers."""
    if not count:
        nothing = torch.zeros(0, 0, device=policy.device)
        lengths = torch.zeros(0, dtype=torch.int64, device=policy.device)
        return TextSamples(nothing.long(), lengths, nothing, [], lengths.bool())
    lengths = texts.out_lengths[:count].clone()
    longest = int(lengths.max())
    beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    tokens = texts.out_tokens[:count, :longest].masked_fill(beyond, policy.encoder.pad_id)
    answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return TextSamples(
        tokens=tokens,
        lengths=lengths,
        # What was written there for an earlier call is not this one's.
        log_probs=texts.out_log_probs[:count, :longest].masked_fill(beyond, 0.0),
        answers=[policy.encoder.decode(answer) for answer in answers],
        finished=texts.out_finished[:count].clone(),
    )
