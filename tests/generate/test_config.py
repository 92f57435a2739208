"""How prompts are padded: whole chunks of whole pages, few sizes, never shorter than the prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.generate import ServingConfig


@given(
    length=st.integers(1, 300_000),
    share=st.floats(0, 1),
    page_size=st.sampled_from([4, 64, 128]),
    chunk=st.integers(1, 20_000),
    batch=st.integers(1, 9),
)
def test_padded_prompts_are_whole_chunks(length, share, page_size, chunk, batch):
    config = ServingConfig(pages=1, length=length, page_size=page_size, chunk=chunk)
    tokens = max(1, round(share * length))
    padded = config.bucket(batch, tokens)
    assert padded >= tokens
    assert padded % config.chunk_of(batch, padded) == 0 == padded % page_size
    assert padded < 2 * max(tokens, page_size)
    assert batch * config.chunk_of(batch, padded) <= max(chunk, batch * page_size)


def test_there_are_few_sizes():
    config = ServingConfig(pages=1, length=100_000)
    assert len({config.bucket(1, n) for n in range(1, 100_001, 7)}) == 11


@pytest.mark.parametrize("field", ["pages", "sequences", "length", "page_size", "chunk"])
def test_sizes_are_positive(field):
    with pytest.raises(ValueError, match=rf"serving.{field} is 0; it must be at least 1"):
        ServingConfig(**{"pages": 1, field: 0})
