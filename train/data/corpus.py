"""Text on disk into two byte arrays, one to train on and one held out.

A corpus is a list of pieces: each document cut every 64 KiB. Which pieces are held out follows
from their contents alone, so the same piece never stands on both sides, whatever its file is
called and however often it occurs.
"""

import contextlib
import functools
import gzip
import hashlib
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

PIECE_BYTES = 64 * 1024
SEPARATOR = b"\0"

# Parts of the standard library that are not there on every machine, or repeat themselves.
_NOT_STDLIB = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
}  # fmt: skip


class Pieces(NamedTuple):
    """The documents' pieces, in the corpus's order.

    >>> Pieces([b"one", b"two"], [b"three"]).validation
    [b'three']
    """

    train: list[bytes]
    validation: list[bytes]


class Corpus(NamedTuple):
    """A split's pieces joined by a zero byte: two [bytes] uint8 arrays, read-only.

    >>> Corpus(*(np.frombuffer(text, np.uint8) for text in (b"ab", b"c"))).train
    array([97, 98], dtype=uint8)
    """

    train: np.ndarray
    validation: np.ndarray


@functools.lru_cache(maxsize=2)
def load_corpus(source: str, data_dir: str, validation_fraction: float) -> Corpus:
    """Read a corpus, once a process; a later change on disk is not seen.

    Args:
      source: as ``TextConfig.source``.
      data_dir: where tfds keeps its data sets; '' for its own default.
      validation_fraction: of the bytes, to hold out.

    Raises:
      ValueError: a source that is not there, can't be read or holds no text.
      ImportError: a tfds source without the packages that read it.

    >>> load_corpus("stdlib", "", 0.02).train.dtype
    dtype('uint8')
    """
    pieces = read_pieces(source, data_dir, validation_fraction)
    return Corpus(*(np.frombuffer(SEPARATOR.join(split), np.uint8) for split in pieces))


def read_pieces(source: str, data_dir: str, validation_fraction: float) -> Pieces:
    """Read a source's pieces, splitting them unless the source comes with both splits.

    Takes and raises the same as ``load_corpus``.

    >>> pieces = read_pieces("stdlib", "", 0.02)
    >>> bool(set(pieces.train) & set(pieces.validation))
    False
    """
    documents: Pieces | Iterable[bytes]
    if source == "stdlib":
        documents = _stdlib()
    elif source.startswith("tfds:"):
        name, feature = _tfds_name(source)
        documents = _tfds_named(source, name, feature, data_dir)
    else:
        documents = _at_path(source)
    if isinstance(documents, Pieces):
        pieces = documents
    else:
        pieces = split_pieces(cut(documents), validation_fraction)
    if not pieces.train and not pieces.validation:
        raise ValueError(f"source={source!r} holds no text.")
    return pieces


def read_documents(source: str) -> list[bytes]:
    """Read 'stdlib', or a file or all files of a folder of text, whole and in order.

    Raises:
      ValueError: a source that is not there or can't be read.

    >>> len(read_documents("stdlib")) > 100
    True
    """
    return list(_stdlib() if source == "stdlib" else _texts(epath.Path(source).expanduser()))


def cut(documents: Iterable[bytes]) -> Iterator[bytes]:
    """Cut documents into pieces of at most 64 KiB, leaving out empty ones.

    >>> [len(piece) for piece in cut([b"", b"x" * 65537])]
    [65536, 1]
    """
    for document in documents:
        for start in range(0, len(document), PIECE_BYTES):
            yield document[start : start + PIECE_BYTES]


def split_pieces(pieces: Iterable[bytes], validation_fraction: float) -> Pieces:
    """Hold out the pieces whose hashes are smallest, until they make up the fraction of bytes.

    Ranking hashes, rather than comparing each with a threshold, gives even a corpus of two
    pieces something to hold out. One distinct piece is always left to train on, unless all are
    asked for.

    Args:
      pieces: the corpus.
      validation_fraction: of its bytes; 1 holds out everything.

    >>> pieces = split_pieces([b"a", b"b", b"c"], 0.3)
    >>> len(pieces.train), len(pieces.validation)
    (2, 1)
    """
    pieces = list(pieces)
    if validation_fraction >= 1:
        return Pieces([], pieces)
    digests = [hashlib.blake2b(piece, digest_size=16).digest() for piece in pieces]
    sizes: dict[bytes, int] = {}
    for digest, piece in zip(digests, pieces):
        sizes[digest] = sizes.get(digest, 0) + len(piece)
    wanted = validation_fraction * sum(sizes.values())
    held: set[bytes] = set()
    for digest in sorted(sizes)[:-1]:
        if wanted <= 0:
            break
        held.add(digest)
        wanted -= sizes[digest]
    train = [piece for piece, digest in zip(pieces, digests) if digest not in held]
    return Pieces(train, [piece for piece, digest in zip(pieces, digests) if digest in held])


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a bucket's, such as gs://, and not this machine's.

    >>> is_remote("gs://bucket/text"), is_remote("/tmp/text")
    (True, False)
    """
    return "://" in os.fspath(path)


def _at_path(source: str) -> Pieces | list[bytes]:
    """Read a folder that ``data prepare`` wrote, or a folder or file of text."""
    path = epath.Path(source).expanduser()
    try:
        prepared = _prepared_folder(path) if path.is_dir() else None
        return _prepared(prepared) if prepared else list(_texts(path))
    except (ValueError, ImportError):
        raise
    except Exception as error:  # a bucket out of reach raises its client's own types
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ValueError(f"source={source!r} cannot be read: {reason}.") from error


def _stdlib() -> Iterator[bytes]:
    """Read Python's own library: about 10 MB, the same only for the same Python."""
    root = epath.Path(sysconfig.get_path("stdlib"))
    for path in _files(root):
        if path.suffix == ".py" and not _NOT_STDLIB.intersection(path.relative_to(root).parts):
            yield _read(path)


