"""The classes of tokenizers over models of sentencepiece: their tokens write a space as a character of its own.

Source of each: the class of the same name in `models/*/tokenization_*.py` of transformers 5; of the order of its
tokens, the converter of that name in convert_slow_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.model.config import TOKENIZER_FILE
from fastgpt2.engine.text.tokenizer_base import (
    BERT,
    END_OF_TEXT,
    FAIRSEQ,
    SPACE,
    Pieces,
    TokenizerClass,
    make_special,
    parts,
    surround,
    wrap,
)
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

# T5 has 100 sentinels, unless the file asks for another number.
MAX_EXTRA_IDS = 1 << 16

# Source: `GPTSw3Tokenizer.__init__` in models/gpt_sw3/tokenization_gpt_sw3.py.
_UNPRINTABLE = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 161), 0xAD, 0x200B]))
_SPACES = "\u2002\u2003\u2005\u2008\u2009\u200a\u202f\u3000\ufffc"


def single_spaces(content: str = " ") -> Any:
    """Return a normalizer that puts one space, or another content, for several."""
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(" {2,}"), content)


class LlamaClass(TokenizerClass):
    files = ("tokenizer.model",)
    defaults = parts(unk="<unk>", bos="<s>", eos="</s>")
    whole = True

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, pre_tokenizers

        backend = tokenizers.Tokenizer(self.vocabulary.bpe(fuse_unk=True, byte_fallback=True))
        prefix_space = self.options.flag("add_prefix_space", True)
        scheme = ("always" if self.options.flag("legacy", False) else "first") if prefix_space else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix_space)
        return backend


class GemmaClass(TokenizerClass):
    """A BPE without a prefix, whose pre-tokenizer finds no space, since the normalizer has replaced them."""

    files = (TOKENIZER_FILE,)
    defaults = parts(unk="<unk>", bos="<bos>", eos="<eos>", pad="<pad>", mask="<mask>")
    whole = True

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        unknown = str(self.special.text("unk_token"))
        backend = tokenizers.Tokenizer(self.vocabulary.bpe(unk_token=unknown, fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        return backend


class Siglip2Class(GemmaClass):
    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import normalizers

        backend = super().build()
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
        return backend


class ReformerClass(TokenizerClass):
    """A BPE of words, each with a prefix."""

    files = ("spiece.model",)
    defaults = parts(eos="</s>", unk="<unk>")
    whole = True

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        unknown = str(self.special.text("unk_token"))
        backend = tokenizers.Tokenizer(self.vocabulary.bpe(unk_token=unknown, fuse_unk=True))
        if self.vocabulary.charsmap is not None:
            backend.normalizer = normalizers.Sequence([*self.vocabulary.normalizers(), single_spaces()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
        backend.decoder = decoders.Metaspace(SPACE, "always")
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        make_special(backend, self.special)


class UnigramClass(TokenizerClass):
    """Sentencepiece's unigram models: words by white space, each with a prefix."""

    model = "Unigram"
    files = ("spiece.model",)
    never = "never"
    by_words = True
    prefixes_always = False

    def unk_id(self) -> int:
        """Return the id that unknown characters get."""
        return 3

    def stated_unk_id(self, default: int) -> int:
        """Return the id of the unknown token that the files state."""
        if self.vocabulary.source is not None:
            return self.vocabulary.source.unk_id
        return self.options.number("unk_id", default, len(self.vocabulary.pieces))

    def unscored_unk_id(self) -> int | None:
        """Return the place of the unknown token among the pieces, with the score 0; None if it has none there."""
        unknown = (str(self.special.text("unk_token")), 0.0)
        pieces = self.vocabulary.pieces
        return pieces.index(unknown) if unknown in pieces else None

    def normalizers(self) -> list[Any]:
        """Return what happens to the text first."""
        return self.vocabulary.normalizers()

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        backend = tokenizers.Tokenizer(self.vocabulary.unigram(self.unk_id()))
        steps = self.normalizers()
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        prefixes = self.prefixes_always or self.options.flag("add_prefix_space", True)
        scheme = "always" if prefixes else self.never
        space: Any = pre_tokenizers.Metaspace(SPACE, scheme)
        if self.by_words:
            space = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
        backend.pre_tokenizer = space
        backend.decoder = decoders.Metaspace(SPACE, scheme)
        return backend


class T5Class(UnigramClass):
    defaults = parts(eos="</s>", unk="<unk>", pad="<pad>")
    prefixes_always = True

    def unk_id(self) -> int:
        return 2

    def arrange(self, pieces: Pieces) -> Pieces:
        extra = self.options.number("extra_ids", 100, MAX_EXTRA_IDS)
        return pieces + [(f"<extra_id_{index}>", 0.0) for index in reversed(range(extra))]

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        extra = self.options.number("extra_ids", 100, MAX_EXTRA_IDS)
        sentinels = [f"<extra_id_{index}>" for index in range(extra)]
        stated = sum("<extra_id_" in str(token) for token in listed or [])
        if stated and extra not in (0, stated):
            raise TokenizerError(
                f"extra_ids is {extra}, but additional_special_tokens has {stated} of <extra_id_0> ..."
            )
        return (listed or []) + ([] if stated else sentinels)

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import processors

        end = [("</s>", self.special.pair(backend, "eos_token")[1])]
        backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=end)


