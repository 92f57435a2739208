"""Batches by step: the one door through which training and evaluation read data."""

from collections.abc import Iterator
from typing import Any, Literal

from routing_jax.train.data.batch import SPLITS, Batch, Split
from routing_jax.train.data.characters import CharacterConfig
from routing_jax.train.data.needle import NeedleConfig, needle_batch
from routing_jax.train.data.prompts import PromptBatch, PromptConfig, prompt_batch
from routing_jax.train.data.recall import RecallConfig, recall_batch
from routing_jax.train.data.text import TextConfig, text_batch
from routing_jax.train.data.tokens import TokenConfig

DataConfig = RecallConfig | TextConfig | CharacterConfig | TokenConfig | NeedleConfig | PromptConfig

_PREFETCH = 4  # batches made ahead, enough to hide a slow one behind a step


def batches(
    config: DataConfig,
    *,
    split: Split,
    seed: int,
    batch_size: int,
    length: int | None = None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    place: Literal["random", "first"] = "random",
) -> Iterator[Any]:
    """Iterate over the batches start_step, start_step + 1, ... without end: this process's rows.

    Batch ``step`` depends on (config, split, seed, step, batch_size, length, place) alone. So a
    checkpoint's data position is its step, resuming is exact, and any number of processes reads
    the same global batches. A thread keeps a few batches ready.

    Args:
      config: the task or the corpus.
      split: train or validation; they share no sequence. Recall draws fresh sequences in both;
        validation text is read in passes, as ``text.text_batch`` says.
      seed: 0 to 2^64 - 1; validation text does not read it.
      batch_size: B over all processes.
      length: T, by default ``config.length``; for a length curriculum.
      start_step: the first batch to give.
      process_index: this process, which gets rows [index, index + 1) * B / process_count.
      process_count: how many processes share a batch.
      place: where recall's first queried pair stands, as ``recall.recall_batch`` says.

    Returns:
      An endless iterator over Batch of [B / process_count, T], or PromptBatch.

    Raises:
      ValueError: at once, a bad argument, a length too short for the task, or a corpus that can't
        be read or is too short.
      ImportError: a tfds corpus without the packages that read it.

    >>> first = next(batches(RecallConfig(length=16), split="train", seed=0, batch_size=4))
    >>> later = batches(RecallConfig(length=16), split="train", seed=0, batch_size=4, start_step=9)
    >>> first.tokens.shape, bool((next(later).tokens == first.tokens).all())
    ((4, 16), False)
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'validation'.")
    if place not in ("random", "first"):
        raise ValueError(f"place={place!r} must be 'random' or 'first'.")
    if length is not None and length < 1:
        raise ValueError(f"length={length} must be at least 1.")
    for name, value in (("seed", seed), ("start_step", start_step)):
        if value < 0:
            raise ValueError(f"{name}={value} must be 0 or more.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie in [0, process_count={process_count})."
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the number of processes, "
            f"{process_count}."
        )

    def make(step: int) -> Batch | PromptBatch:
        if isinstance(config, RecallConfig):
            return recall_batch(
                config, split=split, seed=seed, step=step, batch_size=batch_size, length=length,
                place=place,
            )  # fmt: skip
        if isinstance(config, NeedleConfig):
            return needle_batch(
                config, split=split, seed=seed, step=step, batch_size=batch_size, length=length
            )
        if isinstance(config, PromptConfig):
            return prompt_batch(
                config, split=split, seed=seed, step=step, batch_size=batch_size, length=length
            )
        return text_batch(
            config, split=split, seed=seed, step=step, batch_size=batch_size, length=length
        )

    # A length or corpus that will not do is refused here, not in a thread.
    kind = type(make(start_step))

    rows = batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)

    # Takes seconds to import, which a command that reads no data should not spend.
    import grain

    steps = grain.MapDataset.range(start_step, 2**62)
    local = steps.map(lambda step: kind(*(array[mine] for array in make(step))))
    # One thread: the batches are made in numpy from memory, several would only share a core.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(local.to_iter_dataset(options))
