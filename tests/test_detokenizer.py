"""Text token by token: equal to decoding at once, whole characters only, no stop string leaks."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nbengine.detokenizer import IncrementalDetokenizer
from nbengine.tokenizer import Tokenizer
from tests.smollm2 import smollm2_tokenizer

SMOLLM2 = smollm2_tokenizer()


def sentence_piece_tokenizer(*, strip):
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "b", "c", "é", "▁▁", "<0xZZ>", "日"]
    vocab = {token: i for i, token in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_tokens([AddedToken(token, special=True) for token in words[:3]])
    return Tokenizer(backend)


def word_piece_tokenizer():
    words = ["[UNK]", "[SEP]", "play", "##ing", "##ed", "é", "now", "."]
    backend = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_tokens([AddedToken("[SEP]", special=True)])
    return Tokenizer(backend)


SENTENCE_PIECE = sentence_piece_tokenizer(strip=True)
TOKENIZERS = {
    "byte-level": SMOLLM2,
    "sentence-piece": SENTENCE_PIECE,
    "sentence-piece that keeps the first space": sentence_piece_tokenizer(strip=False),
    "word-piece": word_piece_tokenizer(),
}

UNICODE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("👩\u200d🚀🏽é日 \n\t\ufffd1aA<|>"),
    ),
    max_size=60,
)


def run(tokenizer, token_ids, **options):
    """Text, deltas and the stop string of an output; every promise about showing is checked."""
    text = IncrementalDetokenizer(tokenizer, **options)
    deltas, shown = [], ""
    for token_id in token_ids:
        found = text.append(token_id)
        deltas.append(text.take_delta())
        assert text.text.startswith(shown)
        shown = text.text
        if found is not None:
            break
    text.finish()
    deltas.append(text.take_delta())
    assert "".join(deltas) == text.text and text.text.startswith(shown)
    return text.text, deltas, text.stop_string


@settings(max_examples=300, deadline=None)
@given(UNICODE, st.booleans())
def test_any_text_comes_out_as_it_went_in(text, skip):
    token_ids = SMOLLM2.encode(text, add_special_tokens=False)
    shown, deltas, _ = run(SMOLLM2, token_ids, skip_special_tokens=skip)
    assert shown == SMOLLM2.decode(token_ids, skip_special_tokens=skip)
    if "\ufffd" not in shown:  # this vocabulary lacks a few bytes of rare planes
        assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(st.data(), st.booleans())
def test_any_token_ids_give_the_text_of_decoding_them_at_once(name, data, skip):
    tokenizer = TOKENIZERS[name]
    # Ids beyond the vocabulary too: logits may be wider than the tokenizer.
    token_id = st.integers(0, tokenizer.vocab_size + 3)
    if name == "byte-level":
        token_id = st.one_of(token_id, st.integers(0, 300))  # special tokens and single bytes
    token_ids = data.draw(st.lists(token_id, max_size=40))
    shown, _, _ = run(tokenizer, token_ids, skip_special_tokens=skip)
    assert shown == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_appears_with_its_last_byte():
    token_ids = SMOLLM2.encode("👩‍🚀")
    assert len(token_ids) > 4
    _, deltas, _ = run(SMOLLM2, token_ids)
    assert [delta for delta in deltas if delta] == ["👩", "\u200d", "🚀"]
    assert deltas[0] == ""


def test_an_output_cut_inside_a_character_ends_with_the_replacement_character():
    token_ids = SMOLLM2.encode("ok 🚀")[:-1]
    text, deltas, _ = run(SMOLLM2, token_ids)
    assert text == SMOLLM2.decode(token_ids) == "ok \ufffd"
    assert deltas[-1] == "\ufffd"


def byte_ids(data):
    return [SENTENCE_PIECE.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_byte_fallback_tokens_form_one_character():
    ids = [4, *byte_ids("🚀".encode()), 7]
    text, deltas, _ = run(SENTENCE_PIECE, ids)
    assert text == "a🚀c"
    assert deltas == ["a", "", "", "", "", "🚀c", ""]


def test_a_run_of_bytes_that_is_no_text_is_one_replacement_character_a_byte():
    ids = [*byte_ids("é".encode()), *byte_ids(b"\xff"), 7]
    assert run(SENTENCE_PIECE, ids)[0] == SENTENCE_PIECE.decode(ids) == "\ufffd\ufffd\ufffdc"


def test_special_tokens_are_skipped_or_shown():
    ids = SMOLLM2.encode("a<|im_end|>b")
    assert run(SMOLLM2, ids)[0] == "ab"
    assert run(SMOLLM2, ids, skip_special_tokens=False)[0] == "a<|im_end|>b"


def test_added_tokens_with_characters_beyond_the_byte_alphabet_are_shown_as_they_are():
    backend = tokenizers.Tokenizer.from_str(SMOLLM2.backend.to_str())
    backend.add_tokens(["<tool 日>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a<tool 日>b")
    assert len(ids) == 3
    assert run(tokenizer, ids)[0] == tokenizer.decode(ids) == "a<tool 日>b"


# Stop strings.


def test_a_stop_string_cut_in_the_middle_of_a_token_ends_the_text_before_it():
    ids = SMOLLM2.encode("The answer is forty-two and more")
    text, _, stop = run(SMOLLM2, ids, stop=["swer is fo"])
    assert (text, stop) == ("The an", "swer is fo")
    text, _, stop = run(SMOLLM2, ids, stop="swer is fo", include_stop_str_in_output=True)
    assert text == "The answer is fo"


def test_append_names_the_stop_string_at_the_token_that_completes_it():
    text = IncrementalDetokenizer(SMOLLM2, stop=["\n\nUser:"])
    found = [text.append(i) for i in SMOLLM2.encode("Hi there.\n\nUser: what")]
    first = next(i for i, hit in enumerate(found) if hit)
    assert SMOLLM2.decode(SMOLLM2.encode("Hi there.\n\nUser: what")[: first + 1]).endswith("User:")
    assert set(found[first:]) == {"\n\nUser:"}  # later tokens change nothing
    assert text.text == "Hi there." and text.finish() == "\n\nUser:"


def test_what_may_become_a_stop_string_is_held_back_until_it_can_not():
    text = IncrementalDetokenizer(SMOLLM2, stop=["END!"])
    shown = []
    for token_id in [SMOLLM2.encode(char)[0] for char in "xENENDEND"]:
        text.append(token_id)
        shown.append(text.take_delta())
    assert shown == ["x", "", "", "EN", "", "", "END", "", ""]
    text.finish()
    assert text.take_delta() == "END" and text.text == "xENENDEND"


def test_of_stop_strings_that_end_together_the_longest_is_cut():
    ids = SMOLLM2.encode("one two three")
    assert run(SMOLLM2, ids, stop=["two", "e two", "o"]) == ("", ["", ""], "o")
    assert run(SMOLLM2, ids, stop=["wo", "e two"])[0] == "on"


def test_stop_strings_before_min_tokens_are_text():
    ids = [SMOLLM2.encode(char)[0] for char in "a.b.c"]
    assert run(SMOLLM2, ids, stop=["."])[0] == "a"
    assert run(SMOLLM2, ids, stop=["."], min_tokens=2)[0] == "a"
    assert run(SMOLLM2, ids, stop=["."], min_tokens=3)[0] == "a.b"
    assert run(SMOLLM2, ids, stop=["."], min_tokens=5)[0] == "a.b.c"


def test_a_stop_string_that_begins_before_min_tokens_counts_when_it_ends_after():
    ids = [SMOLLM2.encode(char)[0] for char in "abcd"]
    assert run(SMOLLM2, ids, stop=["bc"], min_tokens=3)[0] == "a"


def test_a_stop_string_may_overlap_one_that_came_before_min_tokens():
    ids = [SMOLLM2.encode("a")[0]] * 4
    assert run(SMOLLM2, ids, stop=["aa"], min_tokens=3) == ("a", ["", "a", "", ""], "aa")


def test_skipped_special_tokens_hide_no_stop_string():
    ids = SMOLLM2.encode("ST<|im_start|>OP now")
    assert run(SMOLLM2, ids, stop=["STOP"]) == ("", ["", "", "", ""], "STOP")


def test_a_stop_string_made_by_the_last_unfinished_character_counts():
    ids = SMOLLM2.encode("ok 🚀")[:-1]
    assert run(SMOLLM2, ids, stop=["\ufffd"])[::2] == ("ok ", "\ufffd")


@settings(max_examples=400, deadline=None)
@given(
    st.text("ab\n日🚀", max_size=40),
    st.lists(st.text("ab\n日🚀", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_never_leak_and_cost_nothing_else(text, stops, include):
    ids = SMOLLM2.encode(text)
    shown, deltas, stop = run(SMOLLM2, ids, stop=stops, include_stop_str_in_output=include)
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        assert (shown, stop) == (text, None)
        return
    end, _, first = min(ends)
    assert stop == first
    assert shown == text[: end if include else end - len(first)]
    so_far = ""
    for delta in deltas:
        so_far += delta
        assert include or not any(s in so_far for s in stops)


def test_the_state_is_a_function_of_the_tokens():
    ids = SMOLLM2.encode("Stories end 🚀. Then the end.")
    first = IncrementalDetokenizer(SMOLLM2, stop=["the end"])
    for place, token_id in enumerate(ids):
        again = IncrementalDetokenizer(SMOLLM2, stop=["the end"])
        for kept in ids[: place + 1]:
            hit = again.append(kept)
        assert (first.append(token_id), first.text) == (hit, again.text)


def test_a_long_output_decodes_few_tokens_at_a_time():
    decoded = 0

    class Counting(Tokenizer):
        def decode(self, token_ids, **options):
            nonlocal decoded
            decoded += len(token_ids)
            return super().decode(token_ids, **options)

    tokenizer = Counting(TOKENIZERS["word-piece"].backend)
    text = IncrementalDetokenizer(tokenizer)
    for token_id in [2, 3, 6] * 300:
        text.append(token_id)
    assert text.text == " ".join(["playing now"] * 300)
    assert decoded < 10 * 900
