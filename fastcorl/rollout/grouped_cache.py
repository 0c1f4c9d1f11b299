"""Keys and values on a CPU: contiguous, so that attention is a few batched matrix products.

Rows that continue the same prompt have places in one slot. The slot keeps the prompt once, and all its places meet it
in one product; every place has its own tokens besides, of which the first is the prompt's last one.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from fastcorl.rollout.decoder import Geometry, Rope, rotate
from fastcorl.rollout.prefill import Prefill, Source

CHUNK = 32  # own tokens that lie together; batched products read dense memory up to three times faster


class GroupedCache:
    """See the module. Rows are `[drawings | answers]`, drawings conditional ones first.

    Args:
        copies: rows of a drawing, 2 with guidance.
        image_tokens, text_tokens: the most that a row has besides its prompt without the last token.
    """

    def __init__(
        self,
        geometry: Geometry,
        rope: Rope,
        *,
        copies: int,
        image_tokens: int,
        text_tokens: int,
    ):
        self.geometry, self.rope = geometry, rope
        # Apart, since groups differ in size: a prompt's drawings, all unconditional rows, a question's answers.
        self.images = [_Rows(geometry, image_tokens) for _ in range(copies)]
        self.texts = _Rows(geometry, text_tokens)

    def set_images(self, sources: Sequence[Source]) -> None:
        """Replace all drawing rows."""
        count = len(sources) // len(self.images)
        for index, rows in enumerate(self.images):
            rows.keep([])
            rows.add(sources[index * count : (index + 1) * count])

    def add_texts(self, sources: Sequence[Source]) -> None:
        """Append answer rows."""
        self.texts.add(sources)

    def order_texts(self, alive: Sequence[int]) -> list[int]:
        """The order in which the rows `alive` are best kept."""
        return sorted(alive)

    def keep_texts(self, rows: Sequence[int]) -> None:
        """Drop every answer row but `rows`, in that order."""
        self.texts.keep(rows)

    def begin_step(self, images: int, texts: int) -> None:
        """All rows are stepped, whatever the numbers say."""
        self.parts = [part for part in (*self.images, self.texts) if part.count]
        positions = torch.cat([part.positions for part in self.parts])
        self.turns = self.rope.at(positions, self.geometry.dtype)
        for part in self.parts:
            part.begin_step()

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, dim = self.geometry.heads, self.geometry.kv_heads, self.geometry.head_dim
        states = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
        turned, values = rotate(states[:, : heads + kv_heads], *self.turns), states[:, heads + kv_heads :]
        queries, keys = turned[:, :heads], turned[:, heads:]
        outputs, start = [], 0
        for part in self.parts:
            rows = slice(start, start + part.count)
            outputs.append(part.attend(layer, queries[rows], keys[rows], values[rows]))
            start = rows.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def advance(self) -> None:
        for part in self.parts:
            part.advance()


class _Rows:
    """Rows that come and go. A row stays in its place, also when others leave the slot."""

    def __init__(self, geometry: Geometry, tokens: int):
        self.geometry, self.tokens = geometry, tokens
        self.prompts = _Store(geometry)  # (slots, kv_heads, longest, D)
        self.own: list[_Store] = []  # (slots, kv_heads, width, CHUNK, D): as many as the longest row has begun
        self.width = 0  # places per slot
        self.slots: list[tuple[Prefill, int, int] | None] = []  # the prompt in each: prefill, start, length
        self.sources: list[Source] = []
        self.places: list[int] = []
        self.next: list[int] = []  # where in its own part each row writes its new token

    @property
    def count(self) -> int:
        return len(self.sources)

    def add(self, sources: Sequence[Source]) -> None:
        if not sources:
            return
        if not self.sources:
            self.width = max(Counter((source.prefill, source.start) for source in sources).values())
        lengths: dict[tuple[Prefill, int], int] = {}
        for source in sources:
            key = source.prefill, source.start
            lengths[key] = max(lengths.get(key, 0), source.length)
        taken, held = set(self.places), set(self.slots)
        new = []
        for source in sources:
            prompt = source.prefill, source.start, lengths[source.prefill, source.start]
            place = self._free_place(prompt, taken) if prompt in held else None
            if place is None:
                slot = self.slots.index(None) if None in self.slots else len(self.slots)
                self.slots[slot : slot + 1] = [prompt]
                held.add(prompt)
                new.append(slot)
                place = slot * self.width
            taken.add(place)
            self.places.append(place)
        self._make_room()
        self._copy_in(new, sources)
        self.sources += sources
        self.next += [1] * len(sources)
        self._arrange()

    def _free_place(self, prompt: tuple[Prefill, int, int], taken: set[int]) -> int | None:
        for slot, held in enumerate(self.slots):
            if held == prompt:
                for place in range(slot * self.width, (slot + 1) * self.width):
                    if place not in taken:
                        return place
        return None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but `rows`, in that order."""
        self.sources = [self.sources[row] for row in rows]
        self.next = [self.next[row] for row in rows]
        self.places = [self.places[row] for row in rows]
        live = sorted({place // self.width for place in self.places})
        self.slots = [prompt if slot in live else None for slot, prompt in enumerate(self.slots)]
        if 2 * len(live) <= len(self.slots):
            self._close_up(live)
        self._arrange()

    def _close_up(self, live: list[int]) -> None:
        """Move the slots that are in use to the front."""
        order = torch.tensor(live, dtype=torch.int64, device=self.geometry.device)
        for store in (self.prompts, *self.own):
            for layer in store.views:
                layer[: len(live)] = layer[order]
        at = {slot: new for new, slot in enumerate(live)}
        self.places = [at[place // self.width] * self.width + place % self.width for place in self.places]
        self.slots = [self.slots[slot] for slot in live]

    def _make_room(self) -> None:
        """Memory for the slots there are, and for the next token of every row."""
        slots, kv_heads, keep = len(self.slots), self.geometry.kv_heads, bool(self.sources)
        longest = max(prompt[2] for prompt in self.slots if prompt is not None)
        self.prompts.resize((slots, kv_heads), longest, keep=keep)
        size = min(CHUNK, self.tokens)
        while len(self.own) * size <= max(self.next, default=0):
            self.own.append(_Store(self.geometry))
        for store in self.own:
            store.resize((slots, kv_heads, self.width), size, keep=keep)

    def _copy_in(self, new: Sequence[int], sources: Sequence[Source]) -> None:
        """Prompts of new slots, and the last prompt tokens of new rows, whose places are known already."""
        device, width = self.geometry.device, self.width
        for prefill in dict.fromkeys(source.prefill for source in sources):
            chosen = [slot for slot in new if self.slots[slot][0] is prefill]
            if chosen:
                starts, lengths = torch.tensor([self.slots[slot][1:] for slot in chosen]).T
                steps = torch.arange(int(lengths.max())).minimum((lengths[:, None] - 1).clamp(min=0))
                grid, slot = (starts[:, None] + steps).to(device), torch.tensor(chosen, device=device)
                heads = torch.arange(self.geometry.kv_heads, device=device)
                tokens = torch.arange(grid.shape[1], device=device)
                self.prompts.write((slot[:, None, None], heads, tokens[:, None]), grid, prefill)
            pairs = zip(sources, self.places[self.count :], strict=True)
            lasts, place = torch.tensor([(s.last, at) for s, at in pairs if s.prefill is prefill], device=device).T
            self.own[0].write((place // width, slice(None), place % width, 0), lasts, prefill)

    def _arrange(self) -> None:
        """What depends on which rows there are."""
        device, count = self.geometry.device, len(self.slots) * self.width
        self.write_at = torch.tensor(self.next, dtype=torch.int64, device=device)
        lengths = torch.tensor([source.length for source in self.sources], dtype=torch.int64, device=device)
        self.positions = lengths + self.write_at
        self.together = len(set(self.next)) == 1
        self.regular = self.places == list(range(count))
        self.place = torch.tensor(self.places, dtype=torch.int64, device=device)
        # Which row is in a place; any where there is none, since nobody reads what comes of it.
        self.row = torch.zeros(count, dtype=torch.int64, device=device)
        self.row[self.place] = torch.arange(self.count, device=device)
        self.longest = max((source.length for source in self.sources), default=0)
        self.prompt_bias = None
        if any(source.length < self.longest for source in self.sources):
            unseen = torch.arange(self.longest, device=device) >= lengths[self.row][:, None]
            self.prompt_bias = self._spread(unseen, queries=True).flatten(0, 1).flatten(1, 2)

    def _spread(self, unseen: torch.Tensor, *, queries: bool) -> torch.Tensor:
        """(places, X) -> (slots, kv_heads, width, queries of a kv head or 1, X) bias: -inf where `unseen`."""
        geometry = self.geometry
        shape = (-1, geometry.kv_heads, -1, geometry.heads // geometry.kv_heads if queries else 1, -1)
        bias = self._minus_infinity(unseen).view(len(self.slots), 1, self.width, 1, unseen.shape[-1])
        return bias.expand(shape)

    def _minus_infinity(self, unseen: torch.Tensor) -> torch.Tensor:
        """The bias of the same shape."""
        bias = torch.zeros(unseen.shape, dtype=self.geometry.dtype, device=unseen.device)
        return bias.masked_fill_(unseen, -torch.inf)

    def begin_step(self) -> None:
        self._make_room()
        end, size = max(self.next) + 1, self.own[0].shape[-2]
        self.chunks = self.own[: -(-end // size)]
        # Chunks are read whole, since that is faster than the part of one that holds tokens.
        tokens = torch.arange(len(self.chunks) * size, device=self.geometry.device)
        self.biases: list[torch.Tensor | None] = [None] * len(self.chunks)
        if not self.together:
            unseen = tokens > self.write_at[self.row][:, None]
            self.biases = list(self._spread(unseen, queries=False).flatten(0, 2).split(size, dim=-1))
        elif end < len(tokens):
            self.biases[-1] = self._minus_infinity(tokens[-size:] >= end)[None, None]
        # Where new tokens go: the chunk, which rows (all if None), and the index of their places.
        self.targets: list[tuple[_Store, torch.Tensor | None, tuple]] = []
        if self.together and self.regular:
            at = (slice(None), slice(None), slice(None), (end - 1) % size)
            self.targets.append((self.chunks[-1], None, at))
            return
        slot, place = self.place // self.width, self.place % self.width
        for chunk in sorted({token // size for token in self.next}):
            rows = (self.write_at // size == chunk).nonzero().squeeze(-1)
            at = (slot[rows], slice(None), place[rows], self.write_at[rows] % size)
            self.targets.append((self.own[chunk], rows, at))

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(rows, heads, D) queries, (rows, kv_heads, D) keys and values of the new tokens -> (rows, heads D)."""
        geometry, slots, width = self.geometry, len(self.slots), self.width
        kv_heads, dim = geometry.kv_heads, geometry.head_dim
        for store, rows, at in self.targets:
            for target, new in ((store.keys(layer), keys), (store.values(layer), values)):
                target[at] = new.view(slots, width, kv_heads, dim).transpose(1, 2) if rows is None else new[rows]
        if not self.regular:
            queries = queries.index_select(0, self.row)
        queries = queries.reshape(slots, width, kv_heads, -1, dim).transpose(1, 2).contiguous()
        by_slot = queries.view(slots * kv_heads, -1, dim)
        by_place = by_slot.view(slots * kv_heads * width, -1, dim)

        prompt = self.prompts.keys(layer)[:, :, : self.longest].flatten(0, 1)
        scores = [_scores(by_slot, prompt, geometry.scaling, self.prompt_bias)]
        for store, bias in zip(self.chunks, self.biases, strict=True):
            own = _scores(by_place, store.keys(layer).flatten(0, 2), geometry.scaling, bias)
            scores.append(own.view(slots * kv_heads, -1, own.shape[-1]))
        weights = torch.cat(scores, dim=-1).softmax(-1)

        prompt = self.prompts.values(layer)[:, :, : self.longest].flatten(0, 1)
        output = torch.bmm(weights[..., : self.longest], prompt).view(by_place.shape)
        for store, own in zip(
            self.chunks, weights[..., self.longest :].split(self.chunks[0].shape[-2], -1), strict=True
        ):
            output.baddbmm_(own.view(slots * kv_heads * width, -1, own.shape[-1]), store.values(layer).flatten(0, 2))
        output = output.view(slots, kv_heads, width, -1).transpose(1, 2).reshape(slots * width, -1)
        return output if self.regular else output.index_select(0, self.place)

    def advance(self) -> None:
        self.next = [index + 1 for index in self.next]
        self.write_at += 1
        self.positions += 1


def _scores(queries: torch.Tensor, keys: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, m, D) x (B, n, D) -> (B, m, n) scaled products, plus a bias that broadcasts."""
    if bias is None:
        return torch.baddbmm(queries[:1, :1, :1], queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling)


class _Store:
    """Keys and values (*places, tokens, D) per layer."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        count = 2 * geometry.layers
        self.memory = [torch.zeros(0, dtype=geometry.dtype, device=geometry.device) for _ in range(count)]
        self.views = list(self.memory)
        self.shape: tuple[int, ...] | None = None

    def keys(self, layer: int) -> torch.Tensor:
        return self.views[2 * layer]

    def values(self, layer: int) -> torch.Tensor:
        return self.views[2 * layer + 1]

    def write(self, index: tuple, grid: torch.Tensor, prefill: Prefill) -> None:
        """Copy the prefilled states at `grid` to `index`, an expression that leads to (*grid, kv_heads, D)."""
        for layer in range(self.geometry.layers):
            self.keys(layer)[index] = prefill.keys[layer][grid]
            self.values(layer)[index] = prefill.values[layer][grid]

    def resize(self, places: tuple[int, ...], tokens: int, *, keep: bool) -> None:
        """Have these places with so many tokens; `keep` what places and tokens held before have."""
        shape = (*places, tokens, self.geometry.head_dim)
        if shape == self.shape:
            return
        size, keep = math.prod(shape), keep and self.shape is not None
        for index, (memory, old) in enumerate(zip(self.memory, self.views, strict=True)):
            new = memory
            if size > len(memory):
                new = self.memory[index] = torch.zeros(size, dtype=memory.dtype, device=memory.device)
            view = new[:size].view(shape)
            if keep and not (new is memory and shape[1:] == self.shape[1:]):
                common = tuple(slice(min(sizes)) for sizes in zip(shape, self.shape, strict=True))
                view[common] = old[common].clone() if new is memory else old[common]
            self.views[index] = view
        self.shape = shape
