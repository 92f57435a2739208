"""Decoding from a contiguous cache: the kernel's way and XLA's against a loop in numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from routing_jax.kernels import decode_attention, decode_head_runs
from routing_jax.kernels.decode import mosaic_gpu

from ..cuda_lowering import lower_for_cuda

B, H = 3, 8


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def decode_by_loop(q, keys, values, lengths):
    """Each query alone, in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    out, group = np.zeros(q.shape), q.shape[2] // keys.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        if lengths[b] > 0:
            seen = (b, slice(lengths[b]), n // group)
            weights = np.exp(keys[seen] @ q[b, 0, n] / np.sqrt(q.shape[3]))
            out[b, 0, n] = weights @ values[seen] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("implementation", "num_heads", "num_kv_heads", "length"),
    [
        ("xla", 2, 2, 13),
        ("xla", 3, 1, 13),
        ("paged", 4, 2, 13),  # pages of one key
        ("paged", 2, 2, 24),
        ("paged", 6, 2, 256),
    ],
)
def test_decode_equals_a_loop_over_its_rows(implementation, num_heads, num_kv_heads, length):
    q = normal(B, 1, num_heads, H)
    keys, values = normal(2, B, length, num_kv_heads, H, seed=1)
    decode = jax.jit(lambda *args: decode_attention(*args, implementation=implementation))
    for lengths in itertools.product([0, 1, length // 2, length], repeat=B):
        # What stands past a sequence's end may be anything.
        stale = (np.arange(length) >= np.array(lengths)[:, None])[:, :, None, None]
        dirty = jnp.where(stale, 1e6, keys), jnp.where(stale, -1e6, values)
        got = decode(q, *dirty, np.array(lengths, np.int32))
        want = decode_by_loop(q, keys, values, lengths)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


KV_HEADS, GROUPS = (2, 1, 1), (1, 3, 2)


def runs_of(length, heads_more=1, dtype=jnp.float32, head_dim=H):
    """Three runs of heads with their queries, and heads that none of them reads."""
    queries = [
        normal(B, 1, n * group, head_dim, seed=n + group, dtype=dtype)
        for n, group in zip(KV_HEADS, GROUPS)
    ]
    return queries, *normal(2, B, length, 4 + heads_more, head_dim, seed=1, dtype=dtype)


TAKEN = {
    "none": np.zeros((B, 3), bool),
    "all": np.ones((B, 3), bool),
    "one each": np.eye(3, dtype=bool),
    "two in all": np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0]], bool),
}


@pytest.mark.parametrize("implementation", ["xla", "paged"])
def test_runs_of_heads_are_attended_to_where_they_are_taken_and_else_not_read(implementation):
    queries, keys, values = runs_of(24)
    lengths = np.array([24, 0, 9], np.int32)
    starts = np.cumsum((0, *KV_HEADS))
    decode = jax.jit(lambda *args: decode_head_runs(*args, KV_HEADS, implementation=implementation))
    for taken in TAKEN.values():
        read = np.append(np.repeat(taken.any(0), KV_HEADS), False)[:, None]
        poisoned = jnp.where(read, keys, jnp.nan), jnp.where(read, values, jnp.nan)
        got = decode(queries, *poisoned, lengths, taken)
        for e, out in enumerate(got):
            run = slice(starts[e], starts[e + 1])
            own = np.where(taken[:, e], lengths, 0)
            want = decode_by_loop(queries[e], keys[:, :, run], values[:, :, run], own)
            np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)


def test_runs_that_do_not_fit_are_refused():
    queries, keys, values = runs_of(24, heads_more=0)
    arguments = keys, values, jnp.full(B, 9), jnp.ones((B, 3), bool)
    with pytest.raises(ValueError, match=r"at most 4, .* they are \(2, 2, 1\)"):
        decode_head_runs(queries, *arguments, (2, 2, 1))
    with pytest.raises(ValueError, match=r"taken \[B,E\] must have shape \(3, 2\)"):
        decode_head_runs(queries[:2], *arguments, (2, 1))
    with pytest.raises(ValueError, match="multiple of its run's heads K"):
        decode_head_runs(queries, *arguments, (1, 2, 1))


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "hopper_refusal", lambda: None)


def shapes(length, dtype, head_dim=64):
    queries, keys, values = jax.eval_shape(lambda: runs_of(length, dtype=dtype, head_dim=head_dim))
    taken = jax.ShapeDtypeStruct((B, 3), bool)
    return queries, keys, values, jax.ShapeDtypeStruct((B,), jnp.int32), taken


def decode_runs(queries, keys, values, lengths, taken):
    return decode_head_runs(queries, keys, values, lengths, taken, KV_HEADS)


def decode_first(queries, keys, values, lengths, taken):
    return decode_attention(queries[0], keys[:, :, :2], values[:, :, :2], lengths)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("decode", [decode_runs, decode_first])
def test_long_caches_take_one_kernel_on_hopper(decode):
    assert lower_for_cuda(decode, *shapes(8192, jnp.bfloat16)).count("@mosaic_gpu") == 1


REFUSED = {
    "short": (4096, jnp.bfloat16, 64),
    "no page size divides it": (8192 + 32, jnp.bfloat16, 64),
    "float32": (8192, jnp.float32, 64),
    "head dim": (8192, jnp.bfloat16, 384),
}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", REFUSED)
def test_xla_takes_what_the_kernel_does_not(name):
    assert "decode_kernel" not in str(jax.make_jaxpr(decode_runs)(*shapes(*REFUSED[name])))


@pytest.mark.usefixtures("on_hopper")
def test_only_xla_is_split_among_devices():
    arguments, found = shapes(8192, jnp.bfloat16), []
    for devices, axis in ((1, AxisType.Auto), (2, AxisType.Auto), (2, AxisType.Manual)):
        mesh = AbstractMesh((devices, 1, 1), ("data", "fsdp", "tensor"), (axis,) * 3)
        with jax.sharding.use_abstract_mesh(mesh):
            found.append("decode_kernel" in str(jax.make_jaxpr(decode_runs)(*arguments)))
    assert found == [True, False, True]  # each device has its own part where an axis is manual


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "head_dim"), [(8192, 64), (8192 + 64, 128), (1024, 256)])
def test_the_kernel_equals_xla(length, head_dim):
    queries, keys, values = runs_of(length, dtype=jnp.bfloat16, head_dim=head_dim)
    lengths = jnp.array([length - 5, 0, length // 3])

    def both(function, *arguments):
        got, want = (
            jax.jit(lambda *args, name=name: function(*args, implementation=name))(*arguments)
            for name in ("mosaic_gpu", "xla")
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)
            np.testing.assert_array_equal(a[1], 0)

    both(decode_attention, queries[0], keys[:, :, :2], values[:, :, :2], lengths)
    for taken in TAKEN.values():

        def runs(*args, implementation):
            return decode_head_runs(*args, KV_HEADS, implementation=implementation)

        both(runs, queries, keys, values, lengths, jnp.asarray(taken))