def _files(folder: epath.Path) -> list[epath.Path]:
    """List every file below a folder but hidden ones, in an order that every disk agrees on."""

    def fail(error: OSError) -> None:
        raise ValueError(f"source={error.filename!r} cannot be read: {error.strerror}.") from error

    found = []
    for parent, folders, names in folder.walk(on_error=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [epath.Path(parent) / name for name in names if not name.startswith(".")]
    return sorted(found)


def _texts(path: epath.Path) -> Iterator[bytes]:
    """Read a file or all files below a folder, but those with a zero byte, which are no text."""
    if not path.exists():
        raise ValueError(
            f"source={os.fspath(path)!r} does not exist: give 'stdlib', 'tfds:NAME', or a folder "
            "or file of text."
        )
    for file in _files(path) if path.is_dir() else [path]:
        text = _read(file)
        if SEPARATOR not in text:
            yield text


def _read(path: epath.Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"source={os.fspath(path)!r} cannot be read: {reason}.") from error


def import_tfds() -> Any:
    """Import tensorflow_datasets, which neither needs nor imports TensorFlow here.

    Raises:
      ImportError: it or array_record is missing.

    >>> import_tfds().__name__
    'tensorflow_datasets'
    """
    try:
        import array_record.python.array_record_data_source  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "tfds data sets need packages that are not installed: "
            "pip install 'routing_jax[datasets]'."
        ) from error
    return tfds


def _tfds_name(source: str) -> tuple[str, str]:
    """Split 'tfds:name[:1.0.0][:feature]' into its name and its feature, by default 'text'."""
    name, *rest = source.removeprefix("tfds:").split(":")
    if rest and rest[0][:1].isdigit():  # a version, as tfds writes them
        name = f"{name}:{rest.pop(0)}"
    if not name or len(rest) > 1:
        raise ValueError(f"source={source!r} must be 'tfds:NAME' or 'tfds:NAME:FEATURE'.")
    return name, rest[0] if rest else "text"


@contextlib.contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Say what tfds ran into in one line: its own errors are pages long and of any type."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ValueError(f"source={source!r} cannot be read by tfds: {reason}.") from error


def _tfds_named(source: str, name: str, feature: str, data_dir: str) -> Pieces | list[bytes]:
    """Read the data set of that name, which tfds prepares if its catalogue has it."""
    tfds = import_tfds()
    try:
        with _one_sentence(source):
            splits = tfds.data_source(name, data_dir=data_dir or None)
    except ValueError as error:
        if not isinstance(error.__cause__, tfds.core.DatasetNotFoundError):
            raise
        where = data_dir or "tfds's default data_dir"
        raise ValueError(
            f"source={source!r} names no data set of tfds's catalogue or in {where}."
        ) from error
    return _examples(source, splits, feature)


def _examples(source: str, splits: dict[str, Any], feature: str) -> Pieces | list[bytes]:
    """Read a data set's train and validation splits, or its train split, still to be split."""
    if "train" not in splits:
        raise ValueError(f"source={source!r} has no 'train' split, only {sorted(splits)}.")
    features = sorted(splits["train"].dataset_info.features)
    if feature not in features:
        raise ValueError(f"source={source!r} has no feature {feature!r}, only {features}.")
    texts = {}
    for split in {"train", "validation"} & set(splits):
        with _one_sentence(source):
            found = [example[feature] for example in splits[split]]
        if not all(isinstance(text, bytes | str) for text in found):
            raise ValueError(
                f"source={source!r} has no text in its feature {feature!r}: choose one of "
                f"{features}."
            )
        texts[split] = [text.encode() if isinstance(text, str) else text for text in found]
    if "validation" in texts:
        return Pieces(list(cut(texts["train"])), list(cut(texts["validation"])))
    return texts["train"]


def _prepared_folder(folder: epath.Path) -> epath.Path | None:
    """Find the one tfds data set in a folder, at NAME/VERSION, VERSION or the folder itself."""
    found = [
        path.parent
        for depth in ("", "*/", "*/*/")
        for path in folder.glob(depth + "dataset_info.json")
        if (path.parent / "features.json").exists()
    ]
    if len(found) > 1:
        names = sorted(os.fspath(path.relative_to(folder)) for path in found)
        raise ValueError(
            f"source={os.fspath(folder)!r} holds several data sets: give the folder of one of "
            f"{names}."
        )
    return found[0] if found else None


def _prepared(folder: epath.Path) -> Pieces | list[bytes]:
    """Read a folder that ``data prepare`` wrote."""
    tfds = import_tfds()
    source = os.fspath(folder)
    with contextlib.ExitStack() as stack:
        with _one_sentence(source):
            if is_remote(folder):  # array_record opens only files of this machine
                local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
                for file in folder.iterdir():
                    file.copy(local / file.name)
                folder = local
            splits = tfds.builder_from_directory(folder).as_data_source()
        return _examples(source, splits, "text")
