"""The tokenizer that the files of a model's folder describe, as transformers' `AutoTokenizer` would load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt2.engine.model.config import MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

# Far beyond any GPT-2 vocabulary: a larger file is damaged, or made to do harm.
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer as it was loaded from a folder.

    Attributes:
        backend: the pipeline, with the post-processor, the decoder and the added tokens that transformers gives it.
        clean_up: whether transformers would run its `clean_up_tokenization` over decoded text.
        eos_token_id: the tokenizer's own end-of-sequence token, or None.
        bos_token_id: the tokenizer's own beginning-of-sequence token, or None.
        notes: sentences for people on what was passed over.
    """

    backend: tokenizers.Tokenizer
    clean_up: bool = False
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    notes: tuple[str, ...] = ()


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model's folder.

    Raises:
        TokenizerError: there is none, or what is there cannot be read.
    """
    import tokenizers

    path = folder / TOKENIZER_FILE
    try:
        if path.exists():
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise TokenizerError(f"{path}: {path.stat().st_size} bytes; the limit is {MAX_TOKENIZER_BYTES}")
            return LoadedTokenizer(tokenizers.Tokenizer.from_file(str(path)))
        path = folder / VOCAB_FILE
        if path.exists() and (folder / MERGES_FILE).exists():
            return LoadedTokenizer(_from_vocab_and_merges(path, folder / MERGES_FILE))
    except TokenizerError:
        raise
    except Exception as reason:  # the library raises plain Exception for whatever its parser meets
        raise TokenizerError(f"{path}: not a tokenizer that can be read ({reason})") from None
    raise TokenizerError(f"{folder}: holds neither {TOKENIZER_FILE} nor {VOCAB_FILE} with {MERGES_FILE}")


def _from_vocab_and_merges(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Build GPT-2's tokenizer from the two files that older repositories have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=True)])
    return backend
