"""Text from tokens, for every kind of decoder: as transformers gives it; at random, as the tokenizers library does."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tokenizers
from support.running import GOLDEN
from tokenizers import AddedToken, Regex, decoders, models

from fastgpt2.engine.text.auto_tokenizer import LoadedTokenizer
from fastgpt2.engine.text.decoders import AllTokens, bytes_of, clean_up
from fastgpt2.engine.text.detokenizer import ByteDetokenizer, StagedDetokenizer
from fastgpt2.engine.text.tokenizer import ANY_LENGTH, Tokenizer
from fastgpt2.errors import BadRequest, TokenizerError

KINDS: list[dict[str, Any]] = json.loads((GOLDEN / "decoding.json").read_text("utf-8"))
by_kind = pytest.mark.parametrize("entry", KINDS, ids=lambda entry: entry["kind"])


def of_entry(entry: dict[str, Any]) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(entry["tokenizer"]))
    return Tokenizer(LoadedTokenizer(backend, clean_up=entry["clean_up"]))


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def beyond(prompt: str, whole: str) -> str:
    """Return what a text has that its prompt's text has not, from where the two differ."""
    return whole[next((n for n in range(len(prompt)) if prompt[n] != whole[n : n + 1]), len(prompt)) :]


# ---------------------------------------------------------------------------------------- as transformers


@by_kind
def test_decodes_as_transformers_does(entry: dict[str, Any]) -> None:
    tokenizer = of_entry(entry)
    for case in entry["cases"]:
        assert tokenizer.decode(case["prompt"]) == case["of_prompt"]
        assert tokenizer.decode(case["prompt"] + case["new"]) == case["of_all"]


@by_kind
def test_the_pieces_are_the_text_beyond_the_prompt_s(entry: dict[str, Any]) -> None:
    tokenizer = of_entry(entry)
    for case in entry["cases"]:
        whole = case["of_all"]
        assert "".join(pieces_of(tokenizer, case["new"], case["prompt"])) == beyond(case["of_prompt"], whole)
        # With an echo of the prompt's ids, all is given.
        assert "".join(pieces_of(tokenizer, case["prompt"] + case["new"], [])) == whole


def test_only_one_kind_waits_for_the_end() -> None:
    """All the others give most of a text before its last token."""
    for entry in KINDS:
        tokenizer = of_entry(entry)
        *pieces, left = pieces_of(tokenizer, entry["cases"][0]["prompt"] + entry["cases"][0]["new"], [])
        waits = entry["kind"] == "WordLevel with a regular expression over all"
        assert len(left) > 9 if waits else len("".join(pieces)) > 9


# ------------------------------------------------------------------------------- as the library, at random

