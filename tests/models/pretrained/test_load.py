"""Published models: the numbers of an independent forward pass, from every format they come in."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from routing_jax.generate import generate
from routing_jax.models import Decoder, stack_layers
from routing_jax.models.pretrained import load_pretrained, open_checkpoint
from routing_jax.models.pretrained.parts import parts, read_part, sizes
from routing_jax.sharding import make_mesh

from .published import MODELS, forward, gguf_tensors, random_tensors, write_folder, write_gguf

TOKENS = np.random.default_rng(1).integers(0, 40, 24, dtype=np.int32)
same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(name, config, tensors, Hugging Face folder, GGUF file) of one kind of model."""
    name = request.param
    config, folder = MODELS[name], tmp_path_factory.mktemp(name)
    tensors = random_tensors(config)
    file = write_gguf(folder / "model.gguf", config, tensors)
    return name, config, tensors, write_folder(folder, config, tensors), file


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """(tensors, folder) of the kind with the most kinds of tensors."""
    tensors = random_tensors(MODELS["qwen3"])
    return tensors, write_folder(tmp_path_factory.mktemp("qwen3"), MODELS["qwen3"], tensors)


def test_logits_are_those_of_an_independent_forward_pass(model):
    _, config, tensors, folder, _ = model
    loaded = load_pretrained(folder, dtype="float32")
    logits = jax.jit(Decoder(loaded.config).apply)({"params": loaded.params}, TOKENS[None]).logits
    want = forward(config, tensors, TOKENS)
    assert 0.5 < want.std() < 10
    np.testing.assert_allclose(logits[0], want, rtol=1e-4, atol=1e-4)


def test_both_formats_hold_the_same_model(model):
    _, _, _, folder, file = model
    from_folder, from_file = (load_pretrained(path, dtype="float32") for path in (folder, file))
    same(from_folder.params, from_file.params)
    np.testing.assert_allclose(
        from_folder.config.rope_factors, from_file.config.rope_factors, rtol=1e-6
    )
    eps = from_folder.config.norm_eps
    assert from_file.config.norm_eps == pytest.approx(eps, rel=1e-6)
    rounded = {"rope_factors": from_folder.config.rope_factors, "norm_eps": eps}
    assert from_file.config.replace(**rounded) == from_folder.config


def test_the_test_s_own_gguf_is_the_published_one(model):
    """Rows moved for neighbouring pairs, and pairs that are neighbours: no change, as published."""
    _, config, tensors, _, _ = model
    moved = gguf_tensors(config, tensors)
    interleaved = config["model_type"] in ("llama", "mistral")
    np.testing.assert_allclose(
        forward(config, moved, TOKENS, interleaved), forward(config, tensors, TOKENS), rtol=1e-9
    )


def test_the_context_is_the_window_where_that_is_shorter(model):
    name, _, _, folder, _ = model
    assert open_checkpoint(folder).config.context == (48 if name == "mistral" else 64)


@pytest.mark.parametrize(("said", "context"), [(None, 64), ({}, 64), (16, 16)])
def test_a_window_of_mistral_s_is_none_where_it_is_null_and_its_default_where_unsaid(
    said, context, tmp_path
):
    config = MODELS["mistral"] | {"sliding_window": said}
    if said == {}:
        del config["sliding_window"]
        config["max_position_embeddings"], context = 8192, 4096
    folder = write_folder(tmp_path, config, random_tensors(config))
    assert open_checkpoint(folder).config.context == context


