"""Validation errors in plain words: one line that names the file or flag, the key, and what it must be."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from fastcorl.config import Config, Section

Path = tuple[Any, ...]

_WORDS = {
    "missing": "missing",
    "invalid_key": "must be a name",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "needs at least {min_length} values",
    "too_long": "takes at most {max_length} values",
}
_BY_PREFIX = {
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_": "must be text",
    "model_": "must be a mapping of keys",
    "dict_": "must be a mapping of keys",
    "list_": "must be a list",
    "tuple_": "must be a list",
}


@dataclass
class Sources:
    """Where values came from: files nearest first, and flags by path."""

    files: list[tuple[str, dict[str, Any]]]
    flags: dict[Path, str] = field(default_factory=dict)

    def flag_for(self, path: Path) -> str | None:
        """The flag that set `path` or a part of it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.flags:
                return self.flags[path[:length]]
        return next((text for set_path, text in self.flags.items() if path and set_path[: len(path)] == path), None)

    def file_for(self, path: Path) -> str:
        """The nearest file that has `path`, else the one given."""
        for name, mapping in self.files:
            node: Any = mapping
            for key in path:
                if not isinstance(node, dict) or key not in node:
                    break
                node = node[key]
            else:
                return name
        return self.files[0][0]


def nearest(name: str, candidates: Iterable[str], shown: str = "{}") -> str:
    """`, did you mean 'x'?` for the candidate closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.7)
    return f", did you mean '{shown.format(close[0])}'?" if close else ""


def describe(error: ValidationError, sources: Sources) -> str:
    """The first error in words, and how many more there are; unknown keys first, since they make keys missing."""
    errors = error.errors(include_url=False)
    errors.sort(key=lambda item: item["type"] != "extra_forbidden")
    line = _describe_one(errors[0], sources)
    return line if len(errors) == 1 else f"{line} (and {len(errors) - 1} more)"


def _describe_one(item: Any, sources: Sources) -> str:
    path = tuple(part for part in item["loc"] if part != "[key]")
    message = _message(item, path)
    if item["type"] == "value_error" and not path and ": " in message:
        # Checks across the whole configuration put the path into their text.
        dotted, _, message = message.partition(": ")
        path = tuple(dotted.split("."))
    if item["type"] not in ("missing", "extra_forbidden", "value_error", "literal_error"):
        message += f", got {_shown(item['input'])}"
    place = sources.flag_for(path) or ": ".join(filter(None, [sources.file_for(path), ".".join(map(str, path))]))
    return f"{place}: {message}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(item: Any, path: Path) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        hint = nearest(str(item["input"]), _literals(context["expected"]))
        return f"must be one of {context['expected']}, got {_shown(item['input'])}{hint}"
    if kind == "missing" and isinstance(path[-1], int):
        return f"needs more than {path[-1]} values"
    if kind in _WORDS:
        return _WORDS[kind].format(**context)
    for prefix, words in _BY_PREFIX.items():
        if kind.startswith(prefix):
            return words
    return item["msg"][:1].lower() + item["msg"][1:]


def _literals(expected: str) -> list[str]:
    return [part.strip("' ") for part in expected.replace(" or ", ", ").split(",")]


def _unknown_key(path: Path) -> str:
    name = str(path[-1])
    keys = list(_section_at(path[:-1]).model_fields)
    hint = nearest(name, keys)
    if not hint:
        elsewhere = [
            f"{section}.{name}"
            for section, info in Config.model_fields.items()
            if isinstance(info.annotation, type)
            and issubclass(info.annotation, Section)
            and name in info.annotation.model_fields
        ]
        hint = f", did you mean '{elsewhere[0]}'?" if elsewhere else f" (known here: {', '.join(keys)})"
    return f"unknown key{hint}"


def _section_at(path: Path) -> type[Section]:
    """The section that `path` leads to; the step below a dict of sections is a free name."""
    section: Any = Config
    for key in path:
        section = section.model_fields[key].annotation if isinstance(section, type) else get_args(section)[-1]
    return section
