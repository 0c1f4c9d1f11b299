"""Keys and values on a CPU: contiguous, so that attention is a few batched matrix products.

Rows of a group continue the same prompt. It is kept once, in a slot, and all rows of the group meet it in one product;
every row has its own tokens besides, of which the first is the prompt's last one.
"""

from collections.abc import Sequence

import torch

from fastcorl.rollout.decoder import Geometry
from fastcorl.rollout.prefill import Prefill, Source


class GroupedCache:
    """See the module. Rows are `[drawings | answers]`, drawings conditional ones first.

    Args:
        rope: (cos, sin) tables (positions, D).
        copies: rows of a drawing, 2 with guidance.
        image_tokens, text_tokens: the most that a row has besides its prompt without the last token.
    """

    def __init__(
        self,
        geometry: Geometry,
        rope: tuple[torch.Tensor, torch.Tensor],
        *,
        copies: int,
        image_tokens: int,
        text_tokens: int,
    ):
        self.geometry = geometry
        cos, sin = rope
        half = geometry.head_dim // 2
        # `roll` by half a head exchanges its halves; the sign of the rotation is in the table.
        self.cos = cos.to(geometry.dtype)
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=1).to(geometry.dtype)
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
        """The order in which the rows `alive` are best kept: the last ones move into the holes of the others."""
        count = len(alive)
        moved = [row for row in alive if row >= count]
        kept = set(alive)
        return [row if row in kept else moved.pop() for row in range(count)]

    def keep_texts(self, rows: Sequence[int]) -> None:
        """Drop every answer row but `rows`, in that order."""
        self.texts.keep(rows)

    def begin_step(self, images: int, texts: int) -> None:
        """All rows are stepped, whatever the numbers say."""
        self.parts = [part for part in (*self.images, self.texts) if part.count]
        positions = torch.cat([part.positions for part in self.parts])
        self.step_cos = self.cos.index_select(0, positions)[:, None]
        self.step_sin = self.sin.index_select(0, positions)[:, None]
        for part in self.parts:
            part.begin_step()

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, dim = self.geometry.heads, self.geometry.kv_heads, self.geometry.head_dim
        states = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
        rotating, values = states[:, : heads + kv_heads], states[:, heads + kv_heads :]
        rotated = (rotating * self.step_cos).addcmul_(rotating.roll(dim // 2, -1), self.step_sin)
        queries, keys = rotated[:, :heads], rotated[:, heads:]
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
    """Rows that come and go, and the prompts that they continue."""

    def __init__(self, geometry: Geometry, tokens: int):
        self.geometry, self.tokens = geometry, tokens
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.prefix = _Prefixes(geometry)
        self.sources: list[Source] = []
        self.next: list[int] = []  # where in its own part each row writes its new token

    @property
    def count(self) -> int:
        return len(self.sources)

    def add(self, sources: Sequence[Source]) -> None:
        if not sources:
            return
        first = self.count
        _make_room(self, first + len(sources), self.tokens, keep=first)
        for prefill, rows in _by_prefill(sources):
            lasts = torch.tensor([[sources[row].last] for row in rows], device=self.geometry.device)
            _copy_in(self, prefill, [first + row for row in rows], lasts)
        self.sources += sources
        self.next += [1] * len(sources)
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but `rows`, in that order."""
        moves = [(new, old) for new, old in enumerate(rows) if new != old]
        if moves:
            new, old = torch.tensor(moves, device=self.geometry.device).T
            used = max(self.next)
            for states in (*self.keys, *self.values):
                states[new, :, :used] = states[old, :, :used]
        self.sources = [self.sources[row] for row in rows]
        self.next = [self.next[row] for row in rows]
        self._arrange()

    def _arrange(self) -> None:
        """What depends on which rows there are."""
        device = self.geometry.device
        self.prefix.arrange(self.sources)
        self.write_at = torch.tensor(self.next, dtype=torch.int64, device=device)
        lengths = torch.tensor([source.length for source in self.sources], dtype=torch.int64, device=device)
        self.positions = lengths + self.write_at
        self.rows = torch.arange(self.count, device=device)
        self.together = len(set(self.next)) == 1

    def begin_step(self) -> None:
        self.end = max(self.next) + 1
        self.bias = None
        if not self.together:
            unseen = torch.arange(self.end, device=self.geometry.device) > self.write_at[:, None]
            self.bias = _bias(unseen, self.geometry).repeat_interleave(self.geometry.kv_heads, 0)[:, None]

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(rows, heads, D) queries, (rows, kv_heads, D) keys and values of the new tokens -> (rows, heads D)."""
        kv_heads, dim, count = self.geometry.kv_heads, self.geometry.head_dim, self.count
        if self.together:
            self.keys[layer][:count, :, self.end - 1] = keys
            self.values[layer][:count, :, self.end - 1] = values
        else:
            self.keys[layer][self.rows, :, self.write_at] = keys
            self.values[layer][self.rows, :, self.write_at] = values
        own_keys, own_values = (_flat(states[layer], count, self.end) for states in (self.keys, self.values))
        grouped = queries.reshape(count * kv_heads, -1, dim)
        own = _scores(grouped, own_keys, self.geometry.scaling, self.bias).view(count, kv_heads, -1, self.end)
        before = self.prefix.scores(layer, grouped.view(count, kv_heads, -1, dim))
        weights = torch.cat([before, own], dim=-1).softmax(-1)
        seen = before.shape[-1]
        output = torch.bmm(weights[..., seen:].reshape(count * kv_heads, -1, self.end), own_values)
        output = output.view(count, kv_heads, -1, dim) + self.prefix.read(layer, weights[..., :seen])
        return output.reshape(count, -1)

    def advance(self) -> None:
        self.next = [index + 1 for index in self.next]
        self.write_at += 1
        self.positions += 1


class _Prefixes:
    """Prompts without their last tokens, each once, in a slot, and which rows continue which.

    Rows may continue a prompt from different lengths on, as unconditional rows do with their chain.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.slots: dict[tuple[Prefill, int], int] = {}
        self.lengths: dict[tuple[Prefill, int], int] = {}

    def arrange(self, sources: Sequence[Source]) -> None:
        """Keep the prompts of these rows, and note which row continues which."""
        members: dict[tuple[Prefill, int], list[int]] = {}
        for row, source in enumerate(sources):
            members.setdefault((source.prefill, source.start), []).append(row)
        longest = {key: max(sources[row].length for row in rows) for key, rows in members.items()}
        self.slots = {key: slot for key, slot in self.slots.items() if longest.get(key, -1) == self.lengths[key]}
        taken = set(self.slots.values())
        new = [key for key in members if key not in self.slots]
        free = [slot for slot in range(len(members)) if slot not in taken]
        self.slots |= dict(zip(new, free, strict=False))
        self.lengths = longest
        self.longest = max(longest.values(), default=0)
        self.count = max(self.slots.values(), default=-1) + 1
        self._copy(new)

        rows_of: list[list[int]] = [[] for _ in range(self.count)]
        for key, rows in members.items():
            rows_of[self.slots[key]] = rows
        self.width = max(map(len, rows_of), default=0)
        self.regular = [row for rows in rows_of for row in rows] == list(range(self.count * self.width))
        device = self.geometry.device
        grid = [row for rows in rows_of for row in rows + [0] * (self.width - len(rows))]
        self.grid = torch.tensor(grid, dtype=torch.int64, device=device)
        places = {row: slot * self.width + i for slot, rows in enumerate(rows_of) for i, row in enumerate(rows)}
        self.places = torch.tensor([places[row] for row in range(len(sources))], dtype=torch.int64, device=device)
        self.bias = None
        if any(source.length < self.longest for source in sources):
            lengths = torch.tensor([source.length for source in sources], device=device)[self.grid]
            unseen = torch.arange(self.longest, device=device) >= lengths[:, None]
            group = self.geometry.heads // self.geometry.kv_heads
            bias = _bias(unseen, self.geometry).view(self.count, 1, self.width, 1, self.longest)
            bias = bias.expand(-1, self.geometry.kv_heads, -1, group, -1)
            self.bias = bias.reshape(self.count * self.geometry.kv_heads, self.width * group, self.longest)

    def scores(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """(rows, kv_heads, g, D) queries -> (rows, kv_heads, g, longest prompt) scores."""
        keys = _flat(self.keys[layer], self.count, self.longest)
        return self._to_rows(_scores(self._to_slots(queries), keys, self.geometry.scaling, self.bias))

    def read(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        """(rows, kv_heads, g, longest prompt) attention weights -> (rows, kv_heads, g, D)."""
        values = _flat(self.values[layer], self.count, self.longest)
        return self._to_rows(torch.bmm(self._to_slots(weights), values))

    def _to_slots(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, kv_heads, g, X) -> (slots kv_heads, rows per slot g, X)."""
        if not self.regular:
            states = states.index_select(0, self.grid)
        _, kv_heads, group, last = states.shape
        by_slot = states.view(self.count, self.width, kv_heads, group, last).transpose(1, 2)
        return by_slot.reshape(self.count * kv_heads, self.width * group, last)

    def _to_rows(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_slots`."""
        kv_heads, last = self.geometry.kv_heads, states.shape[-1]
        states = states.view(self.count, kv_heads, self.width, -1, last).transpose(1, 2)
        states = states.reshape(self.count * self.width, kv_heads, -1, last)
        return states if self.regular else states.index_select(0, self.places)

    def _copy(self, new: Sequence[tuple[Prefill, int]]) -> None:
        if not new:
            return
        _make_room(self, self.count, self.longest, keep=self.count)
        for prefill in dict.fromkeys(prefill for prefill, _ in new):
            keys = [key for key in new if key[0] is prefill]
            starts, lengths = torch.tensor([(start, self.lengths[prefill, start]) for _, start in keys]).T
            steps = torch.arange(int(lengths.max()))
            grid = starts[:, None] + steps.minimum((lengths[:, None] - 1).clamp(min=0))
            _copy_in(self, prefill, [self.slots[key] for key in keys], grid.to(self.geometry.device))


def _scores(queries: torch.Tensor, keys: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, m, D) x (B, n, D) -> (B, m, n) scaled products, plus a bias that broadcasts."""
    if bias is None:
        zero = queries.new_zeros(1, 1, 1)
        return torch.baddbmm(zero, queries, keys.transpose(1, 2), beta=0, alpha=scaling)
    return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling)


def _flat(states: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """(rows, kv_heads, capacity, D) -> a view (count kv_heads, length, D)."""
    return states[:count].flatten(0, 1)[:, :length]


def _make_room(store, rows: int, tokens: int, *, keep: int = 0) -> None:
    """Give `store.keys` and `store.values` at least this size, keeping the content of the first `keep` rows."""
    geometry: Geometry = store.geometry
    have = store.keys[0].shape if store.keys else (0, 0, 0, 0)
    if have[0] >= rows and have[2] >= tokens:
        return
    keep = min(keep, have[0])
    shape = (max(rows, have[0]), geometry.kv_heads, max(tokens, have[2]), geometry.head_dim)
    for name in ("keys", "values"):
        new = [torch.zeros(shape, dtype=geometry.dtype, device=geometry.device) for _ in range(geometry.layers)]
        for target, old in zip(new, getattr(store, name), strict=False):
            target[:keep, :, : have[2]] = old[:keep]
        setattr(store, name, new)


def _copy_in(store, prefill: Prefill, rows: Sequence[int], grid: torch.Tensor) -> None:
    """Write the prefilled states at `grid` (rows, tokens) to the beginning of these rows of a store."""
    index = torch.tensor(rows, device=grid.device)
    for targets, sources in ((store.keys, prefill.keys), (store.values, prefill.values)):
        for target, source in zip(targets, sources, strict=True):
            target[index, :, : grid.shape[1]] = source[grid].transpose(1, 2)


def _by_prefill(sources: Sequence[Source]) -> list[tuple[Prefill, list[int]]]:
    """The rows of each prefill."""
    groups: dict[Prefill, list[int]] = {}
    for row, source in enumerate(sources):
        groups.setdefault(source.prefill, []).append(row)
    return list(groups.items())


def _bias(unseen: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """What is added to scores: -inf where `unseen`."""
    return torch.zeros(unseen.shape, dtype=geometry.dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)
