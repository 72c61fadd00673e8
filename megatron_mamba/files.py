"""Files that others write too: names that must lie in a folder, JSON read with one line of error, and locks."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors that say that a file system has no locks."""


def is_plain_name(name: Any) -> bool:
    """Whether `name` is that of a file in a folder, and no path to somewhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def plain_name(name: Any, where: str) -> str:
    """`name`, if it is that of a file in the folder of what mentions it; raises ValueError that begins with `where` if not."""
    if not is_plain_name(name):
        raise ValueError(f"{where}: {name!r} is not the plain name of a file")
    return str(name)


def inner_path(path: Any) -> bool:
    """Whether `path` is relative and leads no further than into the folder it starts from."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: OSError) -> str:
    """What the system says, without the file: the message around it names that."""
    return error.strerror or one_line(error)


def read_object(path: Path, fail: Callable[[str], Exception], remedy: str) -> dict[str, Any]:
    """The JSON object in the file `path`; what `fail` makes of a message that names the file is raised if there is none."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise fail(f"{path}: cannot be read ({reason(error)}). {remedy}") from error
    except RecursionError as error:
        raise fail(f"{path}: is nested too deep to be read as JSON. {remedy}") from error
    except ValueError as error:
        raise fail(f"{path}: is no JSON ({one_line(error)}). {remedy}") from error
    if not isinstance(data, dict):
        raise fail(f"{path}: holds no object of JSON, but {'nothing' if data is None else f'a {type(data).__name__}'}. {remedy}")
    return data


def lock(file: IO[Any], wait: bool = False) -> bool | None:
    """Lock an open file against other processes, until it is closed: whether that was possible without `wait`, or None where the
    file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
