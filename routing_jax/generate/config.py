"""The sizes that fix what is compiled to serve a model from paged memory."""

from dataclasses import dataclass

from routing_jax.models import DecoderConfig


@dataclass(frozen=True)
class ServingConfig:
    """How much is served at once, and how it is cut.

    Attributes:
      pages: P, of the pool that all layers and sequences share.
      sequences: how many are decoded together.
      length: most tokens of a sequence, those to be made included.
      page_size: tokens a page, which is a key block of the model's sparse layers.
      chunk: tokens of a prefill that pass a projection or an MLP together.
      decoding: implementation of `block_sparse_decode`; None for its own choice.
    """

    pages: int
    sequences: int = 8
    length: int = 8192
    page_size: int = 128
    chunk: int = 8192
    decoding: str | None = None

    def __post_init__(self):
        for name in ("pages", "sequences", "length", "page_size", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"serving.{name} is {getattr(self, name)}; it must be at least 1.")

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

        >>> config = ServingConfig(pages=64, length=3000, chunk=1024)
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


def check_servable(model: DecoderConfig, serving: ServingConfig) -> None:
    """Refuses a model that is not served from pages.

    Raises:
      ValueError: its layers are not all full or all layer-routed, they are full and would search
        while they read a prompt, it has learned positions or a bias of the logits, or its key
        blocks are not pages.

    >>> check_servable(DecoderConfig(layers="conv,full"), ServingConfig(pages=8))
    Traceback (most recent call last):
    ValueError: model.layers is 'conv,full'; what is served has 'full' or 'layer' in all of them.
    """
    if set(model.mixers) not in ({"full"}, {"layer"}):
        raise ValueError(
            f"model.layers is {model.layers!r}; what is served has 'full' or 'layer' in all of "
            "them."
        )
    if "full" in model.mixers and model.sparse.retrieval != "full":
        # Served, such layers would read a prompt otherwise than the decoder does.
        raise ValueError(
            f"model.layers is {model.layers!r} and model.sparse.retrieval "
            f"{model.sparse.retrieval!r}; 'full' layers attend to everything, only 'layer' layers "
            "search."
        )
    if model.learned_positions or model.head_bias:
        raise ValueError("what is served has no learned positions and no head_bias.")
    if serving.page_size != model.sparse.block_kv:
        raise ValueError(
            f"serving.page_size is {serving.page_size}; it must be model.sparse.block_kv = "
            f"{model.sparse.block_kv}."
        )
