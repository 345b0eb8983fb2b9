"""The tokenizer that the files of a model's folder describe, as transformers' `AutoTokenizer` would load it.

The class of the tokenizer decides which files are read and what is believed of them. Source of the choice:
`AutoTokenizer.from_pretrained` in transformers 5, models/auto/tokenization_auto.py; of what follows,
`TokenizersBackend` in tokenization_utils_tokenizers.py. No code of a repository is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fastgpt2.engine.model.config import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_SETS,
    read_json_object,
)
from fastgpt2.engine.text.decoders import is_library_failure, said
from fastgpt2.engine.text.special_tokens import (
    Options,
    SpecialTokens,
    add_tokens,
    as_raw,
    collect_special_tokens,
    read_options,
)
from fastgpt2.engine.text.tokenizer_base import TokenizerClass, Vocabulary, frame
from fastgpt2.engine.text.tokenizer_classes import CODE_CLASSES, NEEDS, OTHER_PIPELINES, USUAL_CLASSES, find_class
from fastgpt2.engine.text.tokenizer_json import TokenizerJson, check_size, read_bytes
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

    from fastgpt2.engine.text.sentencepiece import SentencePieceModel

# Of the small files, which may hold a chat template and thousands of added tokens.
MAX_SETTINGS_BYTES = 16 << 20

# The name under which sentencepiece's model is taken by every class, if there is no tokenizer.json.
_COMMON_MODEL = "tokenizer.model"

_OTHER_REMEDY = "give a tokenizer by --tokenizer ID|PATH"
_SAVE_REMEDY = (
    "save it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)), put "
    '"tokenizer_class": "PreTrainedTokenizerFast" into FOLDER/tokenizer_config.json, and give it by --tokenizer FOLDER'
)


class LoadedTokenizer(NamedTuple):
    """A tokenizer as it was loaded from a folder.

    Attributes:
        backend: the pipeline, with the post-processor, the decoder and the added tokens that transformers gives it.
        clean_up: whether transformers would run its `clean_up_tokenization` over decoded text.
        bytes_alone: whether transformers would have sentencepiece itself decode, which takes each byte that is part of
            no character for U+FFFD, and not its whole row.
        eos_token_id: the tokenizer's own end-of-sequence token, or None.
        bos_token_id: the tokenizer's own beginning-of-sequence token, or None.
        special_texts: the texts of the special tokens that have a part, by its name, such as `eos_token`.
        notes: sentences for people on what was passed over.
    """

    backend: tokenizers.Tokenizer
    clean_up: bool = False
    bytes_alone: bool = False
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    special_texts: Mapping[str, str] = MappingProxyType({})
    notes: tuple[str, ...] = ()


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model's folder.

    Raises:
        TokenizerError: there is none, or what is there cannot be read.
    """
    loader = _Loader(folder)
    try:
        return loader.load()
    except TokenizerError as error:
        if str(folder) in str(error):
            raise
        # What is wrong with the small files is known by the name of the field.
        separator = "/" if str(error).startswith(TOKENIZER_CONFIG_FILE) else ": "
        raise TokenizerError(f"{folder if separator == '/' else loader.path}{separator}{error}") from None
    except BaseException as reason:
        if not is_library_failure(reason):
            raise
        raise TokenizerError(f"{loader.path}: not a tokenizer that can be read ({said(reason)})") from None


