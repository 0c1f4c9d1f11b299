"""The device's side of a call: prefill, decode steps and sampling."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcorl.model import Policy
from fastcorl.rollout.decoder import Decoder
from fastcorl.rollout.decoding import RowCache
from fastcorl.rollout.graphs import StepGraphs, bucket
from fastcorl.rollout.prefill import Prefiller, Source
from fastcorl.rollout.requests import Request
from fastcorl.rollout.rows import ImageRows, TextRows
from fastcorl.rollout.sampling import SamplingParams


class Sizes(NamedTuple):
    """What a worker's buffers are made for: numbers of drawings, of rows per drawing, and of answers; the lengths of
    drawings, answers and prompts (without the last token); rows that share a prompt; pages of the cache."""

    images: int
    copies: int
    texts: int
    image_tokens: int
    text_tokens: int
    longest: int
    group_size: int
    pages: int

    def hold(self, other: "Sizes") -> bool:
        """Whether buffers of these sizes serve a call of others."""
        return self.fit(other) and all(mine >= theirs for mine, theirs in zip(self, self.both(other), strict=True))

    def fit(self, other: "Sizes") -> bool:
        """Whether one worker can serve calls of both sizes: what both sample has the same form."""
        images = not (self.images and other.images) or (self.copies, self.image_tokens) == (
            other.copies,
            other.image_tokens,
        )
        return images and (not (self.texts and other.texts) or self.text_tokens == other.text_tokens)

    def both(self, other: "Sizes") -> "Sizes":
        """Sizes that hold both."""
        larger = Sizes(*map(max, self, other))
        drawing, answering = (self if self.images else other), (self if self.texts else other)
        return larger._replace(
            copies=drawing.copies, image_tokens=drawing.image_tokens, text_tokens=answering.text_tokens
        )


class Inputs(NamedTuple):
    """What one call brings: prompts that requests name by their index, per question the (T, hidden) features of its
    image, the (codes, hidden) embeddings of image codes, and the sources of unconditional prompts by length."""

    draw_ids: Sequence[Sequence[int]]
    ask_ids: Sequence[Sequence[int]]
    features: Sequence[torch.Tensor]
    code_table: torch.Tensor | None  # None where nothing is drawn
    unconditional: dict[int, Source]


class PolicyWorker:
    """Runs a policy on rows. Its buffers stay where they are from call to call, so that CUDA graphs stay valid."""

    def __init__(
        self,
        policy: Policy,
        decoder: Decoder,
        prefiller: Prefiller,
        cache: RowCache,
        params: SamplingParams,
        sizes: Sizes,
        *,
        graphs: bool,
    ):
        self.policy, self.decoder, self.prefiller, self.cache = policy, decoder, prefiller, cache
        self.params, self.sizes = params, sizes
        device, end_id = policy.device, policy.encoder.eos_id
        self.images = ImageRows(sizes.images, sizes.image_tokens, sizes.copies, device)
        self.texts = TextRows(sizes.texts, sizes.text_tokens, end_id, device)
        self.graphs = StepGraphs(device) if graphs else None
        self.inputs: Inputs | None = None
        self.prefilled: dict[tuple[str, int], Source] = {}

    def end(self) -> None:
        """Let go of what the call brought."""
        self.inputs, self.prefilled = None, {}

    def begin(self, inputs: Inputs) -> None:
        """Forget the last call."""
        self.inputs, self.prefilled = inputs, {}
        self.images.clear()
        self.texts.clear()
        self.cache.set_images([])
        self.cache.keep_texts([])

    def prefill_images(self, requests: Sequence[Request]) -> list[Source]:
        drawn = self._prefill(requests, self.inputs.draw_ids, None)
        if self.sizes.copies == 1:
            return drawn
        return drawn + [self.inputs.unconditional[request.prefix + 1] for request in requests]

    def prefill_texts(self, requests: Sequence[Request]) -> list[Source]:
        return self._prefill(requests, self.inputs.ask_ids, self.inputs.features)

    def _prefill(
        self, requests: Sequence[Request], prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor] | None
    ) -> list[Source]:
        """Every prompt once."""
        known, wanted = self.prefilled, dict.fromkeys((request.modality, request.prompt) for request in requests)
        new = [key for key in wanted if key not in known]
        sources = self.prefiller.prompts(
            [prompts[prompt] for _, prompt in new],
            [features[prompt] if features is not None else None for _, prompt in new],
        )
        known |= dict(zip(new, sources, strict=True))
        return [known[request.modality, request.prompt] for request in requests]

    def settle(self, admitted: Sequence[Request], *, more: bool) -> None:
        """The cache has what these requests start from: drop it here. If `more` of their kind wait, the last prompt's
        next rows may be among them."""
        last = (admitted[-1].modality, admitted[-1].prompt) if more else None
        kept = self.prefilled.get(last)
        for key in [key for key in self.prefilled if key[0] == admitted[0].modality and key != last]:
            prefill = self.prefilled.pop(key).prefill
            if kept is None or prefill is not kept.prefill:
                prefill.keys.clear()
                prefill.values.clear()

    def sample_images(self, hidden: torch.Tensor, rows: slice) -> None:
        self.images.sample(self.decoder.image_logits(hidden), self.params, rows)

    def sample_texts(self, hidden: torch.Tensor, rows: slice) -> None:
        self.texts.sample(self.decoder.text_logits(hidden), self.params, rows)

    def step(self) -> None:
        if self.graphs is None:
            self._step(self.images.count, self.texts.count)
        else:
            self.graphs.run(self._step, bucket(self.images.count), bucket(self.texts.count))

    def _step(self, images: int, texts: int) -> None:
        """Feed the first `images` drawings and `texts` answers their last tokens and sample the next."""
        embeds = []
        if images:
            embeds.append(F.embedding(self.images.tokens[:, :images].flatten(), self.inputs.code_table))
        if texts:
            embeds.append(self.policy.embed_text(self.texts.tokens[0, :texts]))
        self.cache.begin_step(images, texts)
        hidden = self.decoder(embeds[0] if len(embeds) == 1 else torch.cat(embeds), self.cache)
        self.cache.advance()
        image_rows = images * self.sizes.copies
        if images:
            self.sample_images(hidden[:image_rows], slice(0, images))
        if texts:
            self.sample_texts(hidden[image_rows:], slice(0, texts))
