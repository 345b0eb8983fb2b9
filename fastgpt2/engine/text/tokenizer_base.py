"""The base of all classes of tokenizers: the vocabulary that they are built of, and how they frame a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from fastgpt2.engine.model.config import MERGES_FILE, VOCAB_FILE
from fastgpt2.engine.text.special_tokens import added_token
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from fastgpt2.engine.text.sentencepiece import SentencePieceModel
    from fastgpt2.engine.text.special_tokens import Options, SpecialTokens

# What sentencepiece writes for a space.
SPACE = "▁"

Pieces: TypeAlias = list[tuple[str, float]]


class Vocabulary:
    """The tokens themselves, as the files have them.

    Attributes:
        tokens: id by token, or a list of tokens with their scores, or the path of the file that has them.
        merges: the merges of a BPE, or the path of their file.
        parsed: a model of the tokenizers library that has all of that already, to be taken instead.
        charsmap: the table of sentencepiece's normalizer.
        source: the model of sentencepiece that the tokens come from.
    """

    def __init__(
        self,
        tokens: Any,
        merges: Any = (),
        parsed: Any = None,
        charsmap: bytes | None = None,
        source: SentencePieceModel | None = None,
    ) -> None:
        self.tokens, self.merges, self.parsed = tokens, merges, parsed
        self.charsmap, self.source = charsmap, source

    def bpe(self, **settings: Any) -> Any:
        """Return a BPE model with the given settings, and otherwise the defaults."""
        from tokenizers import models

        if isinstance(self.tokens, str):
            return models.BPE.from_file(self.tokens, self.merges, **settings)
        if self.parsed is None:
            return models.BPE(vocab=self.tokens, merges=list(self.merges), **settings)
        plain = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        for name, value in {**plain, **settings}.items():
            setattr(self.parsed, name, value)
        return self.parsed

    def word_piece(self, unk_token: str) -> Any:
        """Return a WordPiece model."""
        from tokenizers import models

        if isinstance(self.tokens, str):
            return models.WordPiece.from_file(self.tokens, unk_token=unk_token)
        if self.parsed is None:
            return models.WordPiece(self.tokens, unk_token=unk_token)
        self.parsed.unk_token = unk_token
        self.parsed.continuing_subword_prefix = "##"
        self.parsed.max_input_chars_per_word = 100
        return self.parsed

    @property
    def pieces(self) -> Pieces:
        """Return the tokens with their scores; raise TokenizerError if they have none."""
        if not isinstance(self.tokens, list):
            raise TokenizerError(
                "its tokens have no scores, which the tokenizer's class needs; put "
                '"tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json to have it taken as it is'
            )
        return self.tokens

    def unigram(self, unk_id: int) -> Any:
        """Return a Unigram model."""
        from tokenizers import models

        return models.Unigram(self.pieces, unk_id, False)

    def normalizers(self) -> list[Any]:
        """Return sentencepiece's normalizer, if there is a table for it."""
        from tokenizers import normalizers

        return [] if self.charsmap is None else [normalizers.Precompiled(self.charsmap)]


def parts(base: Mapping[str, str | None] | None = None, /, **texts: str | None) -> Mapping[str, str | None]:
    """Return special tokens by the names of their parts, as in `parts(eos="</s>")`, over those of `base`."""
    return {**(base or {}), **{f"{part}_token": text for part, text in texts.items()}}


