"""Text in, text out, from files: what a model continues, with routers and without."""

import json

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from routing_jax.cli import main
from routing_jax.generate import Engine, Request, ServingConfig, TextModel
from routing_jax.models import init_routers, with_layer_routing
from routing_jax.models.pretrained import load_pretrained, save_routers, stop_tokens
from routing_jax.routers import LayerRouterConfig, SparseModeConfig

from ..models.pretrained.published import BASE, random_tensors, write_folder

pytestmark = pytest.mark.usefixtures("compile_cache")
CONFIG = BASE | {"vocab_size": 256, "max_position_embeddings": 64, "eos_token_id": 7}
PROMPT = "the quick brown fox jumps over the lazy dog"
SPARSE = SparseModeConfig(sink=4, window=4, block_q=4, block_kv=4)


def write_model(folder, seed=0):
    write_folder(folder, CONFIG, random_tensors(CONFIG, seed))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def save(path, logit, folder):
    """Routers of both layers that answer the same to every prompt."""
    config, _ = load_pretrained(folder, dtype="float32", scan=False)
    config = with_layer_routing(config, LayerRouterConfig(pool=3), SPARSE)
    routers = init_routers(config, jax.random.key(0))
    for layer in routers.values():
        layer["block_0"]["mixer"]["router"]["bias"] = jnp.array([0.0, logit])
    save_routers(path, routers, folder, config)


def run(capsys, *args):
    """Exit code, standard output and error of the command."""
    code = main(["generate", *args, "--dtype", "float32"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_text_is_continued_piece_by_piece_until_the_model_ends_it(folder):
    model = TextModel(folder, dtype="float32")
    tokens = model.tokenizer.encode(PROMPT).ids
    serving = ServingConfig(pages=2, sequences=1, length=len(tokens) + 12)
    engine = Engine(*load_pretrained(folder, dtype="float32"), serving)
    engine.add(Request(tokens, 12))
    made = [one.token for one in engine.run()]
    pieces = list(model.stream(PROMPT, 12))
    whole = model.tokenizer.decode(made[: made.index(7)] if 7 in made else made)
    assert len(pieces) > 3
    # What is missing at the end can only be the bytes of an unfinished character.
    assert whole.removesuffix("\ufffd").startswith("".join(pieces))
    assert len(whole) <= len("".join(pieces)) + 1


def test_routers_of_a_file_decide_the_layers(folder, tmp_path):
    made = {}
    for logit in (-1.0, 1.0):
        save(tmp_path / "router", logit, folder)
        model = TextModel(folder, tmp_path / "router", "float32")
        made[logit] = "".join(model.stream(PROMPT, 12))
    dense = "".join(TextModel(folder, dtype="float32").stream(PROMPT, 12))
    assert made[1.0] == dense != made[-1.0]


def test_a_pool_of_few_pages_is_enough_where_routers_leave_layers_sparse(folder, tmp_path, capsys):
    """55 tokens: 14 pages of a dense layer, two of a sparse one."""
    said = {}
    for logit in (-1.0, 1.0):
        router = str(tmp_path / f"router{logit}")
        save(router, logit, folder)
        asked = [str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--router", router]
        said[logit] = run(capsys, *asked), run(capsys, *asked, "--pages", "4")
        assert run(capsys, *asked, "--pages", "3")[0] == 2
    assert said[-1.0][0] == said[-1.0][1]
    assert said[-1.0][0][0] == 0
    code, out, error = said[1.0][1]
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert "take 28 pages, as the layers were decided for it; serving.pages is 4." in error


def test_the_command_prints_what_the_model_says(folder, tmp_path, capsys):
    text = tmp_path / "prompt.txt"
    text.write_text(PROMPT)
    whole = "".join(TextModel(folder, dtype="float32").stream(PROMPT, 12)) + "\n"
    for prompt in (["--prompt", PROMPT], ["--prompt-file", str(text)]):
        assert run(capsys, str(folder), *prompt, "--max-new-tokens", "12") == (0, whole, "")


def test_mistakes_are_one_sentence_and_exit_code_2(folder, tmp_path, capsys):
    other = write_model(tmp_path / "other", seed=1)
    router = str(tmp_path / "router")
    save(router, 1.0, other)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    said = {
        (str(tmp_path / "nowhere"), "--prompt", "a"): "neither a folder with config.json nor",
        (str(folder), "--prompt", "a", "--max-new-tokens", "9", "--router", router): "is another",
        (str(folder), "--prompt", "a" * 60): "60 tokens and 128 new ones are more than this model",
        (str(folder), "--prompt", ""): "the prompt holds no token",
        (str(folder),): "give either --prompt or --prompt-file",
        (str(folder), "--prompt-file", str(tmp_path / "none")): "none can't be used: No such file",
        (str(folder), "--prompt-file", str(tmp_path / "binary")): "binary is not UTF-8 text",
        (str(folder), "--prompt", "a", "--pages", "0"): "pages is 0; it must be at least 1",
        (str(folder), "--prompt", "a", "--top-p", "2"): "top_p is 2.0; it must lie above 0",
    }
    for args, sentence in said.items():
        code, out, error = run(capsys, *args)
        assert (code, out) == (2, "")
        assert sentence in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_what_ends_a_text_stands_in_the_config_or_beside_it(folder, tmp_path):
    assert stop_tokens(folder) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert stop_tokens(tmp_path) == {3, 4}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(ValueError, match="eos_token_id is 'end'; it must hold tokens"):
        stop_tokens(tmp_path)