TOKENS = [
    *(
        "▁",
        "▁the",
        "▁.",
        "▁n't",
        "a",
        "b",
        "##b",
        "##",
        "##ing",
        "</w>",
        "x</w>",
        "y</w>z</w>",
        " ",
        "  ",
        " a",
        "a ",
        "  b ",
    ),
    *(
        ".",
        ",",
        "?",
        "!",
        "'",
        " '",
        "' ",
        "n't",
        "n't ",
        "'m",
        "'s",
        "'ve",
        "'re",
        "do",
        " do not",
        "|",
        "||",
        "<pad>",
    ),
    *("é", "日", "😀", "\ufffd", "Ġ", "Ġa", "Ã", "©", "ðŁĺĢ", "ð", "Ł", "ĺ", "Ģ", "<unk>", "\n", "x y"),
    *("<0xG1>", "<0x0a>", "<0x0A>", "<0x+F>", "<0x 1>", "<0x20>", "<0x41>", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>"),
    *("<0x98>", "<0x80>", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0xE0>", "<0xED>", "<0xA0>"),
]
SPACE, FUSE, BYTES, LEFT = (
    decoders.Replace("▁", " "),
    decoders.Fuse(),
    decoders.ByteFallback(),
    decoders.Strip(" ", 1, 0),
)
DECODERS: dict[str, Any] = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "WordPiece without its clean-up": decoders.WordPiece(cleanup=False),
    "Metaspace": decoders.Metaspace(),
    "Metaspace, never before": decoders.Metaspace(prepend_scheme="never"),
    "BPEDecoder": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "CTC without its clean-up": decoders.CTC(cleanup=False),
    "ByteLevel": decoders.ByteLevel(),
    "ByteLevel, fused": decoders.Sequence([decoders.ByteLevel(), FUSE]),
    "ByteFallback": BYTES,
    "Fuse": FUSE,
    "nothing": decoders.Sequence([]),
    "Llama": decoders.Sequence([SPACE, BYTES, FUSE, LEFT]),
    "Llama, nested": decoders.Sequence([decoders.Sequence([SPACE, BYTES]), decoders.Sequence([FUSE, LEFT])]),
    "Gemma": decoders.Sequence([SPACE, BYTES, FUSE]),
    "Strip three": decoders.Sequence([SPACE, FUSE, decoders.Strip(" ", 3, 0)]),
    "Strip each token": decoders.Sequence([LEFT, decoders.Metaspace(), FUSE]),
    "Replace in the text": decoders.Sequence([FUSE, decoders.Replace("a ", "Q"), SPACE, decoders.Replace("  ", " ")]),
    "Replace by a pattern": decoders.Sequence([decoders.Replace(Regex("[ab]+"), "Q"), FUSE]),
    "Replace by a pattern in the text": decoders.Sequence([FUSE, decoders.Replace(Regex("[ab]+"), "Q")]),
    "bytes before spaces": decoders.Sequence([BYTES, decoders.Metaspace()]),
    "spaces before bytes": decoders.Sequence([decoders.Metaspace(), BYTES]),
    "ByteLevel within": decoders.Sequence([decoders.Replace("▁", "Ġ"), decoders.ByteLevel(), LEFT]),
    "BPEDecoder and more": decoders.Sequence([decoders.BPEDecoder(), FUSE, decoders.Strip("x", 1, 0)]),
    "BPEDecoder within": decoders.Sequence([decoders.BPEDecoder(), decoders.Metaspace()]),
    "CTC within": decoders.Sequence([decoders.CTC(), decoders.Metaspace()]),
    "WordPiece within": decoders.Sequence([decoders.WordPiece(), decoders.Metaspace()]),
}
# The steps of these are not taken apart; their texts come at their ends.
WHOLE = {"Replace by a pattern in the text", "BPEDecoder within", "CTC within"}


def library(decoder: Any) -> tokenizers.Tokenizer:
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens(["café", "日 本"])
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def random_ids(dice: random.Random, size: int) -> list[int]:
    few = [dice.randrange(size + 2) for _ in range(dice.choice((3, 8, 60)))]
    return [dice.choice(few) for _ in range(dice.choice((0, 1, 2, 5, 12, 40)))]


def check(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, cleaned: bool, ids: list[int], at: int) -> None:
    """Compare one sequence, cut after `at` ids, with what the library decodes."""
    whole, prompt = (backend.decode(some, skip_special_tokens=True) for some in (ids, ids[:at]))
    if cleaned:
        whole, prompt = clean_up(whole), clean_up(prompt)
    assert tokenizer.decode(ids) == whole
    detokenizer, text = tokenizer.detokenizer(), ""
    for token_id in ids:
        assert detokenizer.begin(token_id) >= 0
        text += detokenizer.push(token_id)
        # What has been given stays, half a character too.
        assert whole.startswith(text)
    assert text + detokenizer.flush() == whole
    assert "".join(pieces_of(tokenizer, ids[at:], ids[:at])) == beyond(prompt, whole)


@pytest.mark.thorough
@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_any_tokens_as_the_library_decodes_them(name: str, cleaned: bool) -> None:
    dice = random.Random(f"{name} {cleaned}")
    backend = library(DECODERS[name])
    tokenizer = Tokenizer(LoadedTokenizer(backend, clean_up=cleaned))
    assert any(isinstance(stage, AllTokens) for stage in tokenizer._stages) == (name in WHOLE)
    for _ in range(100):
        ids = random_ids(dice, backend.get_vocab_size())
        check(tokenizer, backend, cleaned, ids, dice.randint(0, len(ids)))


def test_the_decoder_decides_which_detokenizer_there_is() -> None:
    for name, decoder in DECODERS.items():
        byte_level = Tokenizer(LoadedTokenizer(library(decoder))).detokenizer()
        assert isinstance(byte_level, ByteDetokenizer) == (name in ("ByteLevel", "ByteLevel, fused"))
    # What is cleaned up is more than bytes.
    cleaned = Tokenizer(LoadedTokenizer(library(decoders.ByteLevel()), clean_up=True)).detokenizer()
    assert isinstance(cleaned, StagedDetokenizer)


# -------------------------------------------------------------------------------------------- held back


def made(decoder: Any, cleaned: bool = False) -> tuple[Tokenizer, dict[str, int]]:
    backend = library(decoder)
    return Tokenizer(LoadedTokenizer(backend, clean_up=cleaned)), backend.get_vocab(with_added_tokens=True)


def pushed(decoder: Any, tokens: list[str], cleaned: bool = False, prompt: tuple[str, ...] = ()) -> list[str]:
    tokenizer, ids = made(decoder, cleaned)
    return pieces_of(tokenizer, [ids[token] for token in tokens], [ids[token] for token in prompt])


def test_a_row_of_bytes_comes_when_it_ends() -> None:
    euro = ["<0xE2>", "<0x82>", "<0xAC>"]
    assert pushed(DECODERS["Llama"], ["a", *euro, "b"]) == ["a", "", "", "", "€b", ""]
    assert pushed(DECODERS["Llama"], euro) == ["", "", "", "€"]
    # A special token is none of the text, and ends no row.
    assert pushed(DECODERS["Llama"], ["<0xE2>", "<s>", "<0x82>", "<0xAC>", "b"])[-2:] == ["€b", ""]
    # One byte too many makes all of them no text, which is sure from there on.
    assert pushed(DECODERS["Llama"], [*euro, "<0xAC>", "<0xAC>"]) == ["", "", "", "\ufffd" * 4, "\ufffd", ""]
    assert pushed(DECODERS["Llama"], ["<0xE2>", "b"]) == ["", "\ufffdb", ""]


def test_bytes_as_sentencepiece_itself_decodes_them() -> None:
    """Derived by hand from `SentencePieceProcessor::Decode`: each byte that is part of no character is U+FFFD."""
    backend, ids = made(DECODERS["Llama"])[0]._backend, made(DECODERS["Llama"])[1]
    tokenizer = Tokenizer(LoadedTokenizer(backend, bytes_alone=True))
    row = [ids[token] for token in ("a", "<0xE2>", "<0x82>", "<0xAC>", "<0xAC>", "<0x0A>", "<0xE2>", "<0x82>", "b")]
    pieces = ["a", "", "", "€", "\ufffd", "\n", "", "", "\ufffd\ufffdb", ""]
    assert pieces_of(tokenizer, row, []) == pieces
    assert tokenizer.decode(row) == "".join(pieces)
    assert tokenizer.token_bytes(ids["<0xE2>"]) == b"\xe2"


def test_what_is_held_back_is_known_as_text_that_may_come() -> None:
    tokenizer, ids = made(DECODERS["Llama"])
    detokenizer = tokenizer.detokenizer()
    assert (detokenizer.push(ids["<0x0A>"]), detokenizer.pending) == ("", "\n")
    # Half a character is not.
    assert (detokenizer.push(ids["<0xE2>"]), detokenizer.pending) == ("", "\n")
    assert (detokenizer.push(ids["a"]), detokenizer.pending) == ("\ufffd\ufffda", "")


def test_a_space_waits_for_what_may_take_it_away() -> None:
    assert pushed(decoders.BPEDecoder(), ["a", "x</w>", "b", "x</w>"]) == ["a", "x", " b", "x", ""]
    assert pushed(decoders.Metaspace(), ["a", "▁", "."], cleaned=True) == ["a", "", ".", ""]
    assert pushed(decoders.Metaspace(), ["a", "▁", "▁the"], cleaned=True) == ["a", "", "  the", ""]
    assert pushed(None, ["do", "n't", "'"], cleaned=True) == ["do", "n't", "", " '"]
    # The library fails where a text is shorter than what is to be stripped off its end.
    right = decoders.Sequence([SPACE, FUSE, decoders.Strip(" ", 0, 2)])
    assert pushed(right, ["a", "  ", "▁", "b", "▁"]) == ["a", "", " ", "  b", "", ""]


def test_what_the_prompt_s_text_has_already_is_not_given_again() -> None:
    llama = DECODERS["Llama"]
    # The prompt's text ends with the U+FFFD that the row would be without the rest of it.
    assert "".join(pushed(llama, ["<0x82>", "<0xAC>"], prompt=("a", "<0xE2>"))) == "€"
    assert "".join(pushed(llama, ["b"], prompt=("a", "<0xE2>"))) == "b"
    assert "".join(pushed(llama, ["a"], prompt=("▁the", "<0x0A>"))) == "a"
    assert "".join(pushed(llama, ["▁the"], prompt=("<s>",))) == "the"
    assert "".join(pushed(llama, ["▁the"], prompt=("a",))) == " the"
    assert "".join(pushed(decoders.BPEDecoder(), ["b"], prompt=("x</w>",))) == " b"
    assert "".join(pushed(None, ["n't"], cleaned=True, prompt=("do",))) == "n't"
    # A token that changes the end of the prompt's text: the new text begins where the two differ.
    assert "".join(pushed(None, ["b"], cleaned=True, prompt=("a", "'"))) == "'b"
    for tokens, text in ((["Ł", "ĺ", "Ģ", "a"], "😀a"), (["a"], "a"), ([], ""), (["Ł"], "")):
        assert "".join(pushed(decoders.ByteLevel(), tokens, prompt=("a", "ð"))) == text


def test_where_tokens_begin() -> None:
    tokenizer, ids = made(DECODERS["Llama"])
    detokenizer, begins, length = tokenizer.detokenizer(), [], 0
    for token in ("▁the", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "</s>", "▁the", "<0xE2>", "b"):
        begins.append(length + detokenizer.begin(ids[token]))
        length += len(detokenizer.push(ids[token]))
    assert begins == [0, 3, 4, 4, 4, 5, 5, 9, 10]


def test_a_long_text_is_not_gone_through_again_for_each_token() -> None:
    """The library's decoder is asked for each token of the vocabulary, not for each token of the text."""
    for decoder in (decoders.Metaspace(), decoders.WordPiece()):
        tokenizer, ids = made(decoder)
        asked: list[list[str]] = []
        for stage in tokenizer._stages:
            stage._decoder = Spy(stage._decoder, asked)  # type: ignore[attr-defined]
        assert len("".join(pieces_of(tokenizer, [ids["▁the"], ids["a"]] * 5000, []))) >= 10_000
        assert len(asked) <= 6
        assert max(map(len, asked)) <= 2


class Spy:
    """A decoder of the library that notes what it is asked."""

    def __init__(self, decoder: Any, asked: list[list[str]]) -> None:
        self._decoder, self._asked = decoder, asked

    def decode(self, tokens: list[str]) -> str:
        self._asked.append(tokens)
        return str(self._decoder.decode(tokens))


# ----------------------------------------------------------------------------------- tokens for people


def test_the_text_of_one_token() -> None:
    tokenizer, ids = made(DECODERS["Llama"])
    shown = {"▁the": " the", "<0x0A>": "\n", "<0xE2>": r"bytes:\xe2", "<s>": "<s>", "a": "a", "café": "café"}
    assert {token: tokenizer.token_text(ids[token]) for token in shown} == shown
    tokenizer, ids = made(decoders.WordPiece())
    assert [tokenizer.token_text(ids[token]) for token in ("##ing", "a", ".", "</s>")] == ["ing", " a", ".", "</s>"]
    tokenizer, ids = made(decoders.BPEDecoder())
    assert [tokenizer.token_text(ids[token]) for token in ("a", "x</w>")] == ["a", "x"]
    for decoder in DECODERS.values():
        tokenizer, ids = made(decoder, cleaned=True)
        assert all(isinstance(tokenizer.token_text(one), str) for one in (*ids.values(), 1 << 30))
        assert tokenizer.token_bytes(1 << 30) == tokenizer.token_bytes(ids["<s>"]) == b""


def test_a_special_token_s_name_is_special_under_every_id() -> None:
    """CamemBERT's vocabularies have <unk> twice. The library goes by the name."""
    vocabulary = [("<unk>", 0.0), ("▁a", -1.0), ("<unk>", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<unk>", special=True)])
    tokenizer = Tokenizer(LoadedTokenizer(backend))
    assert backend.decode([1, 0, 2, 1]) == tokenizer.decode([1, 0, 2, 1]) == "a a"
    assert [tokenizer.is_special(token_id) for token_id in (0, 1, 2, 3)] == [True, False, True, False]
    assert tokenizer.token_text(0) == tokenizer.token_text(2) == "<unk>"


def test_added_tokens_of_byte_level_tokenizers_as_the_library_has_them() -> None:
    """Where each of its characters stands for a byte, an added token is these bytes; else it is its own text."""
    tokenizer, ids = made(decoders.ByteLevel())
    assert tokenizer.token_bytes(ids["café"]) == bytes_of("café") == b"caf\xe9"
    assert tokenizer.token_bytes(ids["日 本"]) == "日 本".encode()


def test_a_decoder_that_fails_is_a_tokenizer_error() -> None:
    """This one panics in Rust, as it looks for a space at the end of nothing."""
    tokenizer, ids = made(decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Strip(" ", 0, 1)]))
    with pytest.raises(TokenizerError, match="decoder cannot make a text of its tokens"):
        tokenizer.decode([ids["a"]])


def test_a_decoder_that_fails_ends_no_step_of_many_sequences() -> None:
    """Tokens that the library makes no text of stand as they are: an error would end the neighbours too."""
    for decoder in (
        decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Strip("a", 1, 0), decoders.Strip("b", 1, 0), decoders.Strip(" ", 0, 1)]),
    ):
        tokenizer, ids = made(decoder)
        assert "".join(pieces_of(tokenizer, [ids["a"]], [])) == "a"
        assert "".join(pieces_of(tokenizer, [ids["b"]], [ids["a"]])) == "b"


