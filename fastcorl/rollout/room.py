"""How many rows and cached tokens a rollout may hold at once. Counted in pages, as the paged cache keeps them."""

from collections import Counter
from collections.abc import Hashable

from fastcorl.errors import UserError

PAGE = 16  # tokens


def private_pages(prefix: int, own: int) -> int:
    """Pages of one row whose prompt has `prefix` tokens that it shares with others, and `own` tokens of its own. Whole
    pages of the prefix are shared; the rest of it is copied."""
    return -(-(prefix % PAGE + own) // PAGE)


class Room:
    """Counts what is taken. `max_rows`, `max_pages`: None is without limit; `why_pages` names what limits the pages."""

    def __init__(self, max_rows: int | None, max_pages: int | None, why_pages: str = "rollout.kv_cache_tokens"):
        self.max_rows, self.max_pages, self.why_pages = max_rows, max_pages, why_pages
        self.rows = self.pages = 0
        self.sharers: Counter[Hashable] = Counter()

    def take(self, prefixes: list[tuple[Hashable, int]], own: int) -> bool:
        """Room for rows that belong together, all or none. `prefixes` are (identity, tokens) of each row's prompt
        without its last token, `own` the tokens it has besides."""
        pages = sum(private_pages(tokens, own) for _, tokens in prefixes)
        new = {key: tokens // PAGE for key, tokens in prefixes if not self.sharers[key]}
        pages += sum(new.values())
        if self.max_rows is not None and self.rows + len(prefixes) > self.max_rows:
            return False
        if self.max_pages is not None and self.pages + pages > self.max_pages:
            return False
        self.rows += len(prefixes)
        self.pages += pages
        self.sharers.update(key for key, _ in prefixes)
        return True

    def give(self, prefixes: list[tuple[Hashable, int]], own: int) -> None:
        """Return what `take` took."""
        for key, tokens in prefixes:
            self.rows -= 1
            self.pages -= private_pages(tokens, own)
            self.sharers[key] -= 1
            if not self.sharers[key]:
                self.pages -= tokens // PAGE

    def require(self, prefixes: list[tuple[Hashable, int]], own: int, what: str) -> None:
        """Refuse what would not fit even alone.

        Raises UserError naming the numbers and the setting.
        """
        alone = Room(None, None)
        alone.take(prefixes, own)
        if self.max_rows is not None and alone.rows > self.max_rows:
            raise UserError(f"{what} takes {alone.rows} rows; rollout.max_rows is {self.max_rows}: raise it")
        if self.max_pages is not None and alone.pages > self.max_pages:
            raise UserError(
                f"{what} takes {alone.pages * PAGE} tokens of KV cache in pages of {PAGE}; "
                f"{self.why_pages} allows {self.max_pages * PAGE}: make room or ask for shorter answers"
            )