class _Loader:
    """Loads one folder; `path` is the file at hand, for messages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder
        self.notes: list[str] = []
        self._class_name = ""

    def load(self) -> LoadedTokenizer:
        settings = self._object(TOKENIZER_CONFIG_FILE)
        json_path = self._file(TOKENIZER_FILE)
        parsed = TokenizerJson(json_path) if json_path else None
        made_by = self._class(settings, parsed)
        for name in ("tokenizer_class", "init_inputs"):
            settings.pop(name, None)
        if parsed:
            for name in ("add_bos_token", "add_eos_token"):
                settings.pop(name, None)
        special_map, added = self._object(SPECIAL_TOKENS_FILE), self._object(ADDED_TOKENS_FILE)
        self.path = self.folder
        options = read_options(settings, special_map, added, parsed.added_tokens if parsed else [])
        kind = made_by(options) if made_by else None
        if kind is None or (kind.inherits and (parsed or self._pieces_file(kind))):
            backend, special = self._as_it_is(parsed, options, kind)
        else:
            backend, special = self._by_class(kind, parsed), kind.special
        add_tokens(backend, options, special, kind is not None and kind.raw)
        framed = backend.post_processor is None or bool({"add_bos_token", "add_eos_token"} & options.values.keys())
        if framed:
            frame(backend, options, special)
        if kind is not None:
            kind.special, kind.framed = special, framed
            kind.finish(backend)
        backend.encode_special_tokens = options.flag("split_special_tokens", False)
        return LoadedTokenizer(
            backend,
            clean_up=self._cleans_up(backend, options, kind),
            bytes_alone=kind is not None and kind.raw,
            eos_token_id=special.find(backend, "eos_token"),
            bos_token_id=special.find(backend, "bos_token"),
            special_texts={name: str(token) for name, token in special.named.items() if token is not None},
            notes=tuple(self.notes),
        )

    def _file(self, name: str) -> Path | None:
        """Return the path of a file of the folder, or None if it is not there; note it as the file at hand.

        A pipe or a device in its place is there: to read it is an error.
        """
        path = self.folder / name
        if not path.exists():
            return None
        self.path = path
        return path

    def _object(self, name: str) -> dict[str, Any]:
        """Return the object that a small JSON file holds, or {} if there is no such file."""
        path = self._file(name)
        return read_json_object(path, MAX_SETTINGS_BYTES, TokenizerError) if path else {}

    def _class(self, settings: dict[str, Any], parsed: TokenizerJson | None) -> type[TokenizerClass] | None:
        """Return the class that makes the tokenizer, or None if tokenizer.json is taken as it is."""
        config = self._object(CONFIG_FILE)
        named = settings.get("tokenizer_class")
        named = config.get("tokenizer_class") if named is None else named
        if named is not None and not isinstance(named, str):
            raise TokenizerError(f"{self.folder / TOKENIZER_CONFIG_FILE}: tokenizer_class must be a name")
        code = settings.get("auto_map")
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        if code:
            self.notes.append(
                f"{self.folder / TOKENIZER_CONFIG_FILE}: auto_map names code of the repository for the tokenizer; it "
                "is not run"
            )
        model_type = config.get("model_type")
        usual = USUAL_CLASSES.get(model_type) if isinstance(model_type, str) else None
        if named is None and usual is None and not parsed and not self._file(_COMMON_MODEL):
            usual = "GPT2Tokenizer"
        self._class_name = (named if named is not None else usual or "").removesuffix("Fast")
        if self._class_name in OTHER_PIPELINES:
            raise TokenizerError(
                f"{self.folder}: its tokenizer is of the class {self._class_name}, which fastgpt2 does not have; "
                f"{_SAVE_REMEDY}"
            )
        if self._class_name in CODE_CLASSES:
            raise TokenizerError(
                f"{self.folder}: its tokenizer is of the class {self._class_name}, which is Python code of transformers"
                f"{NEEDS.get(self._class_name, '')} that fastgpt2 does not have; {_OTHER_REMEDY}"
            )
        if self._class_name == "LlamaTokenizer" and not code and parsed and parsed.mentions_bytes:
            return None
        return find_class(self._class_name)

    def _by_class(self, kind: TokenizerClass, parsed: TokenizerJson | None) -> tokenizers.Tokenizer:
        """Return the pipeline that a class builds of the files."""
        options = kind.options
        kind.vocabulary = self._vocabulary(kind, parsed)
        additional = kind.additional(options.values.get("additional_special_tokens"))
        if kind.raw:
            for name in kind.defaults:
                if options.values.get(name) is None:
                    options.values.pop(name, None)
        path, self.path = self.path, self.folder
        kind.special = collect_special_tokens(options, kind.defaults, additional, kind.mask_strips)
        self.path = path
        backend = kind.build()
        if parsed:
            if parsed.backend.post_processor is not None:
                backend.post_processor = parsed.backend.post_processor
            if "pad_token" not in kind.defaults:
                _take_padding(parsed, options, kind.special)
        return backend

    def _vocabulary(self, kind: TokenizerClass, parsed: TokenizerJson | None) -> Vocabulary:
        """Return the vocabulary of the first file that transformers would take for a class."""
        if parsed and not kind.raw:
            self.path = parsed.path
            return _vocabulary_of_json(kind, parsed)
        common = self._file(_COMMON_MODEL)
        paths = [common] if common else [self._file(name) for name in kind.files]
        found = [path for path in paths if path]
        if len(found) < len(paths):
            raise TokenizerError(self._missing(kind.files))
        self.path = found[0]
        if found[0].suffix == ".model":
            return _vocabulary_of_pieces(kind, found[0])
        for path in found:
            check_size(path)
        return Vocabulary(str(found[0]), str(found[-1]))

    def _pieces_file(self, kind: TokenizerClass | None) -> Path | None:
        """Return the path of the model of sentencepiece that a class takes, or None if there is none."""
        names = [_COMMON_MODEL, *(name for name in (kind.files if kind else ()) if name.endswith(".model"))]
        return next(filter(None, map(self._file, names)), None)

    def _as_it_is(
        self, parsed: TokenizerJson | None, options: Options, kind: TokenizerClass | None
    ) -> tuple[tokenizers.Tokenizer, SpecialTokens]:
        """Return the pipeline that one file describes as a whole, and the special tokens, some of which a class has."""
        usual, strips = (kind.defaults, kind.mask_strips) if kind else ({}, False)
        if parsed:
            self.path = parsed.path
            special = collect_special_tokens(options, usual, options.values.get("additional_special_tokens"), strips)
            if "pad_token" not in usual:
                _take_padding(parsed, options, special)
            return parsed.backend, special
        path = self._pieces_file(kind)
        if path is None:
            raise TokenizerError(self._missing((TOKENIZER_FILE,)))
        from fastgpt2.engine.text.sentencepiece import UNIGRAM, pipeline

        model = _read_pieces(path)
        if kind:
            model.model_type = UNIGRAM
        names = {index: token.content for index, token in options.declared.items()}
        backend = pipeline(model, options.flag("legacy", True), names)
        defaults = {
            name: piece
            for name, index, piece in (
                ("bos_token", model.bos_id, model.bos_piece or "<s>"),
                ("eos_token", model.eos_id, model.eos_piece or "</s>"),
                ("unk_token", model.unk_id, model.unk_piece or "<unk>"),
            )
            if index >= 0
        }
        controls = [token for token in model.added_tokens() if token.special]
        if model.add_dummy_prefix:
            options.declared = {index: as_raw(token) for index, token in options.declared.items()}
        return backend, collect_special_tokens(options, {**usual, **defaults}, controls, strips)

    def _cleans_up(self, backend: tokenizers.Tokenizer, options: Options, kind: TokenizerClass | None) -> bool:
        """Tell whether spaces before punctuation are taken out of the text: not those of a BPE, unless forced."""
        if not options.values.get("clean_up_tokenization_spaces"):
            return False
        if type(backend.model).__name__ != "BPE" or (kind is not None and kind.raw):
            return True
        return bool(options.values.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))

    def _missing(self, needed: tuple[str, ...]) -> str:
        """Return the sentence on a folder that lacks the files of its tokenizer's class."""
        name = f"{self._class_name:.60}".encode("ascii", "replace").decode() or "of no class"
        lacks = f"neither {TOKENIZER_FILE} nor {' with '.join(needed)}"
        lacks = f"no {TOKENIZER_FILE}" if TOKENIZER_FILE in needed else lacks
        there = dict.fromkeys(name for names in TOKENIZER_SETS for name in names if (self.folder / name).is_file())
        if not there:
            return f"{self.folder}: holds {lacks}; {_OTHER_REMEDY}"
        return (
            f"{self.folder}: holds {lacks}, which its tokenizer needs ({name}), but "
            f'{" and ".join(there)}; if it is of another class, put "tokenizer_class" with the name of that into '
            f"{TOKENIZER_CONFIG_FILE}, or {_OTHER_REMEDY}"
        )


