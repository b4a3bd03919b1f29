"""A file or folder that appears whole or not at all: a crash or a full disk leaves what was there, or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from perpo.storage.lock import held

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends without an error and its bytes are on the disk."""
    path = Path(os.path.realpath(path))  # a symbolic link keeps pointing at what is written
    draft = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK and error.filename is None:
            raise OSError(error.errno, f"{error.strerror}: {path} was not written, and is as it was before") from error
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], what: str, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, `path`.unfinished, which takes its name when the block ends without an error and its files are
    on the disk. What a kill left of an earlier one is deleted first.

    Args:
        what: the setting that names the folder, for errors: "output".
        replace: a folder that is there already is deleted once the new one is whole.

    Raises:
        FileExistsError: there is such a folder with something in it, or a file, unless `replace`.
        BlockingIOError: another process is writing it.
    """
    path = Path(os.path.abspath(path))
    draft = path.with_name(f"{path.name}.unfinished")
    with held(path.with_name(f".{path.name}.lock"), f"{what}: {path}"):
        if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{what}: {path} exists already; name another folder, or move it away")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns, where the file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
