"""Reading files that others wrote: regular files only and up to a size, so that no pipe blocks, no device goes on for
ever and no file fills the memory."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, BinaryIO

MOST_JSON_BYTES = 8 << 20
"""Of a checkpoint's JSON files but the tokenizer's; an index of 50,000 tensors takes 5 MB."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, or a link to one, opened for reading bytes.

    Raises:
        OSError: there is none, it may not be read, or it is a directory, a pipe or a device; `reason` puts it in words.
        ValueError: not a path.
    """
    # opening a pipe would wait for its writer; what was opened is what is looked at, whatever the path becomes
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "is a directory, not a file", os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as for `open_regular`, or it holds more than `most` bytes.
        ValueError: not a path.
    """
    with open_regular(path) as stream:
        # read as far as the limit, since some files that are regular by name have no true size
        content = stream.read(most + 1)
        if len(content) > most:
            size = max(os.fstat(stream.fileno()).st_size, len(content))
            raise OSError(errno.EFBIG, f"holds {size} bytes, expected at most {most}", os.fspath(path))
    return content


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """As `read_regular`, decoded from UTF-8.

    Raises:
        OSError: as for `read_regular`.
        ValueError: not a path, or not UTF-8.
    """
    return read_regular(path, most).decode("utf-8")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file of at most `MOST_JSON_BYTES` holds.

    Raises:
        OSError: as for `read_regular`.
        ValueError: not a path, or the file holds something else.
    """
    text = read_text(path, MOST_JSON_BYTES)
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"must hold a JSON object, got {type(content).__name__}")
    return content


def reason(error: BaseException) -> str:
    """What an error says, as `one_line` and without the file's name; its type where it says nothing."""
    return one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__


def named_line(error: BaseException) -> str:
    """What an error is and says, for a row of a table or a log."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def one_line(text: str) -> str:
    """A message without line breaks, and without its middle where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= 250 else f"{text[:150]} ... {text[-80:]}"
