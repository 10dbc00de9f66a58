"""File locks, by which processes that do not communicate share work: each claims the next free item."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

Item = TypeVar("Item")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an empty file in an existing folder; False if another process holds it and ``wait`` is False.

    The operating system releases the lock when the process ends, for whatever reason. filelock's fallback for file
    systems without locks is not released in this way, so a lost process would block the others. It is turned off.

    Raises:
        OSError: the file cannot be opened, or its file system has no file locks.
    """
    lock = FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout:
        yield False
        return
    except (NotImplementedError, OSError) as error:
        if getattr(error, "filename", None) is not None:
            raise  # the lock's file cannot be opened
        raise OSError(
            f"{path.parent}: its file system has no file locks ({error}), which keep two processes from writing "
            "one file; choose another folder"
        ) from None
    with held:
        yield True


def claim(items: Sequence[Item], lock_of: Callable[[Item], Path], is_missing: Callable[[Item], bool]) -> Iterator[Item]:
    """The items that this process has to compute; each is locked until the next one is requested.

    If no item is free, waits for those that other processes compute; if such a process is lost, its item is yielded
    here.

    Args:
        lock_of: the file whose lock stands for an item.
        is_missing: whether an item still has to be computed; called while its lock is held.
    """
    claimed: list[Item] = []
    for wait in (False, True):
        for item in [item for item in items if item not in claimed]:
            with locked(lock_of(item), wait) as is_mine:
                if is_mine and is_missing(item):
                    claimed.append(item)
                    yield item
