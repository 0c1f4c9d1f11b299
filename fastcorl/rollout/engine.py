"""Samples drawings and answers together, with a policy's own weights."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from PIL.Image import Image

from fastcorl.errors import UserError
from fastcorl.model import Policy
from fastcorl.records import Prompt, Rollout
from fastcorl.rollout.decoder import Decoder, Rope
from fastcorl.rollout.decoding import CHECK_EVERY, Decoding
from fastcorl.rollout.graphs import bucket
from fastcorl.rollout.grouped_cache import GroupedCache
from fastcorl.rollout.paged_cache import PagedCache
from fastcorl.rollout.prefill import Prefiller, Source
from fastcorl.rollout.requests import Request, check_fits, image_requests, text_requests
from fastcorl.rollout.results import Drawings, no_drawings, text_samples
from fastcorl.rollout.room import PAGE, Room, private_pages
from fastcorl.rollout.sampling import SamplingParams
from fastcorl.rollout.worker import Inputs, PolicyWorker, Sizes


class RolloutEngine:
    """Generates rollouts. A row's tokens depend on its seed and prompt only, not on other rows, their order or number:
    on CUDA up to rounding, where products of another number of rows round otherwise.

    The engine reads the policy's parameters where they are. Building one after the optimizer has laid out its weights
    and keeping it is cheapest; weights may then change in place between calls.

    Args:
        max_rows: rows decoded side by side (a guided drawing takes two); None decodes all requests at once.
        kv_cache_tokens: tokens of KV cache in use at once; None is what the requests need, and on a GPU as much of it
            as there is memory for.
        cache: "paged" or "grouped" keys and values; None is paged on CUDA, and grouped on a CPU, where it is faster.
        backend: of the paged cache's kernels, as in `fastcorl_kernels`.
        graphs: step rounded numbers of rows over the paged cache, on CUDA as CUDA graphs; None is on CUDA.
        weight_version: an attribute, too. What was computed from the weights is kept for calls under the same version:
            count it up with every update. None computes it anew in every call.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_rows: int | None = None,
        kv_cache_tokens: int | None = None,
        cache: str | None = None,
        backend: str | None = None,
        graphs: bool | None = None,
        weight_version: int | None = None,
    ):
        self.policy = policy
        self.max_rows, self.kv_cache_tokens = max_rows, kv_cache_tokens
        self.cache = cache or ("paged" if policy.device.type == "cuda" else "grouped")
        if self.cache not in ("paged", "grouped"):
            raise ValueError(f"cache must be 'paged', 'grouped' or None, got {cache!r}")
        self.backend = backend
        self.graphs = self.cache == "paged" and (policy.device.type == "cuda" if graphs is None else graphs)
        self.decoder = Decoder(policy)
        self.context = policy.backbone.config.max_position_embeddings
        self.rope = Rope(policy.backbone, self.context)
        self.geometry = self.decoder.geometry
        self.prefiller = Prefiller(policy, self.decoder, self.rope)
        self._storage = self._pointers()
        self.weight_version = weight_version
        self._computed_from: int | None = None
        self._unconditional: dict[int, Source] = {}
        self._code_table: torch.Tensor | None = None
        self._code_versions: tuple[int, ...] = ()
        self._worker: PolicyWorker | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        *,
        draw: bool = True,
        answer: bool = True,
        seed: object = 0,
        progress: Callable[[int], None] | None = None,
        on_drawings: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Sample `group_size` drawings of each caption and as many answers to each question.

        Args:
            seed: identifies the call (say, run seed and step); rows add their prompt's id, their index and modality.
            progress: called now and then with the number of tokens sampled so far.
            on_drawings: called once, with the rollout without its answers, as soon as every drawing is finished and
                decoded, while answers may go on; on CUDA the current stream is then the one that decodes.

        Raises:
            UserError: for a request that cannot fit the model's context, `max_rows` or `kv_cache_tokens`; nothing has
                run then.
            RuntimeError: when a parameter has moved to other memory since the engine was built.
        """
        policy, encoder = self.policy, self.policy.encoder
        self._check_storage()
        draw_ids = [encoder.draw(prompt.caption) for prompt in prompts] if draw else []
        ask_ids = [encoder.ask(prompt.question, prompt.question_type) for prompt in prompts] if answer else []
        rows = len(prompts) * group_size
        guided = params.guidance != 1
        drawings = image_requests(prompts, draw_ids, group_size, seed, guided=guided)
        answers = text_requests(prompts, ask_ids, group_size, seed)
        sizes = self._sizes(drawings, answers, params, group_size)
        room = Room(self.max_rows, sizes.pages, self._why_pages())
        check_fits(drawings, sizes.image_tokens, "a drawing", room=room, context=self.context)
        check_fits(answers, sizes.text_tokens, "an answer", room=room, context=self.context)
        features = self._vision_features([prompt.image for prompt in prompts]) if ask_ids else None
        rollout = Rollout(
            prompts=list(prompts),
            group_size=group_size,
            images=None,
            texts=None,
            draw_ids=draw_ids,
            uncond_ids=[encoder.unconditional(len(ids)) for ids in draw_ids],
            ask_ids=ask_ids,
            image_token_id=encoder.image_id,
            vision_features=features,
        )
        announce = None if on_drawings is None else lambda images: on_drawings(replace(rollout, images=images))
        worker = drawn = None
        if drawings or answers:
            with torch.inference_mode():
                self._refresh()
                worker = self._worker_for(sizes, params)
                codes = self._codes() if drawings else None
                chain = self._unconditional_sources({len(ids) for ids in draw_ids}) if guided and drawings else {}
                if drawings:
                    drawn = Drawings(policy, worker.images, rows, announce, self._beside if announce else None)
                try:
                    worker.begin(Inputs(draw_ids, ask_ids, features, codes, chain))
                    Decoding(
                        worker,
                        room,
                        drawings,
                        answers,
                        check_every=CHECK_EVERY[policy.device.type],
                        progress=progress,
                        finish_drawings=drawn.finish if drawings and announce else None,
                    ).run()
                except BaseException:
                    self._worker = None  # its state is of no use to another call
                    raise
                worker.end()
        return replace(
            rollout,
            images=(drawn.samples() if drawn is not None else no_drawings(policy)) if draw else None,
            texts=text_samples(policy, worker and worker.texts, rows) if answer else None,
        )

    @torch.no_grad()
    def hidden_states(
        self, sequences: Sequence[Sequence[int]], features: Sequence[torch.Tensor | None] | None = None
    ) -> list[torch.Tensor]:
        """Final hidden states (L_i, hidden) of token sequences, for scoring; nothing is sampled.

        `features[i]` are the (T, hidden) image features that stand at the placeholders of sequence i, None without.
        """
        if features is None:
            features = [None] * len(sequences)
        self._check_storage()
        longest = max(map(len, sequences), default=0)
        if longest > self.context:
            raise UserError(f"a sequence of {longest} tokens is to be scored; the model's context is {self.context}")
        self._refresh()
        return list(self.prefiller.hidden_states(sequences, features))

    @torch.no_grad()
    def match_states(
        self, pixels: torch.Tensor, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token representations of images and of their captions, read off one forward over [image, caption].

        Args: `pixels` (n, 3, H, W) in [0, 1]; n `captions`.
        Returns: image states (n, T_vision, hidden), caption states (n, L, hidden) right-padded with zeros, and the
        (n, L) bool mask of real caption tokens.
        """
        policy = self.policy
        features = policy.vision_features(policy.normalise(pixels))
        encoded = {caption: policy.encoder.match(caption) for caption in set(captions)}
        sequences = [encoded[caption][0] for caption in captions]
        states = self.hidden_states(sequences, list(features))
        texts = [each[encoded[caption][1]] for each, caption in zip(states, captions, strict=True)]
        image_id = policy.encoder.image_id
        places = {caption: torch.tensor(ids) == image_id for caption, (ids, _) in encoded.items()}
        images = [each[places[caption].to(each.device)] for each, caption in zip(states, captions, strict=True)]
        lengths = torch.tensor([len(text) for text in texts], device=policy.device)
        text_states = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.arange(text_states.shape[1], device=policy.device) < lengths[:, None]
        return torch.stack(images), text_states, mask

    @cached_property
    def _beside(self) -> torch.cuda.Stream | None:
        """The stream that drawings are decoded on while sampling goes on: one for all calls, since torch keeps freed
        memory for the stream that it was taken on."""
        device = self.policy.device
        return torch.cuda.Stream(device) if device.type == "cuda" else None

    def _pointers(self) -> list[tuple[str, int]]:
        return [(name, parameter.data_ptr()) for name, parameter in self.policy.named_parameters()]

    def _check_storage(self) -> None:
        for (name, before), (_, now) in zip(self._storage, self._pointers(), strict=True):
            if before != now:
                raise RuntimeError(f"{name} has moved since the rollout engine was built: build a new RolloutEngine")

    def _refresh(self) -> None:
        """Forget what was computed from other weights."""
        if self.weight_version is None or self.weight_version != self._computed_from:
            self.decoder.refresh()
            self._unconditional = {}
        self._computed_from = self.weight_version

    def _sizes(
        self, drawings: Sequence[Request], answers: Sequence[Request], params: SamplingParams, group_size: int
    ) -> Sizes:
        """What the buffers of a call must hold."""
        image_tokens, text_tokens = self.policy.num_image_tokens, params.max_new_tokens
        longest = max((request.prefix for request in [*drawings, *answers]), default=0)
        everything = Room(None, None)
        for requests, tokens in ((drawings, image_tokens), (answers, text_tokens)):
            for request in requests:
                everything.take(request.prefixes(), tokens)
        pages = min(everything.pages, self._page_limit(longest, max(image_tokens, text_tokens)))
        copies = 2 if drawings and drawings[0].guided else 1
        return Sizes(len(drawings), copies, len(answers), image_tokens, text_tokens, longest, group_size, pages)

    def _rounded(self, sizes: Sizes) -> Sizes:
        """Somewhat more, so that calls of like size share a worker and its graphs."""
        longest = -(-sizes.longest // 64) * 64
        limit = self._page_limit(longest, max(sizes.image_tokens, sizes.text_tokens))
        return sizes._replace(
            images=bucket(sizes.images),
            texts=bucket(sizes.texts),
            longest=longest,
            pages=max(sizes.pages, min(sizes.pages * 9 // 8, limit)),
        )

    def _page_limit(self, longest: int, own: int) -> int:
        """Pages that a call may use."""
        limits = [sys.maxsize]
        if self.max_rows is not None:
            limits.append(self.max_rows * (longest // PAGE + private_pages(PAGE - 1, own)))
        if self.kv_cache_tokens is not None:
            limits.append(self.kv_cache_tokens // PAGE)
        elif self.policy.device.type == "cuda":
            limits.append(self._pages_in_memory())
        return min(limits)

    def _pages_in_memory(self) -> int:
        """Pages in half of the device's free memory, the present pool counted as free: the rest is for activations, and
        for training."""
        device = self.policy.device
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        pages = free // 2 // self.geometry.page_bytes(PAGE)
        return max(pages, self._worker.sizes.pages) if self._worker is not None else pages

    def _why_pages(self) -> str:
        """The setting behind the number of pages."""
        return "half of the GPU's free memory" if self.kv_cache_tokens is None else "rollout.kv_cache_tokens"

    def _worker_for(self, sizes: Sizes, params: SamplingParams) -> PolicyWorker:
        """The last call's worker where it serves this one, else a new one."""
        worker = self._worker
        if worker is not None and worker.params == params and worker.sizes.hold(sizes):
            return worker
        if self.graphs:
            sizes = self._rounded(sizes)
        if worker is not None and worker.params == params and worker.sizes.fit(sizes):
            sizes = worker.sizes.both(sizes)  # for calls of both kinds in turn
        worker = self._worker = None  # its memory first
        if self.cache == "grouped":
            cache = GroupedCache(
                self.geometry,
                self.rope,
                copies=sizes.copies,
                image_tokens=sizes.image_tokens,
                text_tokens=sizes.text_tokens,
            )
        else:
            cache = PagedCache(
                self.geometry,
                self.rope,
                sizes.pages,
                images=(sizes.copies, sizes.images),
                texts=sizes.texts,
                image_tokens=sizes.image_tokens,
                text_tokens=sizes.text_tokens,
                longest=sizes.longest,
                group_size=sizes.group_size,
                backend=self.backend,
            )
        self._worker = PolicyWorker(self.policy, self.decoder, self.prefiller, cache, params, sizes, graphs=self.graphs)
        return self._worker

    def _unconditional_sources(self, lengths: set[int]) -> dict[int, Source]:
        if not lengths <= self._unconditional.keys():
            self._unconditional = self.prefiller.unconditional(sorted(lengths | self._unconditional.keys()))
        return self._unconditional

    def _codes(self) -> torch.Tensor:
        """(codes, hidden) embeddings of the image codes, computed once while what makes them stays as it is, and always
        in the same memory, which graphs read."""
        versions = tuple(parameter._version for parameter in self.policy.code_parameters())
        if versions != self._code_versions:
            codes = torch.arange(self.policy.num_codes, device=self.policy.device)
            table = self.policy.embed_codes(codes).to(self.policy.dtype)
            self._code_table = table if self._code_table is None else self._code_table.copy_(table)
            self._code_versions = versions
        return self._code_table

    def _vision_features(self, images: Sequence[Image]) -> torch.Tensor | None:
        """(P, T, hidden); each distinct image goes through the tower once."""
        distinct = {id(image): image for image in images}
        if not distinct:
            return None
        features = self.policy.vision_features(self.policy.preprocess(list(distinct.values())))
        if len(distinct) == len(images):
            return features
        index = {key: i for i, key in enumerate(distinct)}
        return features[[index[id(image)] for image in images]]
