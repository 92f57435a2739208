"""Models written as folders: the published tensors under their published names."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from routing_jax.models.pretrained import (
    load_pretrained,
    load_tokenizer,
    open_checkpoint,
    save_pretrained,
    stop_tokens,
)

from .published import MODELS, random_tensors, write_folder, write_gguf

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = [
    ("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", "gpt-2"), ("add_eos_token_id", 5),
    ("add_token_list", [*ALPHABET, "ab"]), ("add_token_types", [1] * 257),
    ("add_token_merges", ["a b"]),
]  # fmt: skip


def write(folder, kind, file, **changes):
    """A checkpoint of either kind with a tokenizer of bytes, and its tensors."""
    config = MODELS[kind] | changes
    tensors = random_tensors(config)
    if file:
        return write_gguf(folder / "model.gguf", config, tensors, extra=TOKENIZER), tensors
    base = write_folder(folder / "base", config | {"eos_token_id": 5}, tensors)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(base / "tokenizer.json"))
    return base, tensors


@pytest.mark.parametrize(
    ("kind", "file"),
    [(kind, file) for kind in MODELS for file in (False, True) if (kind, file) != ("llama3", True)],
)
def test_a_folder_holds_the_model_that_was_written(tmp_path, kind, file):
    base, tensors = write(tmp_path, kind, file)
    model = load_pretrained(base, dtype="float32", scan=kind != "qwen3")
    new = tmp_path / "runs" / "model"
    save_pretrained(new, model.params, model.config, base)
    made = load_file(new / "model.safetensors")
    assert set(made) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(made[name], tensor, err_msg=name)
    assert open_checkpoint(new).config == open_checkpoint(base).config
    assert stop_tokens(new) == {5}
    said = "Où 17?"
    assert load_tokenizer(new).encode(said).ids == load_tokenizer(base).encode(said).ids


def test_what_other_programs_read_is_kept(tmp_path):
    base, _ = write(tmp_path, "llama3", False)
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    model = load_pretrained(base, dtype="bfloat16")
    save_pretrained(tmp_path / "new", model.params, model.config, base)
    assert stop_tokens(tmp_path / "new") == {7}
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "new")
    )
    assert after == before | {"torch_dtype": "float32"}


def test_a_rope_that_no_config_tells_is_refused_before_anything_is_written(tmp_path):
    base, _ = write(tmp_path, "llama3", True)
    model = load_pretrained(base)
    with pytest.raises(ValueError, match=r"model.gguf slows each pair of RoPE by a factor of its"):
        save_pretrained(tmp_path / "new", model.params, model.config, base)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layers", ["layer*2", "full*3"])
def test_layers_that_no_such_folder_holds_are_refused(tmp_path, layers):
    base, _ = write(tmp_path, "llama3", False)
    model = load_pretrained(base)
    said = re.escape(f"model.layers is '{layers}'; a folder like {base} holds 'full*2'.")
    with pytest.raises(ValueError, match=said):
        save_pretrained(tmp_path / "new", model.params, model.config.replace(layers=layers), base)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_folder_of_a_model_in_several_files_is_refused_and_left_as_it_is(tmp_path, elsewhere):
    base, tensors = write(tmp_path, "llama3", False)
    sharded = write_folder(tmp_path / "sharded", MODELS["llama3"], tensors, shards=3)
    shutil.copy(base / "tokenizer.json", sharded)
    model = load_pretrained(base)
    held = {path.name: path.read_bytes() for path in sharded.iterdir()}
    said = re.escape(f"{sharded} holds model.safetensors.index.json, of a model in several files")
    with pytest.raises(ValueError, match=said):
        save_pretrained(sharded, model.params, model.config, base if elsewhere else sharded)
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == held


def test_nothing_is_left_of_a_model_that_is_replaced(tmp_path):
    base, _ = write(tmp_path, "llama3", False)
    model, new = load_pretrained(base), tmp_path / "new"
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    save_pretrained(new, model.params, model.config, base)
    (base / "generation_config.json").unlink()
    save_pretrained(new, model.params, model.config, base)
    assert stop_tokens(new) == stop_tokens(base) == {5}
