"""What a user did wrong, said in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave: configuration, data, a path. The message names the place and the remedy.

    `local`: met by one rank alone, which then has to tell it; others are met, and told, by the first.
    """

    local = False


class LocalError(UserError):
    """A UserError that one rank alone meets."""

    local = True


@contextmanager
def main_guard() -> Iterator[None]:
    """Print a UserError as one line and exit with code 2; of several ranks only the first prints.

    Works as `with main_guard():` and as the decorator `@main_guard()`.
    """
    try:
        yield
    except UserError as error:
        if error.local or os.environ.get("RANK", "0") == "0":
            print("fastcorl:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