class VideoPrismClass(T5Class):
    def finish(self, backend: tokenizers.Tokenizer) -> None:
        pass


class PegasusClass(UnigramClass):
    """The tokenizer of PEGASUS, which has a hundred unknown tokens in front of its pieces."""

    defaults = parts(pad="<pad>", eos="</s>", unk="<unk>", mask="<mask_2>")
    by_words = False
    prefixes_always = True

    def _unknowns(self) -> list[str]:
        return [f"<unk_{index}>" for index in range(2, self.options.number("offset", 103, MAX_EXTRA_IDS))]

    def arrange(self, pieces: Pieces) -> Pieces:
        # transformers takes them so: each of the two has the other's usual text here.
        masks = [self.stated("mask_token", "<mask_1>"), self.stated("mask_token_sent", "<mask_2>")]
        first = [self.stated("pad_token"), self.stated("eos_token"), *(m for m in dict.fromkeys(masks) if m != "None")]
        return [*((text, 0.0) for text in first), *((text, -100.0) for text in self._unknowns()), *pieces[2:]]

    def additional(self, _: list[Any] | None) -> list[Any] | None:
        sentence = self.options.values.get("mask_token_sent", "<mask_1>")
        return [] if sentence is None else [sentence, *self._unknowns()]

    def unk_id(self) -> int:
        unknown = (str(self.special.text("unk_token")), 0.0)
        pieces = self.vocabulary.pieces
        if unknown not in pieces[1:]:
            raise TokenizerError(f"the tokenizer's class needs its unk_token {unknown[0][:40]!r}, with the score 0")
        return pieces.index(unknown, 1)

    def normalizers(self) -> list[Any]:
        from tokenizers import Regex, normalizers

        lines: list[Any] = [normalizers.Replace(Regex(r"\n"), " ")]
        return [*(self.vocabulary.normalizers() or lines), single_spaces()]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        surround(backend, [], [self.special.pair(backend, "eos_token")])


class XGLMClass(UnigramClass):
    files = (TOKENIZER_FILE,)
    defaults = parts(FAIRSEQ, mask=None)
    by_words = False

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return [*(listed or []), *(f"<madeupword{index}>" for index in range(7))]

    def normalizers(self) -> list[Any]:
        return [*self.vocabulary.normalizers(), single_spaces()]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        surround(backend, [self.special.pair(backend, "eos_token")], [])


class BigBirdClass(UnigramClass):
    defaults = parts(FAIRSEQ, sep="[SEP]", cls="[CLS]", mask="[MASK]")
    mask_strips = True
    by_words = False

    def unk_id(self) -> int:
        found = self.unscored_unk_id()
        return 100 if found is None else found

    def normalizers(self) -> list[Any]:
        return [single_spaces(SPACE)]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token")


class PlainTextClass(UnigramClass):
    """The base of ALBERT's and XLNet's: quotes become straight; accents and, if asked for, capitals are taken away."""

    lowercase = False

    @property
    def keeps_accents(self) -> bool:
        return False

    def normalizers(self) -> list[Any]:
        from tokenizers import normalizers

        steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not self.keeps_accents:
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        if self.options.flag("do_lower_case", self.lowercase):
            steps.append(normalizers.Lowercase())
        return steps + self.vocabulary.normalizers()


class AlbertClass(PlainTextClass):
    defaults = parts(BERT, unk="<unk>", pad="<pad>", bos="[CLS]", eos="[SEP]")
    lowercase = True

    def unk_id(self) -> int:
        return 1

    @property
    def keeps_accents(self) -> bool:
        return self.options.flag("keep_accents", False)

    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import processors

        backend = super().build()
        ends = [("[CLS]", self.special.text("cls_token")), ("[SEP]", self.special.text("sep_token"))]
        ids = [(text, None if token is None else backend.token_to_id(token)) for text, token in ends]
        # transformers fails where the vocabulary lacks the two.
        if None not in dict(ids).values():
            backend.post_processor = processors.TemplateProcessing(single="[CLS]:0 $A:0 [SEP]:0", special_tokens=ids)
        return backend


class FNetClass(AlbertClass):
    inherits = True


class RemBertClass(PlainTextClass):
    files = ("sentencepiece.model",)
    defaults = parts(BERT, unk="<unk>", pad="<pad>", bos="[CLS]", eos="[SEP]")
    by_words = False

    def unk_id(self) -> int:
        return 2

    @property
    def keeps_accents(self) -> bool:
        return self.options.flag("keep_accents", True)

    def normalizers(self) -> list[Any]:
        steps = super().normalizers()
        return [*steps[:2], single_spaces(), *steps[2:]]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        make_special(backend, self.special)
        if not self.framed:
            wrap(backend, self.special, "cls_token", "sep_token")


