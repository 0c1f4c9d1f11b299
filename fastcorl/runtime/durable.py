"""Files and folders that a kill, a power cut or a full disk leaves as they were or as they shall be."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f"tmp-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        put_in_place(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error."""
    temporary = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    put_in_place(temporary, folder)


def put_in_place(source: Path, target: Path) -> None:
    """Rename, for good: the folder's own entry is on the disk when this returns."""
    os.replace(source, target)
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder that readers look at: they see all of it or nothing."""
    aside = folder.with_name(f"tmp-removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Remove what a kill left half done in `folder`."""
    for path in folder.glob("tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of entries, is on the disk."""
    if os.name == "nt":  # which opens no folders, and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of everything in a folder, and of the folder last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
