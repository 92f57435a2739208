"""Prompts read by one program over all layers leave what a program a layer leaves."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.generate import DENSE, ROUTED, SPARSE, ServingConfig, paged_prefill
from routing_jax.generate.paged_memory import empty_memory
from routing_jax.generate.paged_prefill import prefill_prompts, prefill_short
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

from ..small_model import MIXED, make_params

LAYERS, T, MOST = 3, 8, 30  # sink and window cover 12 tokens
UNROLLED = MIXED.replace(
    layers=f"layer*{LAYERS}",
    width=16,
    num_heads=4,
    num_kv_heads=2,
    layer_router=LayerRouterConfig(pool=3),
    sparse=SparseModeConfig(sink=4, window=8, block_q=4, block_kv=4),
)
SCANNED = UNROLLED.replace(scan=True)
SEARCHING = UNROLLED.replace(
    sparse=dataclasses.replace(UNROLLED.sparse, retrieval="topk", answers="topk", blocks=1)
)
SERVING = ServingConfig(pages=96, sequences=4, length=40, page_size=4, chunk=16)
pytestmark = pytest.mark.usefixtures("compile_cache")


def read(model, decisions, tokens, lengths, limits, rows, memory, serving=SERVING):
    numbers = (jnp.asarray(n, jnp.int32) for n in (tokens, lengths, limits, rows))
    return prefill_prompts(model, serving, make_params(model), decisions, *numbers, memory)


# Two prompts pass in one chunk or in several.
@pytest.mark.parametrize(("model", "chunk"), [(UNROLLED, 16), (SCANNED, 8), (SEARCHING, 16)])
@hypothesis.settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_one_program_reads_what_a_program_a_layer_reads(model, chunk, data):
    serving = dataclasses.replace(SERVING, chunk=chunk)
    each = st.integers(1, T)
    decisions = data.draw(
        st.lists(st.sampled_from([ROUTED, SPARSE, DENSE]), min_size=3, max_size=3)
    )
    lengths = data.draw(st.lists(each, min_size=2, max_size=2))
    limits = [n + data.draw(st.integers(0, MOST - n)) for n in lengths]
    rows = data.draw(st.permutations(range(SERVING.sequences)))
    tokens = np.random.default_rng(lengths).integers(0, model.vocab_size, (2, T))
    found = []
    for at_once in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_prefill, "reads_at_once", lambda *_, yes=at_once: yes)
            memory = empty_memory(model, SERVING)
            # Somebody is there already.
            there = [T, T], [MOST, MOST], rows[2:]
            _, memory = read(model, [DENSE] * LAYERS, tokens, *there, memory, serving)
            found.append(read(model, decisions, tokens, lengths, limits, rows[:2], memory, serving))
    (logits, memory), (by_layer, expected) = found
    np.testing.assert_allclose(logits, by_layer, rtol=1e-4, atol=1e-4)
    assert np.abs(logits).max() > 0.1
    for name, want in expected._asdict().items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            getattr(memory, name),
            want,
        )
    whole = np.array(decisions)[:, None] != SPARSE
    whole = np.broadcast_to(whole | (not model.sparse.forgets), (LAYERS, 2))
    np.testing.assert_array_equal(memory.whole[:, np.array(rows[:2])], whole)


@pytest.mark.parametrize("model", [UNROLLED, SCANNED, SEARCHING])
def test_a_layer_is_lowered_once_and_memory_is_written_in_place(model):
    serving = dataclasses.replace(SERVING, pages=4096)
    memory = jax.eval_shape(lambda: empty_memory(model, serving))
    each, tokens, row = (
        jax.ShapeDtypeStruct(shape, np.int32) for shape in ((LAYERS,), (1, T), (1,))
    )
    lowered = prefill_short.lower(
        model, serving, make_params(model), each, tokens, row, row, row, memory
    )
    text = lowered.as_text()
    assert text.count("func.func private @_read_layer") == 1
    assert text.count("call @_read_layer") == (1 if model.scan else LAYERS)
    taken = lowered.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    assert taken.alias_size_in_bytes >= held
    assert taken.temp_size_in_bytes < held / 4  # keys alone are nearly half of it


def test_layers_without_a_decision_are_left_out():
    tokens, memory = np.zeros((1, T)), empty_memory(SCANNED, SERVING)
    logits, memory = read(SCANNED, [DENSE], tokens, [T], [T], [0], memory)
    one, params = UNROLLED.replace(layers="layer"), make_params(UNROLLED)
    numbers = (jnp.asarray(n, jnp.int32) for n in (tokens, [T], [T], [0]))
    expected, _ = prefill_prompts(
        one, SERVING, params, [DENSE], *numbers, empty_memory(one, SERVING)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (memory.tables[1:] == -1).all()


@pytest.mark.parametrize("length", [T, 16])
def test_progress_tells_the_layers_that_are_read_one_by_one(length):
    seen = []
    numbers = (jnp.asarray(n, jnp.int32) for n in (np.zeros((1, length)), [9], [9], [0]))
    prefill_prompts(
        SCANNED, SERVING, make_params(SCANNED), [ROUTED] * LAYERS, *numbers,
        empty_memory(SCANNED, SERVING), seen.append,
    )  # fmt: skip
    assert seen == ([] if length <= T else list(range(LAYERS)))


@pytest.mark.parametrize("length", [T, 16])
def test_while_prompts_are_read_the_host_sends_nothing(length):
    numbers = [jnp.asarray(n, jnp.int32) for n in (np.zeros((1, length)), [9], [9], [0])]
    decisions, params = jnp.full(LAYERS, ROUTED), jax.device_put(make_params(UNROLLED))
    memory = empty_memory(UNROLLED, SERVING)
    # Not even which layer it is: sent one by one, numbers would hold up every layer.
    with jax.transfer_guard("disallow"):
        prefill_prompts(UNROLLED, SERVING, params, decisions, *numbers, memory)
