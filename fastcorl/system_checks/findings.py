"""What a check finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "n/a", "problem"]
Outcome = tuple[Status, str] | tuple[Status, str, str]  # status, detail, and the remedy of a problem


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    "n/a" is what is not there, or not used here, and need not be. A problem has its remedy. `needed`: with this as a
    problem nothing can be trained.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    needed: bool = False


OUTER = 100  # characters of an exception that another one has led to
REPORT = "this is a fault of fastcorl doctor; please report it"


def guarded(name: str, check: Callable[..., list[Finding]], *arguments: object) -> list[Finding]:
    """What a check finds; one that raises is a line too, since the others still have something to tell."""
    try:
        return check(*arguments)
    except Exception as error:
        return [Finding(name, "problem", first_line(error), REPORT)]


def first_line(error: BaseException) -> str:
    """An exception in one line, with the first of those that led to it: transformers' own do not tell it."""
    origin = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    said = _said(error)
    return said if said == _said(origin) else f"{said[:OUTER]}, from {_said(origin)}"


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
