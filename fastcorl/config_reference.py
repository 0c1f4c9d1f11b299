"""Every key of the configuration as a page: `python -m fastcorl.config_reference > docs/configuration.md`.

It is made from the models and the docstrings under their fields, which are what `--help` shows too. Imports no torch.
"""

import ast
import inspect
import json
import re
import textwrap
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fastcorl.config import Config, Section

INTRODUCTION = """\
# Configuration

Every key with its type and default. The page is made from `fastcorl/config*.py`, and a test holds it to them:

```
python -m fastcorl.config_reference > docs/configuration.md
```

In a YAML file keys stand in their sections (`rollout:`, and under it `guidance: 5`). A file may begin with
`extends: other.yaml`, relative to itself, and `--config` takes several files, each laid over those before it:
mappings are merged, all else is replaced. On the command line a key is a flag with its dotted name:

| | |
|---|---|
| a value | `--stages.unified.steps 50` |
| null | `--rollout.top_k None` |
| true, false | `--model.compile True` |
| a list | `--optimizer.betas 0.9 0.99` |
| a mapping, in pairs | `--data.columns prompt caption` |

Flags win over files. An unknown key, a value of another type or one out of range is told in one line before anything
is loaded. `python fastcorl/train.py --help` shows the same keys with the values of the configuration given, and a run
writes what it was told, defaults included, to `runs/<name>/config.yaml`.
"""

_WORDS = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", NoneType: "null"}
_BOUNDS = {"gt": "over", "ge": "at least", "lt": "under", "le": "at most"}


def reference() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *_section(Config, "")]).rstrip() + "\n"


def _section(section: type[Section], path: str) -> list[str]:
    """Lines about the keys of a section, then about the sections in it."""
    texts, rows, below = _docstrings(section), [], []
    for name, info in section.model_fields.items():
        key = f"{path}.{name}" if path else name
        if _is_section(info.annotation):
            below += ["", *_section(info.annotation, key)]
            continue
        kind = _kind(info.annotation, info.metadata)
        inner = get_args(info.annotation)[-1:]
        if inner and _is_section(inner[0]):
            below += ["", *_section(inner[0], f"{key}.NAME")]
            kind = "mapping of names to sections"
        rows.append(f"| `{key}` | {kind} | {_default(info)} | {_prose(texts.get(name, ''))} |")
    about = ["", _prose(section.__doc__)] if section.__doc__ else []
    table = ["", "| key | type | default | |", "|---|---|---|---|", *rows] if rows else []
    return [f"## {path or 'At the top'}", *about, *table, *below]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _docstrings(section: type[Section]) -> dict[str, str]:
    """The text under each field, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _kind(annotation: Any, limits: Any = ()) -> str:
    """A type in words, with what bounds its values."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], [limit for extra in inner[1:] for limit in getattr(extra, "metadata", [extra])])
    if origin in (Union, UnionType):
        return " or ".join(map(_kind, inner))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}: {', '.join(map(_kind, inner))}"
    if origin is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    bounds = " and ".join(
        f"{word} {getattr(limit, name):g}" for limit in limits for name, word in _BOUNDS.items() if hasattr(limit, name)
    )
    return f"{_WORDS.get(annotation, getattr(annotation, '__name__', annotation))} {bounds}".strip()


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return f"`{json.dumps(info.get_default(call_default_factory=True), default=str)}`"


def _prose(text: str) -> str:
    """A docstring as a cell of a table: one line, without what Markdown would take for HTML or for the next cell."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts).replace("|", r"\|")


if __name__ == "__main__":
    print(reference(), end="")
