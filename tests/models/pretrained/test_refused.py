"""Checkpoints that cannot be loaded: one sentence, before anything is."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file

from routing_jax.models.pretrained import load_pretrained

from .published import LLAMA3_ROPE, MODELS, gguf_name, random_tensors, write_folder, write_gguf

CONFIG = MODELS["llama3"]
TENSORS = random_tensors(CONFIG)
UP = "model.layers.1.mlp.up_proj.weight"


def refusal(path):
    with pytest.raises(ValueError, match=r"\.$") as e:
        load_pretrained(path)
    said = str(e.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) < 400 + len(str(path))
    return said


WRONG_TENSORS = {
    "missing": ({UP: None}, "lacks {up} of the tensors"),
    "many missing": (
        dict.fromkeys([n for n in TENSORS if ".1." in n]),
        "and 6 more of the tensors",
    ),
    "extra": ({"model.layers.2.mlp.up_proj.weight": TENSORS[UP]}, "holds {extra}, which the model"),
    "misshapen": (
        {UP: TENSORS[UP][:32].copy()},
        "holds {up} of shape (32, 32); its configuration asks for (64, 32).",
    ),
}


@pytest.mark.parametrize("write", [write_folder, write_gguf])
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_missing_extra_and_misshapen_tensors_are_named(wrong, write, tmp_path):
    changes, said = WRONG_TENSORS[wrong]
    tensors = {k: v for k, v in (TENSORS | changes).items() if v is not None}
    names = {"up": UP, "extra": "model.layers.2.mlp.up_proj.weight"}
    path = tmp_path / "model.gguf" if write is write_gguf else tmp_path
    write(path, CONFIG, tensors)
    if write is write_gguf:
        names = {k: gguf_name(v) for k, v in names.items()}
    assert said.format(**names) in refusal(path)


CONFIGS = {
    "architecture": (
        {"model_type": "mamba"},
        "model_type is 'mamba'; supported: 'llama', 'mistral', 'qwen2', 'qwen3'",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    "biases": ({"attention_bias": True}, "attention_bias is True; supported: False"),
    "rope": ({"rope_scaling": {"type": "yarn"}}, "type is 'yarn'; supported: 'default', 'linear'"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
    "missing field": ({"hidden_size": None}, "has no 'hidden_size', which a model"),
    "kind of field": ({"hidden_size": "32"}, "hidden_size is '32'; it must be int"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be 1 to 65536"),
    "many layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must"),
}


@pytest.mark.parametrize("wrong", CONFIGS)
def test_a_config_that_is_not_supported_says_what_is(wrong, tmp_path):
    changes, said = CONFIGS[wrong]
    write_folder(tmp_path, {k: v for k, v in (CONFIG | changes).items() if v is not None}, TENSORS)
    assert said in refusal(tmp_path)


def test_what_the_decoder_or_rope_refuse_is_refused(tmp_path):
    for changes, said in (
        ({"num_key_value_heads": 3}, r"^model\.num_kv_heads is 3"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "^Llama 3's RoPE has factor 4"),
    ):
        write_folder(tmp_path, CONFIG | changes, TENSORS)
        with pytest.raises(ValueError, match=said):
            load_pretrained(tmp_path)


GGUFS = {
    "experts": (("add_expert_count", 8), "is a mixture of experts; supported: one MLP a layer"),
    "parts": (("add_uint16", "split.count", 2), "is one of several parts; join them"),
    "rope": (
        ("add_string", "llama.rope.scaling.type", "yarn"),
        "llama.rope.scaling.type is 'yarn'; supported: 'none', 'linear'",
    ),
    "values": (("add_value_length", 4), "value_length is 4; supported: the head dim 8"),
}


@pytest.mark.parametrize("wrong", GGUFS)
def test_a_gguf_that_is_not_supported_says_what_is(wrong, tmp_path):
    extra, said = GGUFS[wrong]
    assert said in refusal(write_gguf(tmp_path / "a.gguf", CONFIG, TENSORS, extra=[extra]))


def test_an_architecture_of_another_kind_says_which_are_supported(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", CONFIG | {"model_type": "mamba"}, TENSORS)
    assert "general.architecture is 'mamba'; supported: llama, qwen2, qwen3." in refusal(path)


def test_numbers_that_are_not_floats_are_refused_by_name(tmp_path):
    write_folder(tmp_path, CONFIG, TENSORS)
    ints = TENSORS | {UP: np.zeros((64, 32), np.int8)}
    save_file(ints, tmp_path / "model.safetensors")
    assert f"stores {UP} as I8; accepted: F64, F32, F16, BF16" in refusal_inside(tmp_path)
    path = tmp_path / "a.gguf"
    extra = ("add_tensor", "blk.9.odd", np.zeros((2, 32), np.int8), None, Kind.I8)
    write_gguf(path, CONFIG, TENSORS, extra=[extra])
    assert "stores blk.9.odd as I8, which the gguf package" in refusal(path)


def refusal_inside(folder):
    """The refusal of a file within the folder, which it names."""
    with pytest.raises(ValueError, match=r"\.$") as e:
        load_pretrained(folder)
    assert str(e.value).startswith(str(folder))
    return str(e.value)


@pytest.mark.parametrize("kept", [0, 3, 8, 100, 2000, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    folder = write_folder(tmp_path, CONFIG, TENSORS)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "model.safetensors is no whole safetensors file: " in refusal(folder)
    path = write_gguf(tmp_path / "a.gguf", CONFIG, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    assert "a.gguf is no whole GGUF file: " in refusal(path)


def test_a_damaged_header_is_refused_or_changes_nothing_that_matters(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", MODELS["smollm2"], random_tensors(MODELS["smollm2"]))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng, said = np.random.default_rng(0), []
    for _ in range(150):
        damaged = whole.copy()
        at = rng.integers(0, 900)  # fields and the first tensors' places
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged.tobytes())
        try:
            load_pretrained(path, scan=False)
        except ValueError as e:
            said.append(str(e))
    assert len(said) > 75
    assert not any("\n" in sentence for sentence in said)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    assert "is neither a folder with config.json nor a GGUF file" in refusal(tmp_path / "none")
    assert "holds no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON: " in refusal_inside(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds a list; it must be a JSON object" in refusal_inside(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "holds neither model.safetensors nor model.safetensors.index" in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json has no 'weight_map'" in refusal_inside(tmp_path)
    for name in ("absent.safetensors", "../model.safetensors"):
        index.write_text(json.dumps({"weight_map": {UP: name}}))
        assert f"names {name!r}, which is no file of its folder" in refusal_inside(tmp_path)


def test_files_that_an_index_does_not_describe_are_refused(tmp_path):
    write_folder(tmp_path, CONFIG, TENSORS, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"more": places[UP]}}))
    assert f"{places[UP]} holds no more, which " in refusal_inside(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    (other,) = set(places.values()) - {places[UP]}
    both = load_file(tmp_path / other) | {UP: TENSORS[UP]}
    save_file(both, tmp_path / other)
    assert f"holds {UP}, which another file of its folder holds too" in refusal_inside(tmp_path)
