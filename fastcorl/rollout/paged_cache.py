"""Keys and values on a GPU: pages of one pool, named by a table per row.

The whole pages of a prompt are shared by the rows that continue it; what is left of it is copied to each row, whose own
tokens follow there. All that a step reads is on the device, so a step can be captured in a CUDA graph and replayed
while rows grow. Page 0 belongs to nobody: rows that only fill up a batch write there.
"""

from collections.abc import Sequence

import torch

from fastcorl.rollout.decoder import Geometry, Rope
from fastcorl.rollout.prefill import Source
from fastcorl.rollout.room import PAGE, private_pages
from fastcorl_kernels import SharedPrefix, paged_decode_attention, rope_to_pages

GROUPED_FROM = 128  # tokens of a shared prompt from which reading it once per group is worth a launch


class PagedCache:
    """See the module.

    Args:
        pages: size of the pool.
        images, texts: (copies, rows) of drawings, rows of answers: the most there will be.
        image_tokens, text_tokens: the most a row has besides its prompt without the last token.
        longest: the longest prompt without its last token.
        group_size: the most rows that share a prompt of an answer.
    """

    def __init__(
        self,
        geometry: Geometry,
        rope: Rope,
        pages: int,
        *,
        images: tuple[int, int],
        texts: int,
        image_tokens: int,
        text_tokens: int,
        longest: int,
        group_size: int,
        backend: str | None = None,
    ):
        self.geometry, self.rope, self.backend = geometry, rope, backend
        shape = (pages + 1, PAGE, geometry.kv_heads, geometry.head_dim)
        like = {"dtype": geometry.dtype, "device": geometry.device}
        self.key_pages = [torch.zeros(shape, **like) for _ in range(geometry.layers)]
        self.value_pages = [torch.zeros(shape, **like) for _ in range(geometry.layers)]
        self.free = list(range(pages, 0, -1))
        self.shared: dict[Source, tuple[list[int], int]] = {}  # pages, and rows that read them
        width = longest // PAGE + private_pages(PAGE - 1, max(image_tokens, text_tokens))
        self.images = _Table(images, width, image_tokens, geometry.device)
        self.texts = _Table((1, texts), width, text_tokens, geometry.device)
        self.group_size = group_size
        self.group_bounds = torch.zeros(texts + 1, dtype=torch.int32, device=geometry.device)
        self.group_lengths = torch.zeros(texts, dtype=torch.int32, device=geometry.device)

    def set_images(self, sources: Sequence[Source]) -> None:
        self._release(self.images, range(len(self.images.sources)))
        self.images.clear()
        self._add(self.images, sources)

    def add_texts(self, sources: Sequence[Source]) -> None:
        self._add(self.texts, sources)
        self._find_groups()

    def order_texts(self, alive: Sequence[int]) -> list[int]:
        """Rows of a group stand next to one another; only table entries move."""
        first = {source: row for row, source in reversed(list(enumerate(self.texts.sources)))}
        return sorted(alive, key=lambda row: (first[self.texts.sources[row]], row))

    def keep_texts(self, rows: Sequence[int]) -> None:
        kept = set(rows)
        self._release(self.texts, [row for row in range(len(self.texts.sources)) if row not in kept])
        self.texts.keep(rows)
        self._find_groups()

    def begin_step(self, images: int, texts: int) -> None:
        """`images` drawings and `texts` answers are stepped; there may be more than are real."""
        parts = [table for table, count in ((self.images, images), (self.texts, texts)) if count]
        counts = [count for count in (images, texts) if count]
        table = torch.cat([part.pages[:, :n].flatten(0, 1) for part, n in zip(parts, counts, strict=True)])
        self.positions = torch.cat([part.lengths[:, :n].flatten() for part, n in zip(parts, counts, strict=True)])
        page = table.gather(1, (self.positions // PAGE)[:, None]).squeeze(1)
        self.slots = page.long() * PAGE + self.positions % PAGE
        self.context_lengths = (self.positions + 1).int()
        self.block_table = table
        self.prefix = None
        if texts:
            first = self.images.pages.shape[0] * images
            self.prefix = SharedPrefix(self.group_bounds + first, self.group_lengths, self.group_size)

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        keys, values, tables = self.key_pages[layer], self.value_pages[layer], (self.rope.cos, self.rope.sin)
        query = rope_to_pages(qkv, *tables, self.positions, self.slots, keys, values, backend=self.backend)
        out = paged_decode_attention(
            query,
            keys,
            values,
            self.block_table,
            self.context_lengths,
            scaling=self.geometry.scaling,
            prefix=self.prefix,
            backend=self.backend,
        )
        return out.flatten(1)

    def advance(self) -> None:
        self.images.advance()
        self.texts.advance()

    def _add(self, table: "_Table", sources: Sequence[Source]) -> None:
        """Take pages for new rows and copy what they start from: shared pages once, the rest for every row."""
        if not sources:
            return
        copies: list[tuple[Source, int, int, list[int]]] = []  # positions [from, to) of a prompt, and pages for them
        rows = []
        for source in sources:
            whole = source.length // PAGE
            pages, users = self.shared.get(source, ([], 0))
            if not users:
                pages = [self.free.pop() for _ in range(whole)]
                copies.append((source, 0, whole * PAGE, pages))
            self.shared[source] = pages, users + 1
            own = [self.free.pop() for _ in range(private_pages(source.length, table.tokens))]
            copies.append((source, whole * PAGE, source.length + 1, own))
            rows.append(pages + own)
        self._copy(copies)
        table.add(sources, rows)

    def _copy(self, copies: Sequence[tuple[Source, int, int, list[int]]]) -> None:
        by_prefill: dict = {}
        for source, begin, end, pages in copies:
            origins, slots = by_prefill.setdefault(source.prefill, ([], []))
            tokens = torch.arange(begin, end)
            origins.append(torch.where(tokens < source.length, source.start + tokens, source.last))
            offsets = tokens - begin
            slots.append(torch.tensor([*pages, 0])[offsets // PAGE] * PAGE + offsets % PAGE)
        for prefill, (origins, slots) in by_prefill.items():
            origin, slot = (torch.cat(parts).to(self.geometry.device) for parts in (origins, slots))
            for pool, states in ((self.key_pages, prefill.keys), (self.value_pages, prefill.values)):
                for pages, layer in zip(pool, states, strict=True):
                    pages.flatten(0, 1).index_copy_(0, slot, layer.index_select(0, origin))

    def _release(self, table: "_Table", rows: Sequence[int]) -> None:
        for row in rows:
            source = table.sources[row]
            pages, users = self.shared.pop(source)
            self.free += table.row_pages[row][len(pages) :]
            if users > 1:
                self.shared[source] = pages, users - 1
            else:
                self.free += pages

    def _find_groups(self) -> None:
        """Neighbouring answers with the same prompt."""
        bounds, lengths = [0], []
        sources = self.texts.sources
        row = 0
        while row < len(sources):
            end = row
            while end < len(sources) and sources[end] == sources[row] and end - row < self.group_size:
                end += 1
            bounds.append(end)
            lengths.append(sources[row].length // PAGE * PAGE if sources[row].length >= GROUPED_FROM else 0)
            row = end
        capacity = len(self.group_lengths)
        bounds += [len(sources)] * (capacity + 1 - len(bounds))
        lengths += [0] * (capacity - len(lengths))
        self.group_bounds.copy_(torch.tensor(bounds, dtype=torch.int32))
        self.group_lengths.copy_(torch.tensor(lengths, dtype=torch.int32))


class _Table:
    """Which pages the rows of a region have, and how long they are. Sources are copies-major, like the rows."""

    def __init__(self, rows: tuple[int, int], width: int, tokens: int, device: torch.device):
        self.tokens = tokens
        self.pages = torch.zeros(*rows, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = torch.zeros_like(self.lengths)  # a row that is done, or only fills up, grows no further
        self.sources: list[Source] = []
        self.row_pages: list[list[int]] = []

    def add(self, sources: Sequence[Source], row_pages: Sequence[list[int]]) -> None:
        copies, width = self.pages.shape[0], self.pages.shape[2]
        first, count = len(self.sources) // copies, len(sources) // copies
        rows = slice(first, first + count)
        padded = [pages + [0] * (width - len(pages)) for pages in row_pages]
        lengths = torch.tensor([source.length + 1 for source in sources]).view(copies, count)
        self.pages[:, rows] = torch.tensor(padded, dtype=torch.int32).view(copies, count, width).to(self.pages.device)
        self.lengths[:, rows] = lengths.to(self.lengths.device)
        self.last[:, rows] = (lengths + self.tokens - 2).to(self.last.device)
        self.sources += sources
        self.row_pages += row_pages

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but `rows` of a region of one copy, in that order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.pages.device)
        for state in (self.pages, self.lengths, self.last):
            kept = state[:, index]
            state.zero_()
            state[:, : len(rows)] = kept
        self.sources = [self.sources[row] for row in rows]
        self.row_pages = [self.row_pages[row] for row in rows]

    def clear(self) -> None:
        for state in (self.pages, self.lengths, self.last):
            state.zero_()
        self.sources, self.row_pages = [], []

    def advance(self) -> None:
        torch.minimum(self.lengths + 1, self.last, out=self.lengths)
