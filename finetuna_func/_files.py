"""Folders that appear on disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path, marker: str, who: str) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` to write to, which then takes its place.

    What was written is on the disk before it is seen under its name. If the body raises, or the
    process is killed, ``target`` is what it was.

    Args:
        target: The folder to make. One that holds ``marker`` is replaced; any other must not exist.
        marker: Name of the file by which an earlier save is known.
        who: Name of the public function, for the message.

    Raises:
        FileExistsError: ``target`` exists and is not an earlier save.
    """
    if target.exists() and not (target / marker).is_file():
        raise FileExistsError(f"{who}: {target} exists and does not hold an earlier save; choose another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        for file in staging.iterdir():
            file.chmod(0o644)
            _to_disk(file)
        staging.chmod(0o755)
        _to_disk(staging)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            try:
                os.replace(target, retired / "old")
                try:
                    os.replace(staging, target)
                except BaseException:
                    os.replace(retired / "old", target)
                    raise
            finally:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(staging, target)
        _to_disk(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
