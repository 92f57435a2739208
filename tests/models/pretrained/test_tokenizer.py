"""Tokenizers from either format give the tokens that the one they were written from gave."""

import json

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from routing_jax.models.pretrained import load_tokenizer

TEXT = "In 1987 the cat's café sold 12345 cups — \n\n  didn't it?\t  日本語 HELLO it'S we'LL\r\n x"


@pytest.fixture(scope="module")
def original():
    """A byte-level BPE as SmolLM2's is made, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def vocabulary(tokenizer):
    """(tokens by id, merges) of a BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def write(path, tokenizer, cut="smollm", model="gpt2", bos=None, **changed):
    tokens, merges = vocabulary(tokenizer)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(changed.get("tokens", tokens))
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(changed.get("merges", merges))
    if bos is not None:
        writer.add_bos_token_id(bos)
        writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def both(original, tmp_path_factory):
    """The tokenizer read back from a GGUF file and from a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    original.save(str(folder / "tokenizer.json"))
    return load_tokenizer(write(folder / "a.gguf", original)), load_tokenizer(folder)


@given(st.one_of(st.text(max_size=60), st.text("aest's 1729\n<|end>", max_size=60)))
def test_any_text_has_the_original_s_tokens_and_comes_back(original, both, text):
    for tokenizer in both:
        ids = tokenizer.encode(text).ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_control_token_is_one_token_and_left_out_of_what_is_read(both):
    for tokenizer in both:
        ids = tokenizer.encode("it<|end|>it").ids
        assert ids.count(0) == 1
        assert tokenizer.decode(ids) == "itit"


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("gpt-2", ["In", " 1987", " it", "'", "S", " x", "\n\n", " y", " ", " z"]),
        (
            "smollm",
            ["In", *" 1987", " it", "'", "S", " x", "\n\n", " y", " ", " z"],
        ),
        ("llama-bpe", ["In", " ", "198", "7", " it", "'S", " x", "\n\n", " y", " ", " z"]),
        ("qwen2", ["In", *" 1987", " it", "'S", " x", "\n\n", " y", " ", " z"]),
    ],
)
def test_text_is_cut_into_the_published_words(cut, words, original, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", original, cut, bos=0))
    text = "".join(words)
    cuts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cuts] == words


def test_a_text_begins_as_the_file_says(original, tmp_path):
    plain = load_tokenizer(write(tmp_path / "a.gguf", original)).encode("it").ids
    begun = load_tokenizer(write(tmp_path / "b.gguf", original, bos=1))
    assert begun.encode("it").ids == [1, *plain]
    assert begun.encode("it", add_special_tokens=False).ids == plain


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"model": "llama"},
            "model 'llama' and pre 'smollm'; supported: model 'gpt2'",
        ),
        ({"cut": "tekken"}, "and pre 'tekken'; supported: model 'gpt2' with pre gpt-2, smollm,"),
        ({"merges": ["no such"]}, "holds no usable tokenizer: "),
        ({"bos": 1000}, "begins texts with token 1000 of 308"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(changed, said, original, tmp_path):
    path = write(tmp_path / "a.gguf", original, **changed)
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as e:
        load_tokenizer(path)
    assert said in str(e.value)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a folder with tokenizer\.json nor a GGUF"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: [^\n]*\.$"):
        load_tokenizer(tmp_path)