def _read_pieces(path: Path) -> SentencePieceModel:
    """Read a model of sentencepiece; raise TokenizerError, which tells a vocabulary of tiktoken by its first line."""
    from fastgpt2.engine.text.sentencepiece import parse_sentencepiece

    data = read_bytes(path)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n", data):
        raise TokenizerError(f"{path}: a vocabulary of tiktoken, which fastgpt2 does not read; {_SAVE_REMEDY}")
    return parse_sentencepiece(data, path)


def _vocabulary_of_pieces(kind: TokenizerClass, path: Path) -> Vocabulary:
    """Return the vocabulary that a class makes of a model of sentencepiece."""
    from fastgpt2.engine.text.sentencepiece import merges_by_id

    model = _read_pieces(path)
    if kind.raw:
        return Vocabulary([], source=model)
    kind.options.values["additional_special_tokens"] = model.added_tokens()
    if kind.model == "BPE":
        ids = model.ids()
        return Vocabulary(kind.arrange_ids(ids), merges_by_id(ids), charsmap=model.charsmap, source=model)
    return Vocabulary(kind.arrange(model.scores()), charsmap=model.charsmap, source=model)


def _vocabulary_of_json(kind: TokenizerClass, parsed: TokenizerJson) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json: as the library has parsed it, where that is what the class wants."""
    model: Any = parsed.backend.model
    whole = kind.whole and type(model).__name__ == kind.model
    if whole and (kind.model != "BPE" or not (model.continuing_subword_prefix or model.end_of_word_suffix)):
        return Vocabulary([], parsed=model, charsmap=parsed.charsmap)
    fields = parsed.model()
    tokens = fields.get("vocab")
    if isinstance(tokens, list):
        if kind.model in ("BPE", "WordPiece"):
            tokens = {token[0] if isinstance(token, list) else token: index for index, token in enumerate(tokens)}
        else:
            tokens = [tuple(token) for token in tokens]
    if not isinstance(tokens, (dict, list)):
        raise TokenizerError(f"{parsed.path}: model has no vocab")
    merges = fields.get("merges") if kind.model == "BPE" else None
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges or []]
    return Vocabulary(tokens, pairs, charsmap=parsed.charsmap)


def _take_padding(parsed: TokenizerJson, options: Options, special: SpecialTokens) -> None:
    """Take the padding token that tokenizer.json has, unless the small files name one."""
    padding = parsed.backend.padding
    if padding and "pad_token" not in options.values:
        special.named["pad_token"] = padding["pad_token"]
