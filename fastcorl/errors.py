"""What a user did wrong, said in one line."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_BOX = str.maketrans({"─": "-", **dict.fromkeys("╭╮╰╯│", " ")})


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
    """Print a UserError as one line and exit with code 2; of several ranks on a host only the first prints.

    Works as `with main_guard():` and as the decorator `@main_guard()`.
    """
    try:
        yield
    except UserError as error:
        if error.local or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            print("fastcorl:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def flag_mistakes() -> Iterator[None]:
    """Makes a UserError of what tyro prints about a wrong command line; its --help is left alone."""
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_told_by_tyro(printed.getvalue())) from None


def _told_by_tyro(printed: str) -> str:
    """tyro draws a box around a title, what is wrong and perhaps hints, with rules between them."""
    _, wrong, *hints = [" ".join(part.split()) for part in re.split("-{4,}", printed.translate(_BOX))]
    for hint in hints:
        if hint.startswith("Perhaps you meant"):
            return f"{wrong}; did you mean {re.findall('--[^ ]+', hint)[0]}?"
        if hint.startswith("Available subcommands"):
            return f"{wrong}; {hint}"
    return wrong
