"""From a YAML file and command-line overrides to a `Config`. Imports no torch, so that mistakes show at once.

The file may name another with `extends: other.yaml`, relative to itself; mappings are merged, all else is replaced.
Both sources are put together first and validated once, so a mistake reads the same wherever it was made.
"""

import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastcorl.config import Config, Section
from fastcorl.config_messages import Sources, describe, nearest
from fastcorl.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
NULLS = ("None", "null")


def load_config(argv: Sequence[str]) -> Config:
    """The validated configuration that `argv` (without the program's name) asks for; raises UserError."""
    config_path, wants_help, flags = _split(_without_local_rank(list(argv)))
    sources = Sources(files=_read_chain(config_path or _default_path()))
    merged: dict[str, Any] = {}
    for _, mapping in reversed(sources.files):
        merged = _merge(merged, mapping)
    _apply_overrides(merged, flags, sources)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(describe(error, sources)) from None
    if wants_help:
        _print_help(config)
    return config


def _without_local_rank(argv: list[str]) -> list[str]:
    """Drop the argument that the deepspeed and torch launchers add; ranks come from the environment."""
    kept: list[str] = []
    skip = False
    for token in argv:
        name = token.partition("=")[0].replace("-", "_")
        if skip:
            skip = False
        elif name == "__local_rank":
            skip = "=" not in token
        else:
            kept.append(token)
    return kept


def _is_flag(token: str) -> bool:
    """Negative numbers are values."""
    return token.startswith("--") or (len(token) > 1 and token[0] == "-" and token[1].isalpha())


def _split(argv: list[str]) -> tuple[str | None, bool, list[tuple[str, list[str]]]]:
    """The configuration file, whether help is wanted, and every other flag with its values, in order."""
    config_path: str | None = None
    wants_help = False
    flags: list[tuple[str, list[str]]] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not _is_flag(token):
            raise UserError(f"unexpected argument {token!r}; options look like --section.key value")
        name, has_value, value = token.partition("=")
        values = [value] if has_value else []
        while not has_value and position < len(argv) and not _is_flag(argv[position]):
            values.append(argv[position])
            position += 1
        if name in ("-h", "--help"):
            wants_help = True
        elif name == "--config":
            if len(values) != 1 or not values[0]:
                raise UserError("--config: needs one file")
            config_path = values[0]
        else:
            flags.append((name, values))
    return config_path, wants_help, flags


def _default_path() -> str:
    path = REPOSITORY / "configs" / "quickstart.yaml"
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


class _StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, except that a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"key {key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_chain(path: str) -> list[tuple[str, dict[str, Any]]]:
    """The file and those it extends, nearest first, each as (path, mapping)."""
    chain: list[tuple[str, dict[str, Any]]] = []
    visited: list[str] = []
    while True:
        if os.path.realpath(path) in visited:
            raise UserError(f"{chain[-1][0]}: extends: {path} is already part of this chain")
        visited.append(os.path.realpath(path))
        mapping = _read_yaml(path, extended_by=chain[-1][0] if chain else None)
        parent = mapping.pop("extends", None)
        chain.append((path, mapping))
        if parent is None:
            return chain
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends: must be the path of another file, got {parent!r}")
        path = os.path.normpath(os.path.join(os.path.dirname(path), parent))


def _read_yaml(path: str, extended_by: str | None) -> dict[str, Any]:
    place = f"{extended_by}: extends: {path}" if extended_by else path
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        others = [file.name for file in folder.glob("*.yaml")] if folder.is_dir() else []
        raise UserError(f"{place}: no such file{nearest(Path(path).name, others)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{place}: is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    try:
        mapping = yaml.load(text, Loader=_StrictLoader)  # noqa: S506, a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{place}: {line}not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid YAML: {error}") from None
    if not isinstance(mapping, dict):
        what = "is empty" if mapping is None else f"holds a {type(mapping).__name__}"
        raise UserError(f"{place}: must be a mapping of sections, but {what}")
    return mapping


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, in fresh dicts, since YAML aliases share theirs."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict):
            below = merged.get(key)
            value = _merge(below if isinstance(below, dict) else {}, value)
        merged[key] = value
    return merged


@dataclass(frozen=True)
class _Option:
    """A key that a flag can set. `kind` is scalar, list or dict."""

    path: tuple[str, ...]
    kind: str
    nullable: bool


def _shape(annotation: Any) -> tuple[str, bool]:
    """(kind, nullable) of a field's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _shape(inner[0])[0], len(inner) < len(arguments)
    if origin in (list, tuple):
        return "list", False
    return ("dict" if origin is dict else "scalar"), False


def _options(model: type[Section], mapping: Any, prefix: tuple[str, ...] = ()) -> dict[str, _Option]:
    """Every option by its dotted name; keys of a dict of sections come from `mapping`."""
    options: dict[str, _Option] = {}
    for name, field in model.model_fields.items():
        annotation, path = field.annotation, (*prefix, name)
        value = mapping.get(name) if isinstance(mapping, dict) else None
        arguments = typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            options |= _options(annotation, value, path)
        elif arguments and isinstance(arguments[-1], type) and issubclass(arguments[-1], Section):
            for key in value if isinstance(value, dict) else ():
                options |= _options(arguments[-1], value[key], (*path, str(key)))
        else:
            options[".".join(path)] = _Option(path, *_shape(annotation))
    return options


def _find(name: str, options: dict[str, _Option]) -> _Option:
    """The option a flag names, hyphens and underscores alike; raises UserError with the nearest one."""
    dotted = name.lstrip("-")
    for key in (dotted, dotted.replace("-", "_")):
        if key in options:
            return options[key]
        for option_name, option in options.items():
            if option_name.replace("-", "_") == key:
                return option
            if option.kind == "dict" and key.startswith(option_name + "."):
                return _Option((*option.path, key[len(option_name) + 1 :]), "scalar", False)
    if any(option_name.startswith(dotted + ".") for option_name in options):
        raise UserError(f"{name}: is a section; set one of its keys, as in {name}.key value")
    same_key = [key for key in options if key.count(".") == 1 and key.rpartition(".")[2] == dotted.replace("-", "_")]
    hint = f", did you mean '--{same_key[0]}'?" if same_key else nearest(dotted, options, shown="--{}")
    hint = hint or "; --help lists all"
    raise UserError(f"{name}: unknown option{hint}")


def _apply_overrides(merged: dict[str, Any], flags: list[tuple[str, list[str]]], sources: Sources) -> None:
    """Put the flags' values into `merged` as text, which validation turns into numbers."""
    options = _options(Config, merged)
    for name, values in flags:
        option = _find(name, options)
        text = " ".join([name, *values])
        if option.kind == "scalar":
            if not values:
                raise UserError(f"{name}: needs a value")
            if len(values) > 1:
                raise UserError(f"{text}: takes one value, got {len(values)}")
            value: Any = None if option.nullable and values[0] in NULLS else values[0]
        elif option.kind == "dict":
            if len(values) % 2:
                raise UserError(f"{text}: takes pairs of a key and a value")
            value = dict(zip(values[::2], values[1::2], strict=True))
        else:
            value = values
        node: Any = merged
        for key in option.path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break  # validation reports the file's mistake
        else:
            node[option.path[-1]] = value
        sources.flags[option.path] = text


def _print_help(config: Config) -> None:
    """Print every option with its current value, and exit."""
    import tyro

    try:
        tyro.cli(
            Config,
            default=config,
            args=["--help"],
            prog="fastcorl/train.py [--config FILE]",
            description="Train with CoRL. Values shown are those of the configuration file.",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
