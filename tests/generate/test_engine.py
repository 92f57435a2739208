"""The engine: what it makes is what reading everything anew makes, whoever shares the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.attention import Prompts
from routing_jax.attention.page_pool import NO_PAGE
from routing_jax.generate import (
    DENSE,
    ROUTED,
    SPARSE,
    Engine,
    Request,
    ServingConfig,
    TooFewPagesError,
    generate,
)
from routing_jax.generate.layer import layer_params
from routing_jax.generate.paged_decode import read_tokens
from routing_jax.generate.paged_memory import empty_memory
from routing_jax.generate.paged_prefill import prefill_layer, prefill_prompts, prefill_short
from routing_jax.models import Decoder
from routing_jax.routers import LayerRouterConfig, SparseModeConfig, slow_channels

from ..small_model import MIXED, make_params
from .plain_decoder import forward, greedy

LAYERS = 3
MODEL = MIXED.replace(
    layers=f"layer*{LAYERS}",
    width=16,
    num_heads=4,
    num_kv_heads=2,
    qk_norm=True,
    rope_theta=50.0,
    layer_router=LayerRouterConfig(pool=3),
    sparse=SparseModeConfig(sink=4, window=8, block_q=4, block_kv=4),
    scan=True,
)
UNROLLED = MODEL.replace(scan=False)
FULL = MODEL.replace(layers=f"full*{LAYERS}")  # the same parameters, routers ignored
SERVING = ServingConfig(pages=64, sequences=3, length=40, page_size=4, chunk=16)
PATTERNS = ([DENSE] * 3, [SPARSE] * 3, [DENSE, SPARSE, SPARSE], [SPARSE, DENSE, SPARSE])
pytestmark = pytest.mark.usefixtures("compile_cache")


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(0, MODEL.vocab_size, length).tolist()


def serve(requests, who=ROUTED, model=MODEL):
    """What each request got, and the engine; `who` decides all layers, or each."""
    decisions = [who] * LAYERS if isinstance(who, int) else who
    engine = Engine(model, make_params(model), SERVING, decisions)
    numbers = [engine.add(request) for request in requests]
    made = {number: [] for number in numbers}
    for one in engine.run():
        made[one.request].append(one.token)
        assert one.last == (len(made[one.request]) == requests[one.request].max_new_tokens)
    return list(made.values()), engine


def plain(request, decisions):
    """The same from the decoder in NumPy, and what its layers decided."""
    taken = [None if d == ROUTED else d == DENSE for d in decisions]
    params = make_params(UNROLLED)
    return greedy(UNROLLED, params, request.tokens, request.max_new_tokens, taken)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_of_a_decoder_with_the_same_masks(pattern):
    requests = [Request(prompt(n), max_new_tokens=m) for n, m in [(23, 14), (5, 20), (8, 1)]]
    made, _ = serve(requests, pattern)
    assert made == [plain(request, pattern)[0] for request in requests]


def test_unrolled_layers_make_the_same_tokens():
    requests = [Request(prompt(n), 14) for n in (23, 20)]
    made, _ = serve(requests, PATTERNS[2], UNROLLED)
    assert made == [plain(request, PATTERNS[2])[0] for request in requests]


def test_prompts_decide_each_for_itself_and_decoding_obeys():
    requests = [Request(prompt(n, seed), 6) for seed in range(3) for n in (30, 17, 8, 7)]
    expected = [plain(request, [ROUTED] * LAYERS) for request in requests]
    decided = np.array([decisions for _, decisions in expected])
    assert (decided.any(0) & ~decided.all(0)).any()  # some layer is dense for some prompts only
    made, _ = serve(requests)
    assert made == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("mode", ["streaming", "triangle", "topk"])
def test_prompts_are_read_by_the_rule_of_the_sparse_mode(mode):
    sparse = dataclasses.replace(MODEL.sparse, mode=mode, last=4, blocks=2, channels=4)
    model, tokens = UNROLLED.replace(sparse=sparse), prompt(30)
    padded = np.zeros((1, SERVING.bucket(1, 30)), np.int32)
    padded[0, :30] = tokens
    length, row = np.array([30]), np.array([1])
    logits, memory = prefill_prompts(
        model, SERVING, make_params(UNROLLED), [SPARSE] * LAYERS,
        padded, length, length + 1, row, empty_memory(model, SERVING),
    )  # fmt: skip

    def expected(dense, model):
        return forward(model, make_params(UNROLLED), tokens, [dense] * LAYERS, 30)[0][-1]

    np.testing.assert_allclose(logits[0], expected(False, model), rtol=1e-3, atol=1e-3)
    assert np.abs(logits[0] - expected(True, model)).max() > 0.02
    if mode != "streaming":
        assert np.abs(logits[0] - expected(False, UNROLLED)).max() > 0.02
    assert (memory.whole[:, 1] == (mode != "streaming")).all()


def test_layers_routed_to_full_may_search_the_prompt_and_then_see_all_of_it():
    sparse = dataclasses.replace(MODEL.sparse, **(SEARCHES | {"answers": "full"}))
    model, tokens = MODEL.replace(sparse=sparse), prompt(30)
    made, _ = serve([Request(tokens, 6)], [DENSE] * LAYERS, model)
    searching = UNROLLED.replace(sparse=sparse)
    want, _ = greedy(searching, make_params(UNROLLED), tokens, 6, [True] * LAYERS)
    assert made == [want]
    read, everything = (
        forward(m, make_params(UNROLLED), tokens, [True] * LAYERS, 30)[0][-1]
        for m in (searching, UNROLLED)
    )
    assert np.abs(read - everything).max() > 0.02


SEARCHES = {"retrieval": "topk", "answers": "topk", "last": 4, "blocks": 1, "channels": 4}


def searching(model=MODEL, **changes):
    return model.replace(sparse=dataclasses.replace(model.sparse, **(SEARCHES | changes)))


# In a layer of each kind some sequence searches, streams or attends to everything.
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, PATTERNS[3]),
        pytest.param({"channels": None}, PATTERNS[3], marks=pytest.mark.slow),
        pytest.param({"mode": "topk", "blocks": 2}, PATTERNS[1], marks=pytest.mark.slow),
        pytest.param({"mode": "topk", "retrieval": "full"}, PATTERNS[2], marks=pytest.mark.slow),
        pytest.param({"mode": "triangle"}, PATTERNS[3], marks=pytest.mark.slow),
    ],
)
def test_tokens_search_by_their_own_queries_as_one_pass_over_prompt_and_answer(changes, pattern):
    model = searching(**changes)
    requests = [Request(prompt(n), max_new_tokens=m) for n, m in [(23, 14), (5, 20), (8, 1)]]
    made, _ = serve(requests, pattern, model)
    of_pass = model.replace(scan=False)

    def expected(request, model):
        return greedy(
            model, make_params(model), request.tokens, request.max_new_tokens,
            [d == DENSE for d in pattern],
        )[0]  # fmt: skip

    assert made == [expected(request, of_pass) for request in requests]
    reading = of_pass.replace(sparse=dataclasses.replace(of_pass.sparse, answers="full"))
    assert made != [expected(request, reading) for request in requests]


def test_what_is_searched_of_pages_is_of_the_keys_they_hold():
    engine = Engine(searching(), make_params(MODEL), SERVING, PATTERNS[3])
    for seed in range(5):  # more than there are rows, so that pages change hands
        engine.add(Request(prompt(13 + seed, seed), 18 + seed))
    checked = 0
    for _ in engine.run():
        memory = jax.device_get(engine.memory)
        for (layer, row), whole in np.ndenumerate(memory.whole):
            filled = memory.lengths[row] // 4
            blocks = np.arange(filled)[0 if whole else max(1, filled - 1) :]
            slots = blocks if whole else 1 + (blocks - 1) % 2
            pages = memory.tables[layer, row][slots]
            want = slow_channels(memory.keys[pages], 4).swapaxes(1, 2)
            np.testing.assert_array_equal(memory.narrow[pages], want)
            checked += len(pages)
    assert checked > 500


def test_prompts_that_decide_for_themselves_search_each_for_itself():
    requests = [Request(prompt(n, seed), 6) for seed in range(2) for n in (30, 17, 8, 7)]
    made, engine = serve(requests, ROUTED, searching())
    params = make_params(UNROLLED)
    expected = [greedy(searching(UNROLLED), params, r.tokens, 6, [None] * LAYERS) for r in requests]
    decided = np.array([decisions for _, decisions in expected])
    assert (decided.any(0) & ~decided.all(0)).any()
    assert made == [tokens for tokens, _ in expected]
    assert engine.free_pages == SERVING.pages


@pytest.mark.parametrize(
    ("model", "who"), [(FULL, DENSE), pytest.param(MODEL, ROUTED, marks=pytest.mark.slow)]
)
def test_pages_make_the_tokens_that_a_contiguous_cache_makes(model, who):
    tokens, lengths = np.array([prompt(17), prompt(17, 1)], np.int32), np.array([17, 5])
    ordinary = jax.jit(lambda p: generate(model, p, tokens, lengths, 5))(make_params(MODEL))
    made, _ = serve([Request(t[:n].tolist(), 5) for t, n in zip(tokens, lengths)], who)
    assert made == ordinary.tolist()


def test_a_prompt_of_which_sparse_layers_would_see_everything_costs_no_more_than_unrouted():
    def work(model, T):
        """Floating-point operations of the program that reads T tokens: one layer's, or all."""
        memory = jax.eval_shape(lambda: empty_memory(model, SERVING))
        number, row = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
        if model.sparse.reach >= T:
            each, tokens = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((LAYERS,), (1, T)))
            lowered = prefill_short.lower(
                model, SERVING, make_params(UNROLLED), each, tokens, row, row, row, memory
            )
        else:
            x = jax.ShapeDtypeStruct((1, T, model.width), model.dtype)
            params = layer_params(make_params(UNROLLED), 0)
            lowered = prefill_layer.lower(
                model, SERVING, params, number, number, x, row, row, row, memory
            )
        return lowered.compile().cost_analysis()["flops"]

    # Prompts are padded to powers of two.
    assert work(MODEL, 8) == work(FULL, 8)
    assert work(MODEL, 16) > 1.05 * work(FULL, 16)
    requests = [Request(prompt(n), 6) for n in (12, 13)]  # sink and window are 12 tokens
    made, _ = serve(requests)
    short, long = (plain(request, [ROUTED] * LAYERS) for request in requests)
    assert made == [short[0], long[0]]
    assert all(short[1])
    assert not all(long[1])


