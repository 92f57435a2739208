"""Presets: each says what it is for, builds, and trains, in every variant of the experiment."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routing_jax.models import repeating_pattern
from routing_jax.train import presets
from routing_jax.train.config import config_from_dict, config_to_dict
from routing_jax.train.curriculum import init_curriculum
from routing_jax.train.data import (
    CharacterConfig,
    NeedleConfig,
    PromptConfig,
    RecallConfig,
    TextConfig,
    TokenConfig,
    batches,
)
from routing_jax.train.experiments.routed_attention import VARIANTS, runs
from routing_jax.train.presets import PRESETS, get_preset
from routing_jax.train.step import init_state, make_train_step

LENGTH = 32
PHASES = ("learn_steps", "ramp_steps", "hold_steps")
ROUTED = get_preset("recall-128")


def shrink(config):
    """The same run with one repeat of its layers, at the smallest sizes that keep its features."""
    model, router = config.model, config.model.router
    small = {"num_queries": min(2, config.data.num_queries)} if is_recall(config) else {}
    if is_recall(config):
        small |= {"num_values": 4, "num_keys": LENGTH // 2}  # of one size, so compiled once
    if isinstance(config.data, NeedleConfig):
        small = {"num_values": 4, "num_keys": 4, "num_noise": 12}  # as many tokens as recall has
        small["num_needles"] = min(2, config.data.num_needles)
        small["num_queries"] = min(2, config.data.num_queries)
    blocks = {"block_q": 4, "block_kv": 8, "width": 2, "blocks": 3}
    blocks["fanout"] = min(2, model.blocks.fanout)
    return config.replace(
        **{f"data__{name}": value for name, value in small.items()},
        data__length=LENGTH,
        curriculum__lengths=(16,) if config.curriculum.lengths else (),
        model__layers=",".join(repeating_pattern(model.mixers)),
        model__width=8,
        model__head_dim=4,
        model__num_heads=2 if "schemes" in model.mixers else 1,
        model__num_kv_heads=1,
        model__mlp_width=min(8, model.mlp_width),
        model__router=type(router)(
            kind=router.kind, hidden=2, usage=router.usage, summary=min(4, router.summary)
        ),
        model__blocks=dataclasses.replace(model.blocks, **blocks),
        **{f"curriculum__{name}": min(2, getattr(config.curriculum, name)) for name in PHASES},
        optimizer__warmup_steps=min(2, config.optimizer.warmup_steps),
        batch_tokens=2 * LENGTH,
        eval_sequences=2,
    )


def is_recall(config):
    return isinstance(config.data, RecallConfig)


def filled_state(config):
    """A state with random parameters, which costs nothing to compile."""
    shapes = jax.eval_shape(lambda: init_state(config))
    rng = np.random.default_rng(0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes.params
    )
    return zeros._replace(params=params, curriculum=init_curriculum(config.curriculum))


def without_data(config):
    """The run as its step may read it, which is given batches: runs equal in the rest share one."""
    rest = copy.copy(config)
    object.__setattr__(rest, "data", None)
    return rest


@functools.cache
def first_state_and_step(rest):
    return filled_state(rest), jax.jit(make_train_step(rest))


def take_one_step(config):
    batch = next(batches(config.data, split="train", seed=0, batch_size=2))
    before, step = first_state_and_step(without_data(config))
    return before, *step(before, batch)


@functools.cache
def trace(config):
    shapes = jax.eval_shape(lambda: init_state(config))
    batch = next(batches(config.data, split="train", seed=0, batch_size=2))
    step = jax.make_jaxpr(make_train_step(config))(shapes, batch)
    assert not step.effects  # or JAX dispatches every step in Python


def assert_trains(config):
    before, after, metrics = take_one_step(config)
    assert bool(metrics["finite"])
    assert int(after.curriculum.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert moved["embedding"]
    assert moved["embedding" if config.model.tie_embeddings else "head"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name in "abcdef":
        (folder / name).write_bytes(rng.integers(32, 127, 2000, np.uint8).tobytes())
    return str(folder)


# Those of a published model take theirs in test_base and test_finetune.
PUBLISHED = PromptConfig | TokenConfig
WHOLE = [name for name in PRESETS if not isinstance(get_preset(name).data, PUBLISHED)]


def small_preset(name, text):
    config = get_preset(name)
    if isinstance(config.data, CharacterConfig):
        config = config.replace(data__source=(text,))
    elif isinstance(config.data, TextConfig):
        config = config.replace(data__source=text)
    return shrink(config)


def by_step(names):
    """The names, those in a row whose runs share a step: a worker keeps what it has compiled."""
    groups = {}
    for name in names:
        groups.setdefault(without_data(shrink(get_preset(name))), []).append(name)
    return [name for group in groups.values() for name in group]


@pytest.mark.parametrize("name", by_step(WHOLE))
def test_every_preset_takes_a_step(name, text, compile_cache):
    assert_trains(small_preset(name, text))


PLANNED = list(dict.fromkeys((run.task, run.variant) for run in runs()))
# What differs from the preset in its curriculum alone is traced here, and run with the slow tests.
SAME_MODEL = [v for v, make in VARIANTS.items() if make(ROUTED).model == ROUTED.model]


def variant_of(name, variant, text):
    config = get_preset(name)
    if isinstance(config.data, TextConfig):
        config = config.replace(data__source=text)
    # Shrunk before and after: a variant may size its parts by what it replaces.
    return shrink(VARIANTS[variant](shrink(config)))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in SAME_MODEL])
def test_every_variant_of_the_model_takes_a_step(variant, text, compile_cache):
    assert_trains(variant_of("recall-128", variant, text))


@pytest.mark.parametrize(("name", "variant"), PLANNED)
def test_every_planned_variant_can_be_traced(name, variant, text):
    trace(variant_of(name, variant, text))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), PLANNED)
def test_every_planned_variant_takes_a_step(name, variant, text, compile_cache):
    assert_trains(variant_of(name, variant, text))


def test_every_maker_says_how_long_and_what_to_expect():
    makers = (
        presets.recall,
        presets.multi_query,
        presets.mqar,
        presets.unmarked,
        presets.language_model,
        presets.mixed_schemes,
        presets.block_mqar,
        presets.block_needle,
        presets.block_language_model,
        presets.layer_routing,
        presets.finetuning,
    )
    for maker in makers:
        for word in ("Command: `routing-jax train ", "Hardware and time: ", "Expect: "):
            assert word in maker.__doc__, (maker.__name__, word)


def test_lengths_and_tasks_are_those_of_the_names():
    for name in PRESETS:
        config = get_preset(name)
        if is_recall(config):
            assert str(config.data.length) in name.split("-")
            unmarked = ("unmarked" in name) or name in ("mqar-256", "mqar-256-summary")
            assert config.data.marked != (unmarked or name.startswith("block-mqar"))
            assert (config.data.style == "mqar") == ("mqar" in name)
            assert bool(config.model.router.summary) == name.endswith("summary")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_read_back_from_json(name):
    config = get_preset(name)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_text_longer_than_the_learned_positions_is_refused():
    said = r"^data\.length is 512; it must be at most model\.learned_positions = 256\.$"
    with pytest.raises(ValueError, match=said):
        get_preset("moas").replace(data__length=512)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^preset 'recal' is unknown; accepted: recall-128, "):
        get_preset("recal")
