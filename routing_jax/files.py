"""Folders that may be out of reach, and files written whole: a reader finds the old or the new."""

import contextlib
import uuid

from etils import epath


def reached(path: epath.PathLike, field: str) -> epath.Path:
    """The path of a folder that can be looked at, whether or not it is there.

    Args:
      path: on this machine, where nothing is asked, or of a bucket, such as gs://.
      field: whose value it is.

    Raises:
      ValueError: a bucket out of reach.

    >>> reached("runs/a", "workdir").name
    'a'
    """
    found = epath.Path(path)
    if "://" in str(path):
        try:
            found.exists()
        except Exception as e:  # its client's own types
            reason = f"{type(e).__name__}: {e}".splitlines()[0].rstrip(".")
            raise ValueError(f"{field} is {str(path)!r}, which can't be reached: {reason}.") from e
    return found


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all; what stood there stays until then.

    Args:
      path: where to; its folder must be there. May be gs://.
      content: everything the file will hold; text is written as UTF-8.

    Raises:
      OSError: it can't be written; the file is named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/notes.txt", "all of it")
    ...     epath.Path(folder, "notes.txt").read_text()
    'all of it'
    """
    path = epath.Path(path)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(e, OSError):
            if e.errno is None:  # epath's own, which has its say as a bare sentence
                raise type(e)(f"{path} can't be written: {e}") from e
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
