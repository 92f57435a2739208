"""A user's files into a tfds data set that reads back without TensorFlow."""

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from routing_jax.train.data.corpus import Pieces, import_tfds, is_remote, read_pieces

VERSION = "1.0.0"


def prepare(
    source: str, out: str, name: str = "text", *, validation_fraction: float = 0.02
) -> epath.Path:
    """Write text as a tfds data set in array_record files, with train and validation splits.

    One example a piece of a document (at most 64 KiB), in the feature ``text``. It reads back as
    ``TextConfig(source=out)``, or as ``TextConfig(source='tfds:NAME', data_dir=out)``, to the
    same bytes as the source itself gives. A data set appears whole or not at all: it is built
    under another name and renamed, or, in a bucket, its ``dataset_info.json`` is written last.

    Args:
      source: as ``TextConfig.source``.
      out: folder to write ``NAME/1.0.0`` into; gs:// too.
      name: the data set's name, lower-case letters, digits and underscores.
      validation_fraction: share of the bytes to hold out, between 0 and 1.

    Returns:
      The data set's folder, ``OUT/NAME/1.0.0``.

    Raises:
      ValueError: a bad name or fraction, a source that can't be read, an ``out`` that can't be
        written to, or that already holds a data set of that name, which is left as it is.
      ImportError: tensorflow-datasets or array_record is missing.

    >>> with tempfile.TemporaryDirectory() as out:
    ...     folder = prepare("stdlib", out)
    ...     sorted(path.name for path in folder.iterdir())[:2]
    ['dataset_info.json', 'features.json']
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"name={name!r} must be lower-case letters, digits and underscores, a letter first."
        )
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1.")
    target = epath.Path(out).expanduser() / name
    _refuse_existing(target)
    pieces = read_pieces(source, "", validation_fraction)
    if not pieces.validation:
        raise ValueError(
            f"source={source!r} has nothing to hold out: give more than {len(pieces.train[0])} "
            "bytes of text that does not repeat itself."
        )
    beside = None if is_remote(target) else os.fspath(target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = tempfile.mkdtemp(prefix=f".{name}-", dir=beside)
    except OSError as error:
        raise ValueError(f"out={out!r} cannot be written to: {error.strerror}.") from error
    try:
        _build(name, pieces, stage)
        _refuse_existing(target)
        if beside is None:
            _upload(epath.Path(stage) / name / VERSION, target / VERSION)
        else:
            os.rename(os.path.join(stage, name), target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target / VERSION


def _refuse_existing(target: epath.Path) -> None:
    if target.exists():
        raise ValueError(
            f"out={os.fspath(target.parent)!r} already holds {target.name!r}: give another folder "
            "or another name."
        )


def _build(name: str, pieces: Pieces, data_dir: str) -> None:
    """Build ``data_dir/name/VERSION``."""
    tfds = import_tfds()

    def examples(split: list[bytes]) -> Iterator[tuple[int, dict[str, bytes]]]:
        for key, piece in enumerate(split):
            yield key, {"text": piece}

    base: Any = tfds.core.GeneratorBasedBuilder

    class TextPieces(base, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(VERSION)
        code_path = None  # tfds would look beside it for checksums of downloads

        def _info(self) -> Any:
            # Not dataset_info_from_configs, which looks for a package around this module.
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                description="Pieces of documents, of at most 64 KiB, in the source's order.",
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: examples(found) for split, found in pieces._asdict().items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in tfds, and _split_generators gives the examples

    TextPieces.name = name
    # tfds reports a download of unknown size, which there is not.
    with contextlib.redirect_stdout(io.StringIO()):
        TextPieces(data_dir=data_dir, file_format="array_record").download_and_prepare()


def _upload(built: epath.Path, target: epath.Path) -> None:
    """Copy into a bucket, where no rename is atomic: what makes it a data set comes last."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(built.iterdir(), key=lambda path: path.name == "dataset_info.json"):
            file.copy(target / file.name)
    except BaseException:
        target.parent.rmtree(missing_ok=True)
        raise
