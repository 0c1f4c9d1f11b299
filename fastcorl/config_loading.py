"""From a YAML file and command-line overrides to a `Config`. Imports no torch, so that mistakes show at once.

A file may name another with `extends: other.yaml`, relative to itself, and of several files each lies over those before
it; mappings are merged, all else is replaced.
tyro reads the command line as text; both sources are put together first and validated once, so a mistake reads the
same wherever it was made.
"""

import os
import re
import sys
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypedDict, get_args, get_origin

import tyro
import yaml
from pydantic import ValidationError

from fastcorl.config import Config, Section
from fastcorl.config_messages import Sources, describe, nearest
from fastcorl.errors import UserError, flag_mistakes

REPOSITORY = Path(__file__).resolve().parent.parent
_MOST_VALUES = 100_000


def load_config(argv: Sequence[str]) -> Config:
    """The validated configuration that `argv` (without the program's name) asks for; raises UserError."""
    return read_command_line(argv)[0]


def read_command_line(argv: Sequence[str]) -> tuple[Config, bool]:
    """As `load_config`, and whether a dry run is asked for."""
    launch, rest = _parse(_Launch, argv)
    if not launch.config:
        raise UserError("--config: needs the path of a YAML file")
    sources = Sources(files=[entry for path in reversed(launch.config) for entry in _read_chain(str(path))])
    merged: dict[str, Any] = {}
    for _, mapping in reversed(sources.files):
        merged = _merge(merged, mapping)
    for name, value in _overrides(rest, merged).items():
        path = tuple(name.split("."))
        sources.flags[path] = f"--{name}"
        for key in reversed(path):
            value = {key: value}
        merged = _merge(merged, value)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(describe(error, sources)) from None
    if launch.help:
        _print_help(config)
    return config, launch.dry_run


def _default_path() -> Path:
    path = REPOSITORY / "configs" / "quickstart.yaml"
    if not path.exists():  # installed, where the configurations are in the package
        path = Path(__file__).parent / "configs" / "quickstart.yaml"
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@dataclass
class _Launch:
    """What the command line holds besides the configuration's keys."""

    config: list[Path] = field(default_factory=lambda: [_default_path()])
    """YAML files, each laid over those before it."""
    local_rank: str = ""
    """Added by the deepspeed and torch launchers; ranks come from the environment."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resolve everything, show what it takes and train nothing."""
    help: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["-h"])] = False


def _parse(kind: Any, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """`kind` as tyro reads it from `argv`, and the arguments it does not know; raises UserError."""
    with flag_mistakes():
        return tyro.cli(kind, args=argv, use_underscores=True, add_help=False, return_unknown_args=True)


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
        raise UserError(f"{place}: is not a UTF-8 text file; save it as one") from None
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}; give a YAML file") from None
    try:
        mapping = _StrictLoader(text).get_single_data()
        if _expanded_size(mapping, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases make more than {_MOST_VALUES} values")
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        remedy = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise UserError(f"{place}: {line}not valid YAML: {error.problem}{remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid YAML: {error}") from None
    if not isinstance(mapping, dict):
        what = "is empty" if mapping is None else f"holds a {type(mapping).__name__}"
        raise UserError(f"{place}: must be a mapping of sections, but {what}")
    return mapping


def _expanded_size(value: Any, known: dict[int, int | None]) -> int:
    """How many values there are with every alias written out; ValueError for one within what it names."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded_size(part, known) for part in parts)
    size = known[id(value)]
    if size is None:
        raise ValueError("an alias stands within what it names")
    return size


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, in fresh dicts, since YAML aliases share theirs."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict):
            below = merged.get(key)
            value = _merge(below if isinstance(below, dict) else {}, value)
        merged[key] = value
    return merged


def _overrides(argv: Sequence[str], mapping: dict[str, Any]) -> dict[str, Any]:
    """The value of every option given, by its dotted name; raises UserError for one that does not exist."""
    options = _options(Config, mapping)
    given, unknown = _parse(TypedDict("Overrides", options, total=False), argv)
    if unknown:
        raise UserError(_unknown(unknown[0], options))
    return given


def _options(annotation: Any, value: Any, name: str = "") -> dict[str, Any]:
    """Every option below `name` and the type tyro reads for it; `value` has the keys of a dict of sections."""
    mapping = value if isinstance(value, dict) else {}
    inner = get_args(annotation)[-1:]
    if _is_section(annotation):
        children = {key: info.annotation for key, info in annotation.model_fields.items()}
    elif inner and _is_section(inner[0]):
        # Other names are for validation to refuse; tyro takes a-b and a_b for one.
        children = dict.fromkeys(filter(re.compile(r"\w+").fullmatch, mapping), inner[0])
    else:
        return {name: _as_text(annotation)}
    options: dict[str, Any] = {}
    for key, child in children.items():
        options |= _options(child, mapping.get(key), f"{name}.{key}" if name else key)
    return options


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _as_text(annotation: Any) -> Any:
    """Text in the shape of `annotation`; validation makes numbers of it."""
    if get_origin(annotation) in (list, tuple):
        return list[str]
    if get_origin(annotation) is dict:
        return MutableMapping[str, str]  # tyro cannot leave out a `dict`
    return str | None if NoneType in get_args(annotation) else str


def _unknown(argument: str, options: Iterable[str]) -> str:
    """What is wrong with an argument that tyro does not know, with the nearest option."""
    flag = argument.partition("=")[0]
    if not flag.startswith("--"):
        return f"unexpected argument {argument!r}; options look like --section.key value"
    name = flag[2:].replace("-", "_")
    if any(option.startswith(f"{name}.") for option in options):
        return f"{flag}: is a section; set one of its keys, as in {flag}.key value"
    same_key = [f", did you mean '--{option}'?" for option in options if option.endswith(f".{name}")]
    hint = same_key[0] if same_key else nearest(name, options, shown="--{}")
    return f"{flag}: unknown option{hint or '; --help lists all'}"


def _print_help(config: Config) -> None:
    """Print every option with its current value, and exit."""
    try:
        tyro.cli(
            Config,
            default=config,
            args=["--help"],
            prog="fastcorl/train.py [--config FILE ...] [--dry-run]",
            description="Train with CoRL. Values shown are those of the configuration file.",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
