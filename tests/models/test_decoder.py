"""The decoder: causal, the same in every mode and every way of running its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from routing_jax.kernels import ATTENTION, checked
from routing_jax.models import (
    Decoder,
    DecoderConfig,
    count_params,
    init_cache,
    init_params,
    repeating_pattern,
    stack_layers,
    unstack_layers,
)
from routing_jax.routers import BlockRouterConfig

from ..small_model import MIXED, make_params

BLOCKS = MIXED.replace(
    layers="(block,linear)*2",
    blocks=BlockRouterConfig(block_q=2, block_kv=4, budget="blocks", blocks=3, width=4),
    scan=True,
)
SCANNED = MIXED.replace(layers="(conv,routed,full)*2", scan=True)


@functools.cache
def runner(config, mode):
    """The jitted model: (params, tokens, positions, segment_ids, cache, rng) -> ModelOutput."""
    return jax.jit(
        lambda params, *args: Decoder(config).apply({"params": params}, *args, mode=mode)
    )


def with_bias(params, bias):
    """The router bias of every routed layer set."""

    def put(path, leaf):
        return np.full_like(leaf, bias) if path[-1].key == "bias" else leaf

    return jax.tree_util.tree_map_with_path(put, params)


def tokens_of(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 24, (batch, length), dtype=np.int32)


def test_no_gradient_reaches_back_from_later_tokens():
    config, length = MIXED, 12
    tokens = np.arange(length, dtype=np.int32)[None]  # each once, so that a row is a position

    def outputs(embedding, rest):
        args = ({**rest, "embedding": embedding}, tokens, None, None, None, jax.random.key(1))
        return runner(config, "train")(*args).logits[0, :, 20:]  # 20… are never read

    params = make_params(config)
    jacobian = jax.jit(jax.jacobian(lambda e, p: outputs(e, p).sum(-1)))(
        params["embedding"], params
    )
    size = np.abs(np.asarray(jacobian)[:, :length]).sum(-1)  # [T, S]
    later = np.triu(np.ones((length, length), bool), 1)
    assert np.all(size[later] == 0)
    assert np.all(size[~later] > 0)


USAGES = [-100.0, -2.0, 0.0, 2.0, 100.0]


@pytest.mark.parametrize("config", [MIXED, SCANNED], ids=["unrolled", "scanned"])
def test_skipping_equals_masking_at_every_usage(config):
    tokens = tokens_of(3, 64)
    usages = []
    for bias in USAGES:
        params = with_bias(make_params(config), bias)
        masked = runner(config, "masked")(params, tokens)
        skipped = runner(config, "eval")(params, tokens)
        np.testing.assert_allclose(skipped.logits, masked.logits, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(skipped.reports.choice, masked.reports.choice)
        usages.append(float(skipped.reports.usage[1::3].mean()))
    assert usages == sorted(usages)
    assert usages[0] == 0
    assert usages[-1] == 1
    assert 0 < usages[2] < 1


def test_packed_segments_equal_separate_sequences():
    tokens, lengths = tokens_of(2, 40), (20, 20)
    params = make_params(MIXED)
    segments = np.tile(np.repeat(np.arange(2, dtype=np.int32), lengths), (2, 1))
    packed = runner(MIXED, "eval")(params, tokens, None, segments).logits
    parts = np.split(tokens, np.cumsum(lengths)[:-1], axis=1)
    alone = [runner(MIXED, "eval")(params, part).logits for part in parts]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-3, atol=1e-4)


STARTS, STEPS = np.array([7, 1, 4, 3]), 8  # tokens of each prompt, and of its continuation


@pytest.mark.parametrize("config", [MIXED, SCANNED, BLOCKS], ids=["unrolled", "scanned", "blocks"])
def test_prefill_and_decode_equal_the_masked_model(config):
    params = make_params(config)
    tokens = tokens_of(len(STARTS), STARTS.max() + STEPS)
    place = np.arange(tokens.shape[1], dtype=np.int32)[None]
    positions = np.where(place < (STARTS + STEPS)[:, None], place, -1)
    want = runner(config, "masked")(params, tokens, positions)

    width = STARTS.max()
    prompt = np.where(place[:, :width] < STARTS[:, None], place[:, :width], -1)
    cache = init_cache(config, len(STARTS), tokens.shape[1])
    out = runner(config, "prefill")(params, tokens[:, :width], prompt, None, cache)
    np.testing.assert_array_equal(out.cache.lengths, STARTS)
    for b, count in enumerate(STARTS):
        np.testing.assert_allclose(
            out.logits[b, :count], want.logits[b, :count], rtol=1e-3, atol=1e-4
        )

    rows, mixtures = np.arange(len(STARTS)), set()
    for step in range(STEPS):
        at = STARTS + step
        out = runner(config, "decode")(params, tokens[rows, at][:, None], None, None, out.cache)
        np.testing.assert_allclose(out.logits[:, 0], want.logits[rows, at], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(
            out.reports.choice[:, :, 0], np.asarray(want.reports.choice)[:, rows, at]
        )
        mixtures |= set(np.asarray(out.reports.choice)[1::3].sum((1, 2)).tolist())
    np.testing.assert_array_equal(out.cache.lengths, STARTS + STEPS)
    if config is not BLOCKS:
        assert mixtures & {1, 2, 3}  # routed and unrouted samples in one step


def test_a_cache_of_block_layers_holds_whole_blocks():
    cache = init_cache(BLOCKS, 2, 9)
    assert cache.layers[0].keys.shape[-3] == 12
    assert cache.layers[1].keys is None


def test_what_heads_visit_is_told_on_request():
    model = Decoder(BLOCKS)
    _, told = jax.jit(lambda p, t: model.apply({"params": p}, t, mutable=["intermediates"]))(
        make_params(BLOCKS), tokens_of(2, 22)
    )
    (heads,) = told["intermediates"]["layers"]["block_0"]["mixer"]["head_usage"]
    assert heads.shape == (2, 1)  # repeats, kv heads
    assert np.all((np.asarray(heads) > 0) & (np.asarray(heads) < 1))


def prefilled():
    """Four rows of seven tokens, and what the model makes of them."""
    tokens = tokens_of(4, 7)
    positions = np.tile(np.arange(7, dtype=np.int32), (4, 1))
    cache = init_cache(MIXED, 4, STARTS.max() + STEPS)
    return tokens, runner(MIXED, "prefill")(make_params(MIXED), tokens, positions, None, cache)


def test_decode_from_an_empty_cache_fills_it_as_prefill_does():
    tokens, whole = prefilled()
    cache, logits = init_cache(MIXED, 4, STARTS.max() + STEPS), []
    for t in range(tokens.shape[1]):
        out = runner(MIXED, "decode")(make_params(MIXED), tokens[:, t : t + 1], None, None, cache)
        cache = out.cache
        logits.append(out.logits)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole.logits, rtol=1e-3, atol=1e-4)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole.cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_finished_row_leaves_its_cache_and_its_neighbours_alone():
    params, start = make_params(MIXED), prefilled()[1].cache
    token, done = tokens_of(4, 1, seed=1), np.array([False, True, False, True])
    decode = runner(MIXED, "decode")
    every = decode(params, token, None, None, start)
    some = decode(params, token, np.where(done, -1, 7)[:, None].astype(np.int32), None, start)
    np.testing.assert_allclose(some.logits[~done], every.logits[~done], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(some.cache.lengths, np.where(done, 7, 8))
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(some.cache), strict=True):
        np.testing.assert_array_equal(old[done], new[done])
    assert np.all(np.isfinite(some.reports.cost))


@functools.cache
def loss_and_gradient(config):
    def loss(params, tokens):
        out = Decoder(config).apply({"params": params}, tokens, rng=jax.random.key(5), mode="train")
        value = jnp.mean(jax.nn.logsumexp(out.logits, -1) - out.logits[..., 3])
        return value + jnp.mean(out.reports.cost), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_scanned_parameters_start_as_the_unrolled_ones():
    small = MIXED.replace(layers="conv*2", mlp_width=0)
    unrolled = init_params(small, jax.random.key(0))
    scanned = init_params(small.replace(scan=True, remat=True), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, scanned, stack_layers(unrolled, small))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(scanned, small), unrolled)
    first, second = (unrolled[f"layers_{i}"]["block_0"]["mixer"]["conv"] for i in range(2))
    assert np.all(np.asarray(first) != np.asarray(second))


def test_scan_and_remat_change_no_number():
    plain = MIXED.replace(layers="(routed,conv)*2")
    changed = plain.replace(scan=True, remat=True)
    tokens = tokens_of(2, 16)
    (want, want_out), want_gradient = loss_and_gradient(plain)(make_params(plain), tokens)
    (got, got_out), gradient = loss_and_gradient(changed)(make_params(changed), tokens)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_array_equal(got_out.reports.choice, want_out.reports.choice)
    assert np.any(got_out.reports.choice[0] != got_out.reports.choice[2])
    np.testing.assert_allclose(got_out.logits, want_out.logits, rtol=1e-4, atol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, gradient, stack_layers(want_gradient, plain))


def test_remat_does_not_attend_again():
    def attentions(config):
        tokens = tokens_of(1, 16)
        params = make_params(config)
        jaxpr = jax.make_jaxpr(loss_and_gradient(config))(params, tokens)
        return str(jaxpr).count(f"name={ATTENTION}]")

    plain = BLOCKS.replace(layers="block*2", scan=False)
    assert attentions(plain) == attentions(plain.replace(remat=True)) > 0


def test_reports_stand_one_a_layer_in_order():
    reports = runner(SCANNED, "eval")(make_params(SCANNED), tokens_of(3, 64)).reports
    assert reports.choice.shape == (6, 3, 64)
    np.testing.assert_array_equal(np.asarray(reports.usage)[[0, 2, 3, 5]], [0, 1, 0, 1])
    np.testing.assert_array_equal(np.asarray(reports.cost)[[2, 5]], [1, 1])


@pytest.mark.parametrize(
    "layers",
    ["full", "conv", "routed", "block", "linear", "conv,routed*2,full", "(conv,full)*2"],
)
def test_the_parameters_are_those_of_the_formula(layers):
    config = MIXED.replace(layers=layers, blocks=BLOCKS.blocks)
    D, N, K, H, F, V, W = 8, 2, 1, 4, 12, 24, 3
    attention, conv = D * N * H + 2 * D * K * H + N * H * D, W * D
    R, hidden = 3, 4
    router = D * R + (D + 1) * hidden + hidden + 1
    mixer = {"full": attention, "conv": conv, "routed": attention + conv + router}
    mixer |= {"block": attention + 2 * D * K * 4 + K, "linear": attention}
    want = 2 * V * D + D + sum(mixer[kind] + 3 * D * F + 2 * D for kind in config.mixers)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert count_params(shapes) == want
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    scanned = jax.eval_shape(lambda: init_params(config.replace(scan=True), jax.random.key(0)))
    assert count_params(scanned) == want
    repeats = len(config.mixers) // len(repeating_pattern(config.mixers))
    assert all(leaf.shape[0] == repeats for leaf in jax.tree.leaves(scanned["layers"]))


def test_only_the_places_to_be_read_have_logits():
    params = make_params(SCANNED)
    tokens = np.random.default_rng(0).integers(0, SCANNED.vocab_size, (2, 9))
    read = np.array([[8, 0], [3, 3]])
    apply = jax.jit(Decoder(SCANNED).apply)
    want = np.asarray(apply({"params": params}, tokens).logits)[np.arange(2)[:, None], read]
    got = apply({"params": params}, tokens, read=read).logits
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_head_bias_is_added_to_the_logits():
    config = MIXED.replace(layers="conv", head_bias=True)
    params, tokens = make_params(config), tokens_of(2, 16)
    assert params["head_bias"].shape == (24,)
    assert np.abs(params["head_bias"]).min() > 0
    without = {name: leaf for name, leaf in params.items() if name != "head_bias"}
    got = runner(config, "eval")(params, tokens).logits
    plain = runner(config.replace(head_bias=False), "eval")(without, tokens).logits
    np.testing.assert_allclose(got - plain, np.broadcast_to(params["head_bias"], got.shape), 1e-4)


def test_a_tied_head_scores_with_the_embedding_s_own_rows():
    config = MIXED.replace(layers="conv")
    params, tokens = make_params(config), tokens_of(2, 16)
    tied = {name: leaf for name, leaf in params.items() if name != "head"}
    untied = {**tied, "head": params["embedding"].T}
    got = runner(config.replace(tie_embeddings=True), "eval")(tied, tokens).logits
    np.testing.assert_allclose(got, runner(config, "eval")(untied, tokens).logits, 1e-5, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_start_at_unit_size(tied):
    config = DecoderConfig(width=64, layers="full", tie_embeddings=tied, dtype="float32")
    params = init_params(config, jax.random.key(0))
    logits = np.asarray(runner(config, "eval")(params, tokens_of(2, 16)).logits)
    assert 0.5 < logits.std() < 2


def test_a_cache_longer_than_the_context_is_refused():
    config = MIXED.replace(context=16)
    assert init_cache(config, 1, 16).lengths.shape == (1,)
    with pytest.raises(ValueError, match=r"^length is 17; .* at most model\.context = 16\.$"):
        init_cache(config, 1, 17)


def test_bfloat16_differs_from_float32_by_rounding():
    config = MIXED.replace(layers="conv,full")
    params, tokens = make_params(config), tokens_of(2, 16)
    full = np.asarray(runner(config, "eval")(params, tokens).logits)
    half = runner(config.replace(dtype="bfloat16"), "eval")(params, tokens).logits
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - full) < 0.03 * np.linalg.norm(full)


def test_a_mode_without_what_it_needs_is_refused():
    params, tokens = make_params(MIXED), tokens_of(2, 3)
    for mode in ("prefill", "decode"):
        with pytest.raises(ValueError, match=f"mode '{mode}' needs a cache; it is None"):
            runner(MIXED, mode)(params, tokens)
    with pytest.raises(ValueError, match=r"mode 'decode' takes tokens \[B,1\]; they are \(2, 3\)"):
        runner(MIXED, "decode")(params, tokens, None, None, init_cache(MIXED, 2, 8))


def test_an_unknown_mode_is_refused():
    for config in (MIXED, SCANNED, MIXED.replace(layers="conv")):
        with pytest.raises(ValueError, match=r"^mode is 'evaluate'; accepted: train, eval, masked"):
            jax.eval_shape(runner(config, "evaluate"), make_params(config), tokens_of(2, 3))


@pytest.mark.parametrize("config", [MIXED, SCANNED], ids=["unrolled", "scanned"])
def test_what_a_cache_has_no_room_for_is_refused_where_positions_are_known(config):
    def step(params, tokens, cache):
        return Decoder(config).apply({"params": params}, tokens, cache=cache, mode="decode").cache

    params, tokens = make_params(config), tokens_of(2, 1)
    full = init_cache(config, 2, 8)._replace(lengths=jnp.array([3, 8]))
    said = r"positions must be below 8, the most tokens a sequence of this cache holds; "
    with pytest.raises(ValueError, match=said + r"row \(1,\) reaches 8"):
        step(params, tokens, full)
    run = jax.jit(checked(step))
    error, _ = run(params, tokens, full)
    with pytest.raises(checkify.JaxRuntimeError, match=said + "some row breaks this"):
        error.throw()
    error, after = run(params, tokens, full._replace(lengths=jnp.array([3, 7])))
    error.throw()
    np.testing.assert_array_equal(after.lengths, [4, 8])


def test_a_cache_without_keys_has_no_end():
    config = MIXED.replace(layers="conv", mlp_width=0)
    cache = init_cache(config, 2, 8)._replace(lengths=jnp.array([3, 8]))
    out = Decoder(config).apply(
        {"params": make_params(config)}, tokens_of(2, 1), cache=cache, mode="decode"
    )
    np.testing.assert_array_equal(out.cache.lengths, [4, 9])
