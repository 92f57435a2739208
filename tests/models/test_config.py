"""Layer patterns and decoder configs: what they spell out and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.models import MIXERS, DecoderConfig, parse_layers, repeating_pattern
from routing_jax.routers import SparseModeConfig

ITEMS = st.lists(st.tuples(st.sampled_from(MIXERS), st.integers(1, 12)), min_size=1, max_size=4)


def write(items):
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in items)


def spell_out(items):
    return tuple(name for name, count in items for _ in range(count))


@given(ITEMS)
def test_a_repeat_stands_for_its_layers(items):
    assert parse_layers(write(items)) == spell_out(items)


@given(ITEMS, st.integers(1, 12), ITEMS)
def test_a_group_repeats_as_a_whole(inside, times, after):
    pattern = f"({write(inside)})*{times}, {write(after)}"
    assert parse_layers(pattern) == spell_out(inside) * times + spell_out(after)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        ",",
        "full,",
        "mamba",
        "full*0",
        "full*-1",
        "full*",
        "full*1.5",
        "2*full",
        "full*2*3",
        "(full)*2*3",
        "(conv,full)*2*2",
        "(full)*12*3",
        "(conv,full)",
        "(conv,full*2",
        "conv,full)*2",
        "((conv)*2,full)*2",
        "(conv)*2full",
        "full(conv)*2",
        "full;conv",
    ],
)
def test_a_malformed_pattern_is_refused_in_one_sentence(pattern):
    with pytest.raises(
        ValueError, match=r"^model\.layers is .* is not a mixer; accepted: .*\.$"
    ) as e:
        parse_layers(pattern)
    assert repr(pattern) in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"model\.layers"):
        DecoderConfig(layers=pattern)


@given(ITEMS, st.integers(1, 4))
def test_the_repeating_pattern_repeats_to_the_stack_and_is_the_shortest(items, times):
    layers = spell_out(items) * times
    pattern = repeating_pattern(layers)
    assert pattern * (len(layers) // len(pattern)) == layers
    for shorter in range(1, len(pattern)):
        assert layers[:shorter] * (len(layers) // shorter) != layers
    assert len(pattern) <= len(spell_out(items))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"width": 0}, "width is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"conv_width": 0}, "conv_width is 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"num_heads": 2, "num_kv_heads": 4}, "num_kv_heads is 4"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"mlp_width": -1}, "mlp_width is -1"),
        ({"learned_positions": -1}, "learned_positions is -1"),
        ({"init_std": -0.1}, "init_std is -0.1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"mlp": "relu"}, "mlp is 'relu'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"context": -1}, "context is -1"),
        ({"head_dim": 8, "rope_factors": (1.0,) * 3}, r"rope_factors is \(1.0, 1.0, 1.0\)"),
        ({"head_dim": 4, "rope_factors": (1.0, 0.0)}, r"rope_factors is \(1.0, 0.0\)"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"attention": "flash"}, "attention is 'flash'"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, named):
    with pytest.raises(ValueError, match=rf"^model\.{named}[;,].*\.$"):
        DecoderConfig(**fields)


def test_an_odd_head_dim_is_fine_without_rope():
    assert DecoderConfig(head_dim=7, rope_theta=0.0).heads.head_dim == 7


def test_a_search_by_more_channels_than_a_head_has_is_refused():
    said = r"^sparse\.channels is 64; it must be at most head_dim = 32\.$"
    sparse = SparseModeConfig(mode="topk", channels=64)
    with pytest.raises(ValueError, match=said):
        DecoderConfig(layers="layer", head_dim=32, sparse=sparse)
    assert DecoderConfig(layers="full", head_dim=32, sparse=sparse).sparse == sparse  # unused
