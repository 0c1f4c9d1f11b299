"""What a text of the user names: a model's folder, a data set, a file. Imports no torch, so that mistakes show at once.

What may be a name of the hub is left to those who load it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastcorl.errors import UserError

QUICKSTART = "quickstart"
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::(?P<split>[\w.\[\]%:+-]+))?")
_DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
_AGAIN = "copy or download it again"


def hub_name(source: str) -> tuple[str, str | None] | None:
    """`owner/name` and the split of `owner/name:split`, where a data set's name has that form."""
    match = _HUB_NAME.fullmatch(source)
    return (match["name"], match["split"]) if match else None


def hub_data(source: str, place: str) -> tuple[str, str | None]:
    """`hub_name` of a data set that is not on this machine; UserError, which `place` begins, where it can be none."""
    name = hub_name(source)
    if name is None or Path(name[0]).suffix in _DATA_SUFFIXES:
        raise UserError(f"{place}: no such file or folder, and neither module:function nor owner/name of the hub")
    return name


def model_folder(name: str, key: str) -> Path | None:
    """The folder that `name` is the path of, None where it may be a name of the hub; else UserError, naming `key`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{key}: {name!r} is a file; give the folder that it is in, or a hub name")
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"{key}: there is no folder {name!r}; give a folder with a checkpoint, or a hub name")
    return None


def check_new_folder(path: Path, place: str) -> None:
    """Raise UserError, which `place` begins, where `path` is not the name of a new folder, or of an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{place}: exists and is not an empty folder; name a new one")


def check_janus(name: str, key: str) -> None:
    """Raise UserError where `name` is a folder without a Janus in the transformers format. Of its weights the files'
    headers are read."""
    folder = janus_folder(name, key)
    if folder is None:
        return
    place = f"{key}: {name!r}"
    files = list(_weight_files(folder, place))
    if not files and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{place} holds no weights (*.safetensors); {_AGAIN}")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{place}: {file.name} is damaged or cut short ({error}); {_AGAIN}") from None


def janus_folder(name: str, key: str) -> Path | None:
    """The folder `name` with a Janus' configuration, None where it may be a name of the hub; else UserError."""
    folder = None if name == QUICKSTART else model_folder(name, key)
    if folder is not None:
        place = f"{key}: {name!r}"
        if not (folder / "config.json").is_file():
            raise UserError(f"{place} has no config.json; give the folder of a Janus in the transformers format")
        check_model_type(_read_json(folder / "config.json", place).get("model_type"), name, key)
    return folder


def check_model_type(model_type: Any, name: str, key: str) -> None:
    """Raise UserError where a configuration's `model_type` is not that of a Janus in the transformers format."""
    if model_type == "multi_modality":
        raise UserError(
            f"{key}: {name!r} is in the original layout; convert it once: fastcorl export --from {name} --out FOLDER"
        )
    if model_type != "janus":
        raise UserError(
            f"{key}: {name!r} is a {model_type!r} model; expected 'janus', a Janus in the transformers format"
        )


def _weight_files(folder: Path, place: str) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    weight_map = _read_json(index, place).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{place}: {index.name} has no weight_map; {_AGAIN}")
    for name in sorted(set(map(str, weight_map.values()))):
        if not (folder / name).is_file():
            raise UserError(f"{place} lacks {name}, which {index.name} names; {_AGAIN}")
        yield folder / name


def _read_json(path: Path, place: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: {path.name} cannot be read as JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: {path.name} must be a JSON object, not a {type(value).__name__}; {_AGAIN}")
    return value