# ------------------------------------------------------------------------------------- bounds and offsets


def test_only_where_every_byte_is_kept_does_a_text_have_a_least_number_of_tokens() -> None:
    bounds = {entry["kind"]: of_entry(entry).longest_token_bytes for entry in KINDS}
    kept = {kind for kind, bound in bounds.items() if bound < ANY_LENGTH}
    assert kept == {"BPE with bytes", "byte-level BPE"}
    for entry in KINDS:
        tokenizer = of_entry(entry)
        for text in ("", "a", "  spaces\n\nand more  ", "日本語 café", "x" * 300, "\u0301" * 20, "☃" * 50):
            least = -(-len(text.encode()) // tokenizer.longest_token_bytes)
            assert len(tokenizer.encode(text)) >= (least if bounds[entry["kind"]] < ANY_LENGTH else 0)
            assert least <= 1 or bounds[entry["kind"]] < ANY_LENGTH


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "aa"}, "content": "a"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}},
    ],
    ids=lambda change: json.dumps(change)[:50],
)
def test_what_takes_text_away_leaves_no_bound(change: dict[str, Any]) -> None:
    (entry,) = [entry for entry in KINDS if entry["kind"] == "byte-level BPE"]
    assert of_entry(entry).longest_token_bytes < ANY_LENGTH
    stored = json.loads(json.dumps(entry["tokenizer"]))
    stored.update(change)
    assert of_entry({**entry, "tokenizer": stored}).longest_token_bytes == ANY_LENGTH


def test_so_does_an_added_token_that_takes_spaces_along() -> None:
    (entry,) = [entry for entry in KINDS if entry["kind"] == "byte-level BPE"]
    stored = json.loads(json.dumps(entry["tokenizer"]))
    stored["added_tokens"][0]["rstrip"] = True
    assert of_entry({**entry, "tokenizer": stored}).longest_token_bytes == ANY_LENGTH


def test_offsets_of_tokens_that_stand_around_the_text() -> None:
    from tokenizers import processors

    (entry,) = [entry for entry in KINDS if entry["kind"] == "byte-level BPE"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(entry["tokenizer"]))
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    tokenizer = Tokenizer(LoadedTokenizer(backend))
    ids, offsets = tokenizer.encode("a cup"), tokenizer.offsets("a cup")
    assert (ids[0], ids[-1]) == (0, 1)
    texts = [tokenizer.token_bytes(one).decode() for one in ids]
    assert offsets == [len("".join(texts[:n])) for n in range(len(ids))]


def test_what_the_tokenizer_cannot_encode() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(BadRequest, match=r"the tokenizer cannot encode this prompt .*leave out characters"):
        Tokenizer(LoadedTokenizer(backend)).encode("b")
