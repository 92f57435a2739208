"""Writing a file whole, in one place: a reader finds the old content or the new one."""

import contextlib
import uuid

from etils import epath


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