class XLNetClass(PlainTextClass):
    defaults = parts(FAIRSEQ, sep="<sep>", cls="<cls>")
    mask_strips = True
    prefixes_always = True

    def unk_id(self) -> int:
        return self.stated_unk_id(0)

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return ["<eop>", "<eod>"] if listed is None else listed

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import processors

        sep, cls = (self.special.pair(backend, name) for name in ("sep_token", "cls_token"))
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A:0 {sep[0]}:0 {cls[0]}:2", special_tokens=[sep, cls]
        )


class XLMRobertaClass(UnigramClass):
    files = ("sentencepiece.bpe.model",)
    defaults = FAIRSEQ

    def arrange(self, pieces: Pieces) -> Pieces:
        first = [(self.stated(f"{part}_token"), 0.0) for part in ("bos", "pad", "eos", "unk")]
        return [*first, *pieces[3:], (self.stated("mask_token"), 0.0)]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "bos_token", "eos_token")


class CamembertClass(XLMRobertaClass):
    model = ""
    mask_strips = True

    def unk_id(self) -> int:
        texts = [text for text, _ in self.vocabulary.pieces]
        unknown = str(self.special.text("unk_token"))
        return texts.index(unknown) if unknown in texts else 0

    def arrange(self, pieces: Pieces) -> Pieces:
        pad, unk, mask = ((self.stated(f"{part}_token"), 0.0) for part in ("pad", "unk", "mask"))
        first = [("<s>NOTUSED", 0.0), pad, ("</s>NOTUSED", 0.0), unk, ("<unk>NOTUSED", -100.0)]
        return [*first, *pieces[1:], mask]

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"] if listed is None else listed


class BarthezClass(UnigramClass):
    model = ""
    files = ("sentencepiece.bpe.model",)
    defaults = FAIRSEQ
    mask_strips = True
    by_words = False

    def normalizers(self) -> list[Any]:
        from tokenizers import Regex, normalizers

        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        return [spaces, normalizers.NFC(), normalizers.Strip(left=False, right=True)]


class DebertaV2Class(BarthezClass):
    model = "Unigram"
    files = ("spm.model",)
    defaults = parts(BERT, bos="[CLS]", eos="[SEP]")
    mask_strips = False
    never = "first"

    def unk_id(self) -> int:
        found = self.unscored_unk_id()
        return self.stated_unk_id(1) if found is None else found

    def normalizers(self) -> list[Any]:
        from tokenizers import normalizers

        lower: list[Any] = [normalizers.Lowercase()] if self.options.flag("do_lower_case", False) else []
        return lower + super().normalizers()

    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import pre_tokenizers

        backend = super().build()
        marks: list[Any] = (
            [pre_tokenizers.Punctuation("isolated")] if self.options.flag("split_by_punct", False) else []
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence([*marks, backend.pre_tokenizer])
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token", (0, 0))


class GPTSw3Class(TokenizerClass):
    """The tokenizer of the Nordic GPT-SW3: sentencepiece itself, after a cleaning of its own."""

    files = ("spiece.model",)
    raw = True
    defaults = parts(eos=END_OF_TEXT, unk="<unk>", pad="<pad>", bos="<s>")

    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, normalizers

        from fastgpt2.engine.text.sentencepiece import pipeline

        if self.vocabulary.source is None:
            raise TokenizerError(f"this tokenizer's class needs {self.files[0]}")
        backend = pipeline(self.vocabulary.source, legacy=True)
        unprintable = normalizers.Replace(Regex(f"[{_UNPRINTABLE}]"), "")
        spaces = normalizers.Replace(Regex(f"[{_SPACES}]"), " ")
        backend.normalizer = normalizers.Sequence([unprintable, spaces, normalizers.NFC(), backend.normalizer])
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import processors

        backend.post_processor = processors.TemplateProcessing(single="$A")


CLASSES: Mapping[str, type[TokenizerClass]] = {
    "LlamaTokenizer": LlamaClass,
    "T5Tokenizer": T5Class,
    "AlbertTokenizer": AlbertClass,
    "XLNetTokenizer": XLNetClass,
    "XLMRobertaTokenizer": XLMRobertaClass,
    "CamembertTokenizer": CamembertClass,
    "BarthezTokenizer": BarthezClass,
    "DebertaV2Tokenizer": DebertaV2Class,
    "GPTSw3Tokenizer": GPTSw3Class,
    "ReformerTokenizer": ReformerClass,
    "BigBirdTokenizer": BigBirdClass,
    "PegasusTokenizer": PegasusClass,
    "XGLMTokenizer": XGLMClass,
    "RemBertTokenizer": RemBertClass,
    "FNetTokenizer": FNetClass,
    "GemmaTokenizer": GemmaClass,
    "Siglip2Tokenizer": Siglip2Class,
    "VideoPrismTokenizer": VideoPrismClass,
}
