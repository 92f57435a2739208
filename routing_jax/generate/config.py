"""The sizes that fix what is compiled to serve a model from paged memory."""

from dataclasses import dataclass, field

from routing_jax.models import DecoderConfig
from routing_jax.routers import SparseModeConfig


@dataclass(frozen=True)
class ServingConfig:
    """How much is served at once, and how it is cut.

    Attributes:
      pages: P, of the pool that all layers and sequences share.
      sequences: how many are decoded together.
      length: most tokens of a sequence, those to be made included.
      sparse: what a sparse layer attends to, and the size of a key block, which is a page.
      chunk: tokens of a prefill that pass a projection or an MLP together.
      decoding: implementation of `block_sparse_decode`; None for its own choice.
    """

    pages: int
    sequences: int = 8
    length: int = 8192
    sparse: SparseModeConfig = field(default_factory=SparseModeConfig)
    chunk: int = 8192
    decoding: str | None = None

    def __post_init__(self):
        for name in ("pages", "sequences", "length", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"serving.{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def page_size(self) -> int:
        """Tokens a page.

        >>> ServingConfig(pages=64).page_size
        128
        """
        return self.sparse.block_kv

    @property
    def slots(self) -> int:
        """C, pages of the longest sequence in a dense layer.

        >>> ServingConfig(pages=64, length=1000).slots
        8
        """
        return -(-self.length // self.page_size)

    def chunk_of(self, batch: int, length: int) -> int:
        """Tokens of each prompt that are projected together: whole pages, a power of two of them.

        Args:
          batch: B.
          length: T, tokens of the padded prompts before rounding.

        >>> ServingConfig(pages=64, chunk=1024).chunk_of(3, 200), ServingConfig(64).chunk_of(1, 129)
        (256, 256)
        """
        pages = 1
        while pages * self.page_size < length and 2 * pages * self.page_size * batch <= self.chunk:
            pages *= 2
        return pages * self.page_size

    def bucket(self, batch: int, length: int) -> int:
        """How long prompts are padded: a power of two of pages, or the most there can be.

        Args:
          batch: B.
          length: tokens of the longest prompt.

        >>> config = ServingConfig(pages=64, length=3000)
        >>> [config.bucket(1, n) for n in (1, 129, 1000, 2100)]
        [128, 256, 1024, 3072]
        """
        padded = self.page_size
        while padded < length:
            padded *= 2
        if padded > self.slots * self.page_size:
            chunk = self.chunk_of(batch, self.length)
            padded = min(padded, -(-self.slots * self.page_size // chunk) * chunk)
        return padded


def check_servable(model: DecoderConfig) -> None:
    """Refuses a model whose layers are not all full attention, which is what can be routed.

    Raises:
      ValueError: it has other layers, learned positions or a bias of the logits.

    >>> check_servable(DecoderConfig(layers="conv,full"))
    Traceback (most recent call last):
    ValueError: model.layers is 'conv,full'; a model that is served has full attention only.
    """
    if set(model.mixers) != {"full"}:
        raise ValueError(
            f"model.layers is {model.layers!r}; a model that is served has full attention only."
        )
    if model.learned_positions or model.head_bias:
        raise ValueError("a model that is served has no learned positions and no head_bias.")