def test_greedy_tokens_from_the_cache_are_those_of_whole_new_readings(qwen3):
    tensors, folder = qwen3
    loaded = load_pretrained(folder, dtype="float32")
    made = jax.jit(lambda p, t, n: generate(loaded.config, p, t, n, 8))(
        loaded.params, TOKENS[None], np.array([len(TOKENS)])
    )[0]
    tokens = TOKENS.tolist()
    for token in made.tolist():
        assert token == forward(MODELS["qwen3"], tensors, tokens)[-1].argmax()
        tokens.append(token)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_safetensors_of_any_float_type_load_into_either_dtype(stored, qwen3, tmp_path):
    rounded = {name: tensor.astype(stored) for name, tensor in qwen3[0].items()}
    folder = write_folder(tmp_path, MODELS["qwen3"], rounded, dtype=stored)
    query = rounded["model.layers.1.self_attn.q_proj.weight"].reshape(4, 16, 32)
    for dtype in ("float32", "bfloat16"):
        loaded = load_pretrained(folder, dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {dtype}
        got = loaded.params["layers"]["block_0"]["mixer"]["query"][1]
        want = query.transpose(2, 0, 1).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(got, want)


def test_a_gguf_file_that_was_replaced_is_read_anew(tmp_path):
    """Its fields are parsed once a process, as long as it is the same file."""
    config = MODELS["qwen3"]
    first, second = (random_tensors(config, seed) for seed in (0, 1))
    name = next(name for name in first if name.endswith("down_proj.weight"))
    loaded = []
    for tensors in (first, second):
        path = write_gguf(tmp_path / "new.gguf", config, tensors)
        path.replace(tmp_path / "a.gguf")
        loaded.append(load_pretrained(tmp_path / "a.gguf", dtype="float32").params)
    leaves = [jax.tree.leaves(params) for params in loaded]
    assert np.any(first[name] != second[name])
    assert any(np.any(one != other) for one, other in zip(*leaves))


@pytest.mark.parametrize(
    ("kind", "steps"), [(Kind.F16, 2**11), (Kind.BF16, 2**8), (Kind.Q8_0, 127), (Kind.Q4_1, 7)]
)
def test_gguf_of_any_type_errs_by_its_own_rounding(kind, steps, tmp_path):
    config = MODELS["smollm2"]
    tensors = random_tensors(config)
    exact = load_pretrained(write_gguf(tmp_path / "a.gguf", config, tensors), dtype="float32")
    coarse = load_pretrained(
        write_gguf(tmp_path / "b.gguf", config, tensors, kind), dtype="float32"
    )
    for a, b in zip(jax.tree.leaves(exact.params), jax.tree.leaves(coarse.params), strict=True):
        assert np.abs(a - b).max() <= np.abs(a).max() / steps
    assert np.any(exact.params["embedding"] != coarse.params["embedding"])


def test_shards_of_a_checkpoint_are_one_model(qwen3, tmp_path):
    whole = load_pretrained(qwen3[1])
    sharded = load_pretrained(write_folder(tmp_path, MODELS["qwen3"], qwen3[0], shards=3))
    assert sharded.config == whole.config
    same(sharded.params, whole.params)


def test_unrolled_layers_are_the_scanned_ones(qwen3):
    scanned, unrolled = (load_pretrained(qwen3[1], scan=scan) for scan in (True, False))
    assert unrolled.config.replace(scan=True) == scanned.config
    same(stack_layers(unrolled.params, unrolled.config), scanned.params)


def test_a_tied_head_that_is_written_all_the_same_is_not_read(tmp_path):
    config = MODELS["smollm2"]
    tensors = random_tensors(config)
    plain = load_pretrained(write_folder(tmp_path / "a", config, tensors))
    written = tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    same(load_pretrained(write_folder(tmp_path / "b", config, written)).params, plain.params)


def test_parameters_lie_where_the_sharding_rules_put_them(qwen3):
    mesh = make_mesh()
    loaded = load_pretrained(qwen3[1], mesh=mesh)
    query = loaded.params["layers"]["block_0"]["mixer"]["query"]
    assert query.sharding.mesh == mesh
    assert tuple(query.sharding.spec) == (None, "fsdp", "tensor", None)
    same(loaded.params, load_pretrained(qwen3[1]).params)


@given(st.data())
def test_a_shard_is_a_piece_of_the_whole_and_reads_no_other_rows(qwen3, data):
    checkpoint = open_checkpoint(qwen3[1])
    part = data.draw(st.sampled_from(sorted(parts(checkpoint.config).values())))
    size = sizes(checkpoint.config)
    index = []
    for d in part.dims:
        start = data.draw(st.integers(0, size[d] - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size[d]))))
    name = part.hf.format(1)
    tensor, seen = checkpoint.tensors[name], []

    def read(rows):
        seen.append(rows)
        return tensor.read(rows)

    watched = checkpoint._replace(tensors={name: tensor._replace(read=read)})
    whole = read_part(checkpoint, part, 1, (slice(None),) * len(part.dims))
    np.testing.assert_array_equal(read_part(watched, part, 1, tuple(index)), whole[tuple(index)])
    outer, inner = part.stored[0][0], part.stored[0][1:]
    rows = index[part.dims.index(outer)]
    stride = size[inner] if inner else 1
    assert seen == [slice(rows.start * stride, rows.stop * stride)]