def test_a_given_decision_is_obeyed_after_a_prompt_that_would_not_be_routed():
    request = Request(prompt(9), 20)  # sink and window are 12 tokens
    (made,), engine = serve([request], SPARSE)
    assert [made] != serve([request], ROUTED)[0]
    assert not engine.memory.whole.any()
    # One pass over prompt and answer obeys it alike.
    given = Prompts(jnp.array([9]), 1.0, jnp.zeros((LAYERS, 1), bool))
    tokens = jnp.array([[*request.tokens, *made]])
    out = Decoder(MODEL).apply({"params": make_params(MODEL)}, tokens, prompts=given)
    assert out.logits[0, 8:-1].argmax(axis=-1).tolist() == made


def test_nothing_is_compiled_again_for_other_patterns_or_mixes():
    programs = prefill_layer, prefill_short, read_tokens
    serve([Request(prompt(n), 3) for n in (30, 8, 7, 6)])
    compiled = [program._cache_size() for program in programs]
    for pattern in PATTERNS:
        serve([Request(prompt(n), 4) for n in (7, 29, 6, 5, 32)], pattern)
    serve([Request(prompt(6, 3), 2, temperature=1.0, top_k=3, top_p=0.5)])
    assert compiled == [program._cache_size() for program in programs]


@pytest.mark.parametrize("model", [MODEL, UNROLLED], ids=["scanned", "unrolled"])
def test_programs_run_for_every_token_or_chunk_have_no_effects(model):
    params = make_params(model)
    memory = jax.eval_shape(lambda: empty_memory(model, SERVING))
    row = jax.ShapeDtypeStruct((SERVING.sequences,), np.int32)
    one, number = jax.ShapeDtypeStruct((1,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    x = jax.ShapeDtypeStruct((1, 16, model.width), "float32")
    decode = read_tokens.trace(model, SERVING, params, row, memory)
    prefill = prefill_layer.trace(
        model, SERVING, layer_params(params, 0), number, number, x, one, one, one, memory
    )
    each, tokens = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((LAYERS,), (1, 8)))
    short = prefill_short.trace(model, SERVING, params, each, tokens, one, one, one, memory)
    # JAX dispatches a program with effects in Python, which takes longer than decoding a token.
    assert decode.jaxpr.effects == prefill.jaxpr.effects == short.jaxpr.effects == set()


def test_pages_are_held_by_tables_and_those_freed_let_more_in():
    most = {}
    for who in (SPARSE, DENSE):
        decisions = [who] * LAYERS
        engine = Engine(MODEL, make_params(MODEL), SERVING, decisions)
        for seed in range(5):
            engine.add(Request(prompt(30, seed), 10))
        most[who] = 0
        for _ in engine.run():
            tables = np.asarray(engine.memory.tables)
            pool = engine.memory.pool
            free = np.asarray(pool.free)[: int(pool.available)]
            held = tables[tables != NO_PAGE]
            assert sorted([*free, *held]) == list(range(SERVING.pages))
            assert len(free) == engine.free_pages
            most[who] = max(most[who], engine.running)
        assert engine.free_pages == SERVING.pages
    # 64 pages: a dense sequence takes 30 of them, a sparse one 9; there are rows for three.
    assert most == {DENSE: 2, SPARSE: 3}


def run_checked(requests, serving):
    """Tokens by request, the most that ran together, and the engine; no page is ever lost."""
    engine, made, most = Engine(MODEL, make_params(MODEL), serving), {}, 0
    for request in requests:
        engine.add(request)
    for one in engine.run():
        made.setdefault(one.request, []).append(one.token)
        most = max(most, engine.running)
        free = np.asarray(engine.memory.pool.free)[: int(engine.memory.pool.available)]
        tables = np.asarray(engine.memory.tables)
        assert sorted([*free, *tables[tables != NO_PAGE]]) == list(range(serving.pages))
        assert len(free) == engine.free_pages
    assert engine.free_pages == serving.pages
    return [made[number] for number in range(len(requests))], most, engine


def test_a_sequence_is_let_in_by_what_those_before_it_held():
    """64 pages: with every layer dense a sequence holds 30, with two layers 23, with one 16."""
    requests = [Request(prompt(30, seed), 10) for seed in (2, 0, 1, 3, 5)]
    expected = [plain(request, [ROUTED] * LAYERS) for request in requests]
    assert [sum(decided) for _, decided in expected] == [2, 1, 1, 1, 1]
    made, most, engine = run_checked(requests, SERVING)
    assert made == [tokens for tokens, _ in expected]
    assert most == 3  # after the first two 25 pages are free: too few for every layer
    assert engine.read_in_vain == 0


def test_a_prompt_that_found_too_few_pages_is_read_again_when_there_are_more():
    requests = [Request(prompt(30, seed), 10) for seed in (0, 1, 2, 3, 4)]
    expected = [plain(request, [ROUTED] * LAYERS) for request in requests]
    assert [sum(decided) for _, decided in expected] == [1, 1, 2, 1, 2]
    made, most, engine = run_checked(requests, dataclasses.replace(SERVING, pages=48))
    assert made == [tokens for tokens, _ in expected]
    assert engine.read_in_vain == 1  # the third, of 23 pages where 16 were free
    assert most == 2


def test_progress_counts_the_layers_of_each_wave_of_prompts():
    engine, seen = Engine(MODEL, make_params(MODEL), SERVING), []
    for n in (7, 8, 30, 20):  # the first two are read together, and all layers at once
        engine.add(Request(prompt(n), 2))
    list(engine.run(lambda *done: seen.append(done)))
    assert seen == [(LAYERS, LAYERS)] + [(done, LAYERS) for done in range(LAYERS + 1)] * 2


def test_a_stop_token_ends_a_sequence_and_nothing_follows_it():
    (whole,), _ = serve([Request(prompt(8), 12)])
    stop = whole[4]
    engine = Engine(MODEL, make_params(MODEL), SERVING)
    engine.add(Request(prompt(8), 12, stop=frozenset([stop])))
    made = list(engine.run())
    assert [one.token for one in made] == whole[: whole.index(stop) + 1]
    assert [one.last for one in made] == [False] * whole.index(stop) + [True]
    assert engine.free_pages == SERVING.pages


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_neighbours():
    drawn = [Request(prompt(8), 12, temperature=2.0, seed=seed) for seed in (1, 2)]
    (alone,), _ = serve(drawn[:1])
    (again, other, greedy_beside), _ = serve([*drawn, Request(prompt(8), 12)])
    assert alone == again != other
    assert greedy_beside == serve([Request(prompt(8), 12)])[0][0]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lambda: Request(prompt(39), 2), "39 tokens and 2 new ones are more than serving.length"),
        (lambda: Request([]), "the prompt holds no token"),
        (lambda: Request([3, 24]), "tokens from 3 to 24; the model has 0 to 23"),
        (lambda: Request([-1]), "tokens from -1 to -1; the model has 0 to 23"),
        (lambda: Request([1], seed=-1), "seed is -1; it must be from 0 to 2147483647"),
        (lambda: Request([1], 0), "max_new_tokens is 0; it must be at least 1"),
        (lambda: Request([1], temperature=-1.0), "temperature is -1.0; it must be at least 0"),
        (lambda: Request([1], top_k=-1), "top_k is -1; it must be at least 0"),
        (lambda: Request([1], top_p=0.0), "top_p is 0.0; it must lie above 0 and be at most 1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(request_, said):
    with pytest.raises(ValueError, match=said):
        Engine(MODEL, make_params(MODEL), SERVING).add(request_())


@pytest.mark.parametrize(
    ("model", "serving", "said"),
    [
        (MODEL.replace(context=10), SERVING, "are more than this model's context of 10 tokens"),
        (MODEL, dataclasses.replace(SERVING, pages=9), "take at least 12 pages; serving.pages is"),
    ],
)
def test_a_prompt_that_will_never_fit_is_refused(model, serving, said):
    engine = Engine(model, make_params(MODEL), serving)
    with pytest.raises(ValueError, match=said):
        engine.add(Request(prompt(8), 5))


def test_a_pool_too_small_for_every_layer_dense_serves_whom_routers_make_fit():
    """With every layer dense each takes 30 pages, with two layers 23, with one 16."""
    requests = [Request(prompt(30, seed), 10) for seed in (0, 2, 1, 3)]
    expected = [plain(request, [ROUTED] * LAYERS) for request in requests]
    assert [sum(decided) for _, decided in expected] == [1, 2, 1, 1]
    engine = Engine(MODEL, make_params(MODEL), dataclasses.replace(SERVING, pages=20))
    for request in requests:
        engine.add(request)
    made, dropped = {number: [] for number in range(4)}, []
    for _ in range(2):
        try:
            for one in engine.run():
                made[one.request].append(one.token)
        except TooFewPagesError as error:
            dropped.append((error.request, str(error)))
    ((number, said),) = dropped
    assert number == 1
    assert "30 tokens and 10 new ones take 23 pages" in said
    assert "serving.pages is 20" in said
    assert list(made.values()) == [[] if n == 1 else expected[n][0] for n in range(4)]
    assert engine.free_pages == 20
    assert engine.running == 0
    assert engine.read_in_vain == 1


def test_even_with_every_layer_sparse_a_prompt_takes_some_pages():
    engine = Engine(MODEL, make_params(MODEL), dataclasses.replace(SERVING, pages=8))
    with pytest.raises(ValueError, match="30 tokens and 10 new ones take at least 9 pages"):
        engine.add(Request(prompt(30), 10))


@pytest.mark.parametrize(
    ("model", "serving", "decisions", "said"),
    [
        (MIXED, SERVING, None, "model.layers is 'conv,routed,full'; what is served has"),
        (MODEL.replace(head_bias=True), SERVING, None, "has no learned positions and no head_bias"),
        (MODEL, ServingConfig(pages=8), None, "page_size is 128; it must be model.sparse.block_kv"),
        (MODEL, SERVING, [DENSE], "there are decisions for 1 layers; the model has 3"),
        (FULL, SERVING, [ROUTED] * 3, "a layer is to be routed, and model.layers is 'full"),
        (searching(FULL), SERVING, None, r"'full\*3' and model.sparse.retrieval 'topk'; 'full' la"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(model, serving, decisions, said):
    with pytest.raises(ValueError, match=said):
        Engine(model, {}, serving, decisions)
