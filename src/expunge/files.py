"""Files and folders that appear only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from . import processes
from .errors import OutputError

T = TypeVar("T")


def cache_folder() -> Path:
    """EXPUNGE_CACHE, or ~/.cache/expunge."""
    return Path(os.environ.get("EXPUNGE_CACHE") or Path.home() / ".cache" / "expunge")


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing.

    Raises:
        OutputError: the place cannot be written (read-only, full disk).
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write the whole file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose another place with --out.") from None


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OutputError: the place cannot be written (read-only, full disk).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"cannot write {path.parent}: {error}. Choose another place with --out.") from None


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    A folder already at `path` is replaced in that moment; a failed block leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Choose another place with --out.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached(
    kind: str, key: str, *, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[T, Path], None]
) -> T:
    """What is read from a folder of the user's cache; where it is not there it is made, and written for the next time.

    All processes of a launch make it, the first one writes it.

    Args:
        kind: of what there is, a folder in the cache.
        key: hash of all that decides what is made.

    Raises:
        OutputError: the cache cannot be written.
    """
    folder = cache_folder() / kind / key
    if processes.once(folder.is_dir):
        return read(folder)
    made = make()
    if processes.first():
        with complete_folder(folder) as partial:
            write(made, partial)
    return made


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A run's folder, for one run at a time; the lock goes with its process."""
    import fcntl

    held: list[Any] = []

    def lock() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.append(open(folder / ".lock", "w"))  # noqa: SIM115 - held open as long as the lock
        except OSError as error:
            raise OutputError(
                f"cannot write {folder}: {error.strerror or error}. Choose another place with --out."
            ) from None
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process is writing {folder}; wait for it or choose another --out") from None

    try:
        processes.once(lock)
        processes.same(f"folder {folder}", (folder / ".lock").exists())
        yield
    finally:
        for file in held:
            file.close()
