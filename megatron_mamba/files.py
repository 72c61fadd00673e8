"""What may stand where a file names another file."""

from __future__ import annotations


def plain_name(name: object, where: str) -> str:
    """`name`, if it names a file in the folder of what mentions it and nothing else: it is no path, so it leads nowhere.

    Raises ValueError that begins with `where`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{where}: {name!r} is not the plain name of a file")
    return name
