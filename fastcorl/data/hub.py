"""Data sets of the Hugging Face hub, and local folders laid out like one."""

from pathlib import Path

import datasets
from huggingface_hub import constants

from fastcorl.errors import UserError


def load_hub(
    name: str, place: str, *, split: str | None, revision: str | None, subset: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset`, which reads data files and runs no code of a data set. `split` None is "train"."""
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split or "train", revision=revision, streaming=streaming)
    except Exception as error:  # the hub client's, pyarrow's and the library's own have no common base
        raise UserError(f"{place}: {_reason(name, error)}") from error


def cache_folder() -> Path:
    """Where the library keeps files of the hub, as a data set of loose image files names them."""
    return Path(constants.HF_HOME)


def _reason(name: str, error: Exception) -> str:
    text = " ".join(str(error.__cause__ or error).split())[:300]
    if isinstance(error, ConnectionError):
        return f"the hub cannot be reached ({text}); give the path of a local copy, or try again"
    if isinstance(error, FileNotFoundError) and not Path(name).exists():
        return f"no such file or folder, and the hub has no data set {name!r} that is open to you ({text})"
    return f"cannot be loaded: {text}"
