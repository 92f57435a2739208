"""Named runs. `routing-jax presets` lists them; every field can be overridden on the command line.

Each preset's docstring gives its command, hardware, time and what to expect.
"""

from collections.abc import Callable
from functools import partial

from routing_jax.models import DecoderConfig
from routing_jax.routers import BlockRouterConfig, SchemesConfig, TokenRouterConfig
from routing_jax.train.config import OptimizerConfig, TrainConfig
from routing_jax.train.curriculum import CurriculumConfig
from routing_jax.train.data import (
    CharacterConfig,
    NeedleConfig,
    PromptConfig,
    RecallConfig,
    TextConfig,
    TokenConfig,
)

# Two layers are the fewest that can recall (a key is matched by its successor), and no rotary
# embedding is needed: the convolution tells a token what stood before it.
_RECALL_MODEL = DecoderConfig(
    width=64,
    layers="routed*2",
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    mlp_width=0,
    rope_theta=0.0,
    conv_width=4,
    router=TokenRouterConfig(hidden=16, bias=1.0),
    dtype="float32",
)


def recall(length: int) -> TrainConfig:
    """Associative recall, one marked query, pair at a random place: the published task made honest.

    Command: `routing-jax train recall-128 --workdir runs/recall-128`.
    Hardware and time: 2 CPU cores, about 2 minutes at length 128; one H100 beyond 1024.
    Expect: ≥ 99.9 % accuracy with one token of one layer attending, 1/(2·length) of them.
    Model and schedule follow the small study that the source's claims were checked with: lengths
    grow, λ ramps to 0.5 in 150 steps, and a long hold lets usage collapse to the floor.
    """
    # With hundreds of keys, training often stays at guessing among the values of the sequence.
    # So it begins with one pair, then two, from few keys; and a bias rules out at once what is
    # never an answer, which the residual stream would otherwise have to say.
    many_keys = length > 256
    stages = (*((4, 6) if many_keys else ()), 8, 16, 64, 256, 1024)
    return TrainConfig(
        data=RecallConfig(length=length, keys_per_token=16 if many_keys else 0),
        # Half precision where cuDNN's attention pays; short lengths are meant for a CPU.
        model=_RECALL_MODEL.replace(
            dtype="float32" if length < 1024 else "bfloat16", head_bias=many_keys
        ),
        curriculum=CurriculumConfig(
            explore=0.3,
            lengths=tuple(n for n in stages if n < length),
            # Few sequences a step leave accuracy too noisy for the threshold; the ramp mends that.
            learn_steps=1000 if many_keys else 3000,
            ramp_steps=150,
            hold_steps=1500,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        batch_tokens=max(4096, 16 * length),
    )


def recall_steep() -> TrainConfig:
    """Recall at length 128 with a λ so high that attention is given up, accuracy with it.

    Command: `routing-jax train recall-128-steep --workdir runs/steep --curriculum.reaction back`.
    Hardware and time: 2 CPU cores, about 2 minutes.
    Expect: at chance without a reaction; with 'back', λ falls again whenever accuracy does, and
    hovers where attention just pays.
    """
    # A sequence's one attending token costs λ/256, and a lost answer about four nats.
    return recall(128).replace(curriculum__peak=2000.0)


def multi_query(length: int) -> TrainConfig:
    """Recall with several marked queries at the end: one in sixteen tokens is a query.

    Command: `routing-jax train multi-query-512 --workdir runs/multi-query-512`.
    Hardware and time: 2 CPU cores, about 4 minutes at length 512.
    Expect: ≥ 99.9 % accuracy with one attending token a query.
    """
    return recall(length).replace(data__num_queries=length // 32)


def mqar(length: int, *, marked: bool = False, summary: int = 0) -> TrainConfig:
    """Multi-query associative recall as Zoology has it: keys recur, unmarked, at power-law gaps.

    Command: `routing-jax train mqar-256 --workdir runs/mqar-256`.
    Hardware and time: 2 CPU cores, a few minutes.
    Expect: recall is learned; usage stays high, because a convolution cannot see whether a key
    occurred before. `mqar-256-summary` gives the router a recurrent summary that can.
    """
    base = recall(length)
    return base.replace(
        data=RecallConfig(length=length, num_queries=length // 8, style="mqar", marked=marked),
        model__router=TokenRouterConfig(hidden=16, bias=1.0, summary=summary),
        curriculum__lengths=tuple(n for n in (32, 64, 128) if n < length),
    )


def unmarked(length: int, *, summary: int = 0) -> TrainConfig:
    """Recall of one unmarked query at the end: only its having occurred before tells it apart.

    Command: `routing-jax train unmarked-128 --workdir runs/unmarked-128`.
    Hardware and time: 2 CPU cores, about 3 minutes.
    Expect: usage near 25 % without a summary (every key must attend in one of two layers).
    """
    return recall(length).replace(
        data__marked=False,
        model__router=TokenRouterConfig(hidden=16, bias=1.0, summary=summary),
    )


def language_model() -> TrainConfig:
    """A byte-level language model of 20.8 M parameters, six routed layers, context 4096.

    Command: `routing-jax train lm --workdir runs/lm --data.source FOLDER` (any folder of text;
    the default is Python's own library, which is small for this model).
    Hardware and time: one H100, about 4 minutes for 200 MB.
    Expect: bits per byte within 1 % of attention everywhere at 25 % usage; λ stops rising there.
    """
    return TrainConfig(
        data=TextConfig(length=4096),
        model=DecoderConfig(
            width=512,
            layers="routed*6",
            num_heads=4,
            num_kv_heads=4,
            head_dim=128,
            mlp_width=1536,
            conv_width=4,
            router=TokenRouterConfig(hidden=32, bias=1.0),
            remat=False,
        ),
        curriculum=CurriculumConfig(
            explore=0.0,
            learn_steps=560,
            ramp_steps=1500,
            hold_steps=1000,
            threshold=1.0,
            target=0.24,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3,
            beta2=0.95,
            weight_decay=0.1,
            warmup_steps=100,
            final_fraction=0.05,
        ),
        batch_tokens=65536,
        eval_sequences=128,
    )


def mixed_schemes(steps: int) -> TrainConfig:
    """MoAS as published (arXiv 2512.20650): 10.3 M parameters, each token weighs MHA, GQA and MQA.

    Command: `routing-jax train moas --workdir runs/moas --data.source train.txt more.txt
    --data.vocab-size 283` (your own files of text; the default is Python's own library).
    Hardware and time: one H100, an estimated minute, most of it compilation.
    Expect: about 2.2 nats a character after 500 steps on 2.4 MB of WikiText, no better than MHA.
    500 steps have a constant learning rate, as in the paper; 2,000 a warm-up of 100 and a cosine,
    as in its notebook. λ is 0 in both; `reproduce moas` has the variants, and λ on `kv_cost`.
    """
    warmup = 0 if steps <= 500 else 100
    ramp = (steps - warmup) // 2 if warmup else 0
    return TrainConfig(
        data=CharacterConfig(length=256),
        model=DecoderConfig(
            width=384,
            layers="schemes*4",
            num_heads=6,
            num_kv_heads=6,
            head_dim=64,
            mlp="gelu",
            mlp_width=1536,
            rope_theta=0.0,
            learned_positions=256,
            norm="layer",
            norm_eps=1e-5,
            tie_embeddings=True,
            dropout=0.1,
            init_std=0.02,
            schemes=SchemesConfig(names="mha,gqa2,mqa", hidden=96, gate_dropout=0.1),
        ),
        curriculum=CurriculumConfig(
            peak=0.0,
            weighs="kv_cost",
            explore=0.01,  # the weight of the balance loss
            explore_fades=False,
            threshold=1.0,  # never reached: phase 1 takes its steps
            learn_steps=warmup or steps,
            ramp_steps=ramp,
            hold_steps=steps - warmup - ramp if warmup else 0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            final_fraction=0.1,
            warmup_steps=warmup,
            beta2=0.99,
            weight_decay=0.1,
        ),
        batch_tokens=12 * 256,
        eval_sequences=1_000_000,  # all there are
    )


# A convolution tells a token what stood before it; the attention between has only to match.
_BLOCK_MODEL = DecoderConfig(
    width=128,
    layers="(conv,block)*2",
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=256,
    blocks=BlockRouterConfig(kind="learned", fraction=0.25),
    head_bias=True,
)


def block_mqar(length: int) -> TrainConfig:
    """Multi-query recall with unmarked queries, each tile attending to a quarter of its blocks.

    Command: `routing-jax train block-mqar-2048 --workdir runs/block-mqar-2048`.
    Hardware and time: one H100, an estimated 3 minutes at length 2048.
    Expect: 99.9 % of recall with attention everywhere. `reproduce block-routing` measures routers
    behind it: gates with a price find as much at a fifth of the cost (three seeds), of 4,096 and
    8,192 tokens at an eighth (one), this router 59 % at a quarter (README, one seed). Trained from
    the start, as here, it is not measured.
    """
    return TrainConfig(
        # As many keys again are noise; more would make a plateau of their own.
        data=RecallConfig(
            length=length,
            num_queries=length // 16,
            num_keys=length // 8,
            style="mqar",
            marked=False,
        ),
        # A row is decided by its tile's first query: content is found by tiles of one query, for
        # which there is no Hopper kernel, and gathering takes longer than every pair. Narrower
        # projections keep what routes every query below 4 % of attention's work.
        model=_BLOCK_MODEL.replace(
            blocks=BlockRouterConfig(
                kind="learned",
                block_q=1,
                block_kv=32,
                width=24,
                fraction=0.25,
                implementation="masked",
            )
        ),
        # A length is a program to compile: few of them, close together where matching is learned.
        curriculum=CurriculumConfig(
            peak=0.0,
            explore=0.01,
            lengths=tuple(n for n in (32, 64, 128, 512, 2048) if n < length),
            learn_steps=4000,
            ramp_steps=0,
            hold_steps=1200,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        batch_tokens=min(8 * length, 2**15),
        eval_sequences=512,
    )


def block_needle(length: int, *, needles: int = 1) -> TrainConfig:
    """Needles in noise, one asked for at the end, a quarter of the blocks.

    The question for a single needle stands behind the first query of its tile: a router has to keep
    it by what it looks like, before it is known that it is asked for. Of several, one is asked for
    by the first query of the last tile: it has to be told from the others by its key.

    Command: `routing-jax train block-needle-4096 --workdir runs/block-needle-4096`.
    Hardware and time: one H100, an estimated 1 to 2 minutes at length 4096.
    Expect: one needle is always found with attention everywhere. `reproduce block-routing` measures
    routers behind it: an indexer finds 99.9 % at this cost (three seeds), this router 33 % (one;
    README). Of four, an indexer with learned pooling finds 88 % (three), this router 13 % (one).
    Trained from the start, as here, it is not measured.
    """
    return TrainConfig(
        data=NeedleConfig(
            length=length,
            num_needles=needles,
            after=_BLOCK_MODEL.blocks.block_q - 1 if needles > 1 else 0,
        ),
        model=_BLOCK_MODEL,
        curriculum=CurriculumConfig(
            peak=0.0,
            explore=0.01,
            lengths=tuple(n for n in (32, 128, 512, 2048) if n < length),
            learn_steps=4000,
            ramp_steps=0,
            hold_steps=1500,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        batch_tokens=16 * length,
        eval_sequences=1024,
    )


def block_language_model() -> TrainConfig:
    """A byte-level language model of 20.8 M parameters at context 8192, six block-routed layers.

    Command: `routing-jax train block-lm --workdir runs/block-lm --data.source FOLDER` (long
    documents; the default is Python's own library, which is small for this model).
    Hardware and time: one H100, an estimated 2 minutes: 1,700 steps, 111 MB read.
    Expect: of documentation of the Linux kernel, 2.4 to 2.6 % fewer bits per byte with attention
    everywhere than within 1,024 tokens (three seeds). `reproduce block-routing` measures routers
    behind that: gates with a price stay within 0.5 % of it at a fifth of its cost, this router is
    9.6 % above (one seed; README). Trained from the start, as here, it is not measured.
    """
    # Until the model copies from its context, attention to all of 8,192 tokens is slower to learn
    # than attention to 1,024, by a number of steps that differs from seed to seed.
    return language_model().replace(
        data__length=8192,
        model__layers="block*6",
        model__router=TokenRouterConfig(),  # none: blocks have their own
        # Of text the tokens just before say most: no router should spend its choice on them.
        model__blocks=BlockRouterConfig(kind="learned", fraction=0.25, local=1),
        curriculum=CurriculumConfig(
            peak=0.0,
            explore=0.01,
            lengths=(1024,),
            learn_steps=800,
            ramp_steps=0,
            hold_steps=900,
            threshold=1.0,  # never reached: each length takes its steps
        ),
    )


def layer_routing(*, curriculum: bool = False) -> TrainConfig:
    """Routers for the layers of a published model, which itself stays as it is (Flux Attention).

    Command: `routing-jax train flux --workdir runs/flux --base MODEL --data.source FOLDER`, MODEL
    a folder of safetensors or a GGUF file. For another length than 8192 change data.length and
    batch_tokens. 'flux-curriculum' weighs cost by λ instead of budgets a task.
    Hardware and time: one H200, 2.2 minutes for SmolLM2-135M.
    Expect: with model.sparse.mode triangle 87 % sparse layers, retrieval as good as dense
    attention's and perplexity 0.5 % higher; with mode streaming 77 % sparse layers, one to three
    points less and 3.3 % higher (README). Mode topk is not measured yet.
    """
    config = TrainConfig(
        # A thousand prompts of 8k tokens are a fair sample only of a text much longer than one.
        data=PromptConfig(validation_fraction=0.1),
        model=DecoderConfig(layers="layer", scan=True, remat=True),
        curriculum=CurriculumConfig(
            # Gates that saturate before prompts are told apart never learn to: a bonus on their
            # entropy, to the end, and the released learning rate. At 2e-3 all logits passed 100 in
            # 50 steps, the same for every prompt (a trial of the routers alone).
            peak=0.0,
            explore=0.1,
            explore_fades=False,
            weighs="cost",
            learn_steps=0,
            ramp_steps=0,
            hold_steps=300,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, final_fraction=0.1, warmup_steps=10, beta2=0.95, weight_decay=0.0
        ),
        batch_tokens=12 * 8192,
        eval_sequences=252,
        log_every=10,
        checkpoint_every=100,
    )
    if not curriculum:
        # The default's 0.02 left text a tenth short of its budget after 300 steps of that trial.
        return config.replace(budget__rate=0.05)
    return config.replace(
        budget__rate=0.0,
        curriculum__peak=1.0,
        curriculum__ramp_steps=150,
        curriculum__hold_steps=150,
        curriculum__target=0.4,
    )


def finetuning() -> TrainConfig:
    """A published model, all of it trained on your text in its own tokens; attention stays full.

    Command: `routing-jax train finetune --workdir runs/finetune --start-from MODEL --data.source
    FOLDER`, MODEL a folder of safetensors or a GGUF file. runs/finetune/model is then a folder of
    safetensors, with config and tokenizer; `reproduce flux --base MODEL --finetuned
    runs/finetune/model` measures the routers of MODEL in it.
    Hardware and time: one H100, an estimated 2 minutes for SmolLM2-135M.
    Expect: fewer nats a token of held-out text than MODEL has, which the first line of
    metrics.jsonl tells; with MODEL's routers answers stay within a point of dense attention's
    (README, one seed).
    """
    return TrainConfig(
        data=TokenConfig(length=2048),
        model=DecoderConfig(layers="full", scan=True, remat=True),
        curriculum=CurriculumConfig(
            peak=0.0, explore=0.0, learn_steps=0, ramp_steps=0, hold_steps=400
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, final_fraction=0.1, warmup_steps=20, beta2=0.95, weight_decay=0.0
        ),
        batch_tokens=16 * 2048,
        eval_sequences=256,
        log_every=10,
        checkpoint_every=200,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    **{f"recall-{n}": partial(recall, n) for n in (128, 256, 512, 1024, 2048, 4096, 8192)},
    "recall-128-steep": recall_steep,
    **{f"multi-query-{n}": partial(multi_query, n) for n in (128, 256, 512)},
    "unmarked-128": lambda: unmarked(128),
    "unmarked-128-summary": lambda: unmarked(128, summary=256),
    "mqar-256": lambda: mqar(256),
    "mqar-256-marked": lambda: mqar(256, marked=True),
    "mqar-256-summary": lambda: mqar(256, summary=256),
    "lm": language_model,
    "moas": lambda: mixed_schemes(500),
    "moas-2000": lambda: mixed_schemes(2000),
    **{f"block-mqar-{n}": partial(block_mqar, n) for n in (2048, 4096, 8192)},
    "block-needle-4096": partial(block_needle, 4096),
    "block-multi-needle-4096": partial(block_needle, 4096, needles=4),
    "block-lm": block_language_model,
    "finetune": finetuning,
    "flux": layer_routing,
    "flux-curriculum": lambda: layer_routing(curriculum=True),
}


def get_preset(name: str) -> TrainConfig:
    """The preset's configuration.

    Raises:
      ValueError: no preset of that name.

    >>> get_preset("recall-128").data.length
    128
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; accepted: {', '.join(PRESETS)}.")
    return PRESETS[name]()
