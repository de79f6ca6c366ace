"""Tokenizers from each kind of file: known ids, the same ids, and refusals that say what to do."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import tokenizers
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from nbengine.errors import InvalidRequest, ModelNotFound, UnsupportedModel, WeightsError
from nbengine.tokenizer import Tokenizer, load_tokenizer
from tests.smollm2 import smollm2_path, smollm2_tokenizer

SMOLLM2 = smollm2_tokenizer()
IM_START, IM_END = 1, 2


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("Hello world", [19556, 905]),
        ("", []),
        # Every digit is a token of its own, and the spaces before it are not drawn to it.
        ("12345", [33, 34, 35, 36, 37]),
        ("a  1 b", [81, 256, 33, 278]),
        ("<|im_start|>user", [IM_START, 4093]),
        ("👩‍🚀", SMOLLM2.encode("👩") + SMOLLM2.encode("\u200d") + SMOLLM2.encode("🚀")),
    ],
)
def test_smollm2_encodes_as_it_was_trained(text, token_ids):
    assert SMOLLM2.encode(text) == token_ids


def test_smollm2_knows_its_special_tokens():
    assert SMOLLM2.eos_token_ids == {IM_END}
    assert SMOLLM2.vocab_size == 49152
    assert SMOLLM2.special_token_ids == set(range(17))
    assert SMOLLM2.special_tokens["bos_token"] == "<|im_start|>"


def test_special_tokens_are_left_out_of_the_text_unless_asked_for():
    ids = SMOLLM2.encode("<|im_start|>user\nHi<|im_end|>")
    assert SMOLLM2.decode(ids) == "user\nHi"
    assert SMOLLM2.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=["Cs", "Cc"])))
def test_decoding_what_was_encoded_gives_the_text(text):
    assert SMOLLM2.decode(SMOLLM2.encode(text), skip_special_tokens=False) == text


def test_ids_without_a_token_decode_to_nothing():
    assert SMOLLM2.decode([19556, 60_000, 905]) == "Hello world"


@pytest.mark.parametrize("text", [None, 5, b"x", ["x"], "bad \ud800"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(InvalidRequest):
        SMOLLM2.encode(text)


def test_bad_words_are_banned_alone_and_after_a_space():
    alone, after_a_space = SMOLLM2.bad_words_token_ids(["hello"])
    assert SMOLLM2.decode(alone) == "hello" and SMOLLM2.decode(after_a_space) == " hello"
    sequences = SMOLLM2.bad_words_token_ids(["New York", "a b"])
    assert {SMOLLM2.decode(s) for s in sequences} == {"New York", " New York", "a b", " a b"}
    assert SMOLLM2.bad_words_token_ids([]) == ()


def test_the_chat_template_of_the_file_is_applied():
    assert SMOLLM2.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_model_without_chat_template_says_so():
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_template_for_tools_is_used_when_there_are_tools():
    templates = {"default": "plain {{ eos_token }}", "tool_use": "tools {{ tools | length }}"}
    tokenizer = Tokenizer(
        SMOLLM2.backend, special_tokens={"eos_token": "!"}, chat_template=templates
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == "plain !"
    assert tokenizer.apply_chat_template(messages, tools=[{}]) == "tools 1"


# Hugging Face directories.


@pytest.fixture
def directory(tmp_path):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=SMOLLM2.backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    fast.save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_gives_the_same_ids_and_its_own_template(directory):
    loaded = load_tokenizer(directory)
    text = "def f(x):\n    return x ** 2  # naïve <|im_end|> 日本"
    assert loaded.encode(text) == SMOLLM2.encode(text)
    assert loaded.eos_token_ids == {IM_END}
    assert loaded.special_token_ids == SMOLLM2.special_token_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.apply_chat_template(messages) == "<|im_start|>Hi"


def test_generation_config_adds_tokens_that_end_a_turn(directory):
    config = directory / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_tokenizer(directory).eos_token_ids == {0, 2}
    config.write_text(json.dumps({"eos_token_id": 0}))
    assert load_tokenizer(directory).eos_token_ids == {0, 2}


def test_a_tokenizer_json_is_read_with_and_without_its_directory(directory):
    text = "Hello 42 worlds"
    file = directory / "tokenizer.json"
    assert load_tokenizer(file).eos_token_ids == {IM_END}
    (directory / "tokenizer_config.json").unlink()
    alone = load_tokenizer(file)
    assert alone.encode(text) == SMOLLM2.encode(text) and not alone.eos_token_ids


def test_a_given_tokenizer_replaces_the_models_own(directory):
    assert load_tokenizer(smollm2_path(), tokenizer=directory).special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModel):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel):
        load_tokenizer(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(WeightsError):
        load_tokenizer(tmp_path / "x.json")


# GGUF files, made here.


def gguf(path, tokens, *, kind="gpt2", types=None, **keys):
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [TokenType.NORMAL] * len(tokens))
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LETTERS = [*"abcdefghij0123456789ĠĊ'!", "12", "123", "Ġa", "ab", "<|end|>", "<tool>"]


def letters(path, **keys):
    types = [TokenType.NORMAL] * (len(LETTERS) - 2) + [TokenType.CONTROL, TokenType.USER_DEFINED]
    keys = {"tokenizer_pre": "smollm", "token_merges": ["1 2", "12 3", "Ġ a", "a b"], **keys}
    return gguf(path, LETTERS, types=types, **keys)


def tokens_of(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "a 1234", ["a", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", "a1234 ab a", ["a", "123", "4", "Ġ", "ab", "Ġa"]),
        ("qwen2", "a1234 ab", ["a", "1", "2", "3", "4", "Ġa", "b"]),
        ("tekken", "a12 ab a", ["a", "1", "2", "Ġ", "ab", "Ġa"]),
        ("gpt-2", "a1234", ["a", "123", "4"]),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(tmp_path, pre, text, tokens):
    # Llama 3 and Tekken take a word that is a token as it is, here " a", without a merge for it.
    merges = {"token_merges": ["1 2", "12 3", "a b"]} if pre in ("llama-bpe", "tekken") else {}
    tokenizer = load_tokenizer(letters(tmp_path / "x.gguf", tokenizer_pre=pre, **merges))
    assert tokens_of(tokenizer, text) == tokens


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path):
    tokenizer = load_tokenizer(letters(tmp_path / "x.gguf"))
    ids = tokenizer.encode("a<tool><|end|>b")
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<tool><|end|>b"


def test_every_end_token_of_the_file_ends_an_answer_and_bos_is_added_if_asked(tmp_path):
    file = letters(
        tmp_path / "x.gguf",
        eos_token_id=1,
        eot_token_id=2,
        bos_token_id=LETTERS.index("<|end|>"),
        add_bos_token=True,
    )
    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_token_ids == {1, 2}
    assert tokens_of(tokenizer, "ab") == ["<|end|>", "ab"]
    assert tokenizer.encode("ab", add_special_tokens=False) == [LETTERS.index("ab")]


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"tokenizer_pre": "klingon"}, UnsupportedModel, "'klingon'.*tokenizer="),
        ({"eos_token_id": 999}, WeightsError, "999"),
        ({"token_merges": ["ab"]}, WeightsError, "'ab'"),
    ],
)
def test_a_gguf_that_can_not_be_read_says_why(tmp_path, keys, error, words):
    with pytest.raises(error, match=words):
        load_tokenizer(letters(tmp_path / "x.gguf", **keys))


def test_a_gguf_of_another_kind_says_what_to_do(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"'bert'.*tokenizer="):
        load_tokenizer(gguf(tmp_path / "x.gguf", ["a"], kind="bert"))


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
WORDS = [*"▁abc", "▁a", "ab", "bc", "ca", "▁ab", "abc", "▁abc", "cab", "bca", "▁b"]


def sentence_piece(path, order):
    words = [WORDS[i] for i in order]
    scores = [0.0] * len(PIECES) + [-float(i) for i in range(len(words))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(words)
    writer_keys = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return gguf(
        path, PIECES + words, kind="llama", types=types, token_scores=scores, **writer_keys
    ), dict(zip(words, scores[len(PIECES) :], strict=True))


def joined_by_score(text, score):
    """SentencePiece's algorithm as it is described: join the best-scored neighbours, repeat."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [
            (-score[left + right], at)
            for at, (left, right) in enumerate(pairwise(pieces))
            if left + right in score
        ]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(len(WORDS))), st.lists(st.text("abc ", max_size=12), max_size=10))
def test_sentence_piece_joins_by_score(tmp_path_factory, order, texts):
    file, score = sentence_piece(tmp_path_factory.mktemp("gguf") / "x.gguf", order)
    tokenizer = load_tokenizer(file)
    for text in filter(None, texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert [tokenizer.backend.id_to_token(i) for i in ids] == joined_by_score(text, score)
        assert tokenizer.decode(ids) == text


def test_sentence_piece_falls_back_to_bytes_and_adds_bos(tmp_path):
    file, _ = sentence_piece(tmp_path / "x.gguf", range(len(WORDS)))
    tokenizer = load_tokenizer(file)
    assert tokens_of(tokenizer, "aé") == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"
    assert tokenizer.eos_token_ids == {2}
