# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Make `decoding.json`: the texts that transformers makes of token ids, for small tokenizers of every kind of decoder.

    oracle/bin/python tests/golden/make_decoding.py [FILE]

The environment is that of `make_golden.py`. Each kind has its `tokenizer.json`, whether transformers cleans decoded
text up, and cases: ids of a prompt, new ids, and what `decode(..., skip_special_tokens=True)` makes of the prompt and
of both together. The same versions of the libraries write the same file again.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent

TEXTS = (
    "The old man sat by the sea, and didn't say a word. What will come of it?",
    "Der alte Mann saß am Meer; größer und schöner als früher!",
    "今日はとても良い天気ですね。 ABC と 123 も書きます。",
    "I'm happy 😀🎉👍🏽 today , they 've said ' so ' .",
    "Ответа не было.\n\nNo answer  at all",
)
SPECIAL = ("<s>", "</s>", "<unk>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CASES = 24


def trained(model: Any, trainer: Any, splitter: Any, decoder: Any) -> Tokenizer:
    """Return a tokenizer that has been trained on the texts."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def pairs(size: int, **options: Any) -> Any:
    return trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False, **options)


def word_piece() -> Tokenizer:
    # The library's trainer does not give the same tokens twice.
    characters = sorted({c.lower() for text in TEXTS for c in text if c > " "})
    words = sorted({word.strip(",.?!;").lower() for text in TEXTS for word in text.split()})[::2]
    pieces = [*SPECIAL, *characters, *(f"##{c}" for c in characters), *words, "##ing", "##er"]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def unigram(decoder: Any, splitter: Any, vocabulary: list[str]) -> Tokenizer:
    pieces = [*SPECIAL, *vocabulary, "▁", *sorted({c for text in TEXTS for c in text if c > " "})]
    words = sorted({"▁" + word for text in TEXTS for word in text.split()})
    scores = [(piece, -float(rank)) for rank, piece in enumerate([*pieces, *words])]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=bool(vocabulary)))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def llama() -> Tokenizer:
    """Build BPE as sentencepiece has it, with bytes for what has no token."""
    tokenizer = trained(models.BPE(), pairs(150), pre_tokenizers.Metaspace(split=False), None)
    stored = json.loads(tokenizer.to_str())
    vocabulary = stored["model"]["vocab"]
    for token in BYTES:
        vocabulary.setdefault(token, len(vocabulary))
    stored["model"].update(byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """Build GPT-2's kind, with added tokens that are no special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = trained(models.BPE(), pairs(320, initial_alphabet=alphabet), splitter, decoders.ByteLevel())
    tokenizer.add_tokens(["café", "日本", "two words", " "])
    return tokenizer


def word_level(decoder: Any) -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=90, special_tokens=list(SPECIAL), show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace(), decoder)


def word_ends() -> Tokenizer:
    """Build what decodes as BPE with ends of words does. The library's trainer does not give the same tokens twice."""
    words = sorted({word for text in TEXTS for word in text.split()})
    pieces = [*SPECIAL, *(f"{word}</w>" for word in words), *(word[:3] for word in words), *words[::4]]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    splitter = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained(models.BPE(unk_token="<unk>"), pairs(200), splitter, decoders.Metaspace(prepend_scheme=scheme))


def kinds() -> dict[str, tuple[Tokenizer, bool]]:
    """Return the tokenizers, each with the `clean_up_tokenization_spaces` of its tokenizer_config.json."""
    spaces = pre_tokenizers.Metaspace()
    gemma = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    regular = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("[aeiou]+"), "*")])
    return {
        "WordPiece": (word_piece(), False),
        "WordPiece, cleaned up": (word_piece(), True),
        "Metaspace BPE": (metaspace("always"), False),
        "Metaspace BPE, clean-up is passed over": (metaspace("always"), True),
        "Metaspace BPE, nothing before the text": (metaspace("never"), False),
        "Unigram": (unigram(decoders.Metaspace(), spaces, []), False),
        "Unigram, cleaned up": (unigram(decoders.Metaspace(), spaces, []), True),
        "Unigram with bytes": (unigram(gemma, spaces, BYTES), False),
        "Unigram with bytes, cleaned up": (unigram(gemma, spaces, BYTES), True),
        "BPE with bytes": (llama(), False),
        "word ends": (word_ends(), False),
        "WordLevel without a decoder": (word_level(None), False),
        "WordLevel without a decoder, cleaned up": (word_level(None), True),
        "WordLevel with CTC": (word_level(decoders.CTC(pad_token="a")), False),
        "WordLevel with bytes for characters, cleaned up": (word_level(decoders.ByteLevel()), True),
        "WordLevel with a regular expression over all": (word_level(regular), False),
        "byte-level BPE": (byte_level(), True),
    }


def cases(tokenizer: Any, dice: random.Random) -> list[dict[str, Any]]:
    """Return ids of texts, cut anywhere, and ids at random, some of which the tokenizer does not have."""
    found = []
    size = len(tokenizer)
    for number in range(CASES):
        if number < len(TEXTS):
            ids = tokenizer(TEXTS[number])["input_ids"]
        else:
            few = [dice.randrange(size + 2) for _ in range(dice.choice((4, 12, 40)))]
            ids = [dice.choice(few) for _ in range(dice.randint(1, 24))]
        at = dice.randint(0, len(ids))
        prompt = tokenizer.decode(ids[:at], skip_special_tokens=True)
        found.append({"prompt": ids[:at], "new": ids[at:], "of_prompt": prompt, "of_all": tokenizer.decode(ids, True)})
    return found


def main() -> None:
    transformers_logging.set_verbosity_error()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "decoding.json"
    dice = random.Random(17)
    entries = []
    for name, (backend, cleaned) in kinds().items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=cleaned)
        # transformers does not clean up after BPE.
        clean_up = cleaned and type(backend.model).__name__ != "BPE"
        described = {"kind": name, "clean_up": clean_up, "tokenizer": json.loads(backend.to_str())}
        entries.append({**described, "cases": cases(tokenizer, dice)})
    with target.open("w", encoding="ascii", newline="\n") as file:
        file.write("[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries) + "\n]\n")
    print(f"{len(entries)} kinds, {sum(len(entry['cases']) for entry in entries)} cases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
