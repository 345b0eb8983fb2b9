"""The reader of prompts: from what a request asks to tokens that the model has."""

from __future__ import annotations

from collections.abc import Iterable

from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.generation_config import GenerationConfig
from fastgpt2.engine.text.chat_template import ChatTemplate
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, PromptTooLong


class PromptReader:
    """Makes tokens of prompts and chats, and of what else a request says in words.

    Args:
        generation: which tokens begin and end a text.
        chat_template: what makes prompts of chats.
    """

    def __init__(
        self, tokenizer: Tokenizer, generation: GenerationConfig, chat_template: ChatTemplate, config: GPT2Config
    ) -> None:
        self._tokenizer, self._generation = tokenizer, generation
        self._chat_template, self._config = chat_template, config

    def tokenize(self, request: GenerationRequest) -> tuple[GenerationRequest, list[int]]:
        """Return a request, and the tokens of its prompt. If not all are kept, those that are become the prompt.

        So do the tokens of a chat: its template has said which special tokens stand in it and around it.
        """
        most = request.most_prompt_tokens(self._config.n_positions)
        if request.messages is not None:
            ids = self._tokenize_chat(request)
            ids, is_cut = ids if most is None else ids[-most:], True
            self._check_text(ids)
        elif isinstance(request.prompt, str):
            ids, is_cut = self._tokenizer.encode_last(request.prompt, most)
            self._check_text(ids)
        else:
            ids = list(request.prompt if most is None else request.prompt[-most:])
            is_cut = len(ids) < len(request.prompt)
            self.check_ids("prompt", ids)
        if is_cut:
            request = request.with_tokens(ids)
        return request, ids or [self._generation.start_token_id]

    def _tokenize_chat(self, request: GenerationRequest) -> list[int]:
        """Return the tokens of the prompt that the chat template makes of a request's messages."""
        values = {**self._tokenizer.special_texts, **request.template_values()}
        text = self._chat_template.render(values, request.continue_final_message)
        least, n_positions = self._tokenizer.least_tokens(text), self._config.n_positions
        if request.truncate_prompt_tokens is None and least + request.least_room > n_positions:
            # Whoever waits for the next step would wait while it is tokenized.
            limit = request.describe_positions(n_positions)
            raise PromptTooLong(f"prompt tokens {least} or more, over {limit}: leave out the oldest messages")
        return self._tokenizer.encode_part(text)

    def _check_text(self, ids: Iterable[int]) -> None:
        """Raise BadRequest if the tokenizer has read a prompt as a token that the model does not have."""
        vocab_size = self._config.vocab_size
        for token_id in ids:
            if token_id >= vocab_size:
                raise BadRequest(
                    f"the tokenizer reads {self._tokenizer.token_text(token_id)!r} in the prompt as token {token_id}, "
                    f"and the model's vocabulary has {vocab_size}: leave that out of the prompt"
                )

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raise BadRequest if a field of a request holds a token id that the model does not have."""
        vocab_size = self._config.vocab_size
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise BadRequest(
                f"{field} holds token id {largest}, and the model's vocabulary has {vocab_size}: "
                f"give ids from 0 to {vocab_size - 1}"
            )

    def bad_words(self, request: GenerationRequest, eos_token_ids: Iterable[int]) -> list[tuple[int, ...]]:
        """Return the tokens of a request's bad words.

        A string is banned as it stands, and behind a space, as in vLLM. The model's own end of a text is never banned
        by itself, as in transformers.
        """
        words = dict[tuple[int, ...], None]()
        for word in request.bad_words or ():
            if isinstance(word, str):
                spellings = word, f" {word.lstrip()}"
                words.update(dict.fromkeys(tuple(self._tokenizer.encode_part(spelling)) for spelling in spellings))
            else:
                self.check_ids("bad_words", word)
                words[word] = None
        ends = {(token_id,) for token_id in (*self._generation.eos_token_ids, *eos_token_ids)}
        return [word for word in words if word and word not in ends]

    def offsets(self, request: GenerationRequest, ids: list[int]) -> list[int]:
        """Return where in the prompt's text its tokens begin, for `prompt_logprobs`; [] without them."""
        if request.prompt_logprobs is None:
            return []
        if isinstance(request.prompt, str):
            return self._tokenizer.offsets(request.prompt) or [0]
        detokenizer, length, offsets = self._tokenizer.detokenizer(), 0, list[int]()
        for token_id in ids:
            # What was held back may have come out shorter than it was.
            offsets.append(max([length + detokenizer.begin(token_id), *offsets[-1:]]))
            length += len(detokenizer.push(token_id))
        return offsets

    def eos_token_ids(self, request: GenerationRequest) -> frozenset[int]:
        """Return the model's own tokens that end a text, unless the request tells to pass over them.

        A message of a chat also ends with the tokenizer's own end-of-text token, as from vLLM: chat models are
        published whose other files do not name the token that their template puts behind each message.
        """
        if request.ignore_eos:
            return frozenset()
        of_tokenizer = self._tokenizer.eos_token_id
        if request.messages is None or of_tokenizer is None or of_tokenizer >= self._config.vocab_size:
            return frozenset(self._generation.eos_token_ids)
        return frozenset((*self._generation.eos_token_ids, of_tokenizer))