END_OF_TEXT = "<|endoftext|>"
# The special tokens of RoBERTa and its relatives, and those of BERT.
FAIRSEQ = parts(bos="<s>", eos="</s>", unk="<unk>", sep="</s>", pad="<pad>", cls="<s>", mask="<mask>")
BERT = parts(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")


class TokenizerClass:
    """A class of tokenizers, at work on one folder; this one is the base of all.

    Attributes:
        model: the kind of its model. Of "BPE" and "WordPiece" the tokens have ids, of "Unigram" scores. Of "" they have
            what the files have.
        files: the file of the vocabulary, and that of the merges if there is one.
        defaults: its special tokens, unless the files name others; None if it has none for a part.
        mask_strips: whether the mask token takes the space before it.
        whole: whether a model that `tokenizer.json` describes can be taken as it is.
        inherits: whether transformers takes a `tokenizer.json`, or the settings of a model of sentencepiece, as they
            are, since its class of that name has nothing of its own but the special tokens.
        raw: whether the class works on the text as it comes, as sentencepiece's own classes do: added tokens are looked
            for before the text is normalized, and a part that the files set to nothing has its usual token.
        options: what the small files say.
        vocabulary: the tokens, once they are read.
        special: the special tokens, once the vocabulary is read.
        framed: whether `add_bos_token` and `add_eos_token` have set the post-processor, once that is so.
    """

    model = "BPE"
    files: tuple[str, ...] = (VOCAB_FILE, MERGES_FILE)
    defaults = parts()
    mask_strips = False
    whole = False
    inherits = False
    raw = False

    vocabulary: Vocabulary
    special: SpecialTokens
    framed = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def stated(self, name: str, otherwise: str | None = None) -> str:
        """Return the text that the files state for a part, else the class's own, or the one given."""
        value = self.options.values.get(name, otherwise or self.defaults.get(name))
        return str(value.get("content") if isinstance(value, dict) else value)

    def build(self) -> tokenizers.Tokenizer:
        """Return the pipeline, without added tokens and, mostly, without a post-processor."""
        raise NotImplementedError

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        """Change the pipeline when all tokens are added: most classes have a post-processor of their own."""

    def arrange(self, pieces: Pieces) -> Pieces:
        """Return the list of tokens for the pieces of a model of sentencepiece."""
        return pieces

    def arrange_ids(self, ids: dict[str, int]) -> dict[str, int]:
        """Return the ids of the tokens of a BPE, given those that a model of sentencepiece has for them."""
        return ids

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        """Return the further special tokens, given those that the files list; None: they list none."""
        return listed


def make_special(backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Make all special tokens special, also those that the files declare otherwise.

    Source: `TokenizersBackend._post_init`, which some classes call.
    """
    backend.add_special_tokens(
        [
            added_token(token, special=True, normalized=False) if isinstance(token, str) else token
            for token in [*special.named.values(), *special.extra]
            if token is not None
        ]
    )


def frame(backend: tokenizers.Tokenizer, options: Options, special: SpecialTokens) -> None:
    """Set the post-processor that `add_bos_token` and `add_eos_token` ask for."""
    from tokenizers import processors

    texts = ["$A:0"]
    tokens: list[Any] = []
    for flag, name, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", 2)):
        text = special.text(name)
        if options.flag(flag, False) and text is not None:
            texts.insert(place, f"{text}:0")
            tokens.append(special.pair(backend, name))
    backend.post_processor = processors.TemplateProcessing(single=" ".join(texts), special_tokens=tokens)


def wrap(
    backend: tokenizers.Tokenizer,
    special: SpecialTokens,
    first: str,
    last: str,
    otherwise: tuple[int | None, int | None] = (None, None),
) -> None:
    """Set a post-processor that puts a text between two special tokens, whose ids are the given ones if unknown."""
    pairs = [special.pair(backend, name, index) for name, index in zip((first, last), otherwise, strict=True)]
    surround(backend, pairs[:1], pairs[1:])


def surround(backend: tokenizers.Tokenizer, before: list[tuple[str, int]], after: list[tuple[str, int]]) -> None:
    """Set a post-processor that puts tokens, given with their ids, before and after a text."""
    from tokenizers import processors

    texts = [*(f"{text}:0" for text, _ in before), "$A:0", *(f"{text}:0" for text, _ in after)]
    backend.post_processor = processors.TemplateProcessing(single=texts, special_tokens=[*before, *after])
