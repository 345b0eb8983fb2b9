# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Make `chats.json`: the prompts that transformers makes of chats by templates of the kinds that models have.

    oracle/bin/python tests/golden/make_chats.py [FILE]

The environment is that of `make_golden.py`, with jinja2. The tokenizer is GPT-2's own with the special tokens of
`TOKENIZER_CONFIG`. For each template and chat there is the text and its ids, or `null` where transformers refuses it.
The templates, in `chat_templates/`, are written for this, each after a kind that is common on the hub.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent

TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|im_start|>"],
}

TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted((HERE / "chat_templates").glob("*.jinja"))}

HELLO = [{"role": "user", "content": "Hello, how are you?"}]
TALK = [
    {"role": "system", "content": "You are a pirate.  "},
    {"role": "user", "content": " What is your name? "},
    {"role": "assistant", "content": "Arr, they call me Größe 日本 😀\n"},
    {"role": "user", "content": "And where do you live?<|im_end|>"},
]
ANSWERED = [*HELLO, {"role": "assistant", "content": "I am fine, and "}]
CALLED = [
    {"role": "user", "content": "What is the weather?", "name": "Ann"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <&> 'x'"}}}
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
DOCUMENTS = [{"title": "one", "text": "First."}, {"title": "two", "text": "Second."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
    {"role": "assistant", "content": "Three."},
]

CHATS: dict[str, dict[str, Any]] = {
    "hello": {"messages": HELLO, "add_generation_prompt": True},
    "hello, no generation prompt": {"messages": HELLO, "add_generation_prompt": False},
    "talk": {"messages": TALK, "add_generation_prompt": True},
    "to be continued": {"messages": ANSWERED, "continue_final_message": True},
    "to be continued, after a talk": {
        "messages": [*TALK[1:], {"role": "assistant", "content": "In a"}],
        "continue_final_message": True,
    },
    "tools": {"messages": CALLED, "add_generation_prompt": True, "tools": TOOLS},
    "documents": {"messages": HELLO, "add_generation_prompt": True, "documents": DOCUMENTS},
    "thoughts": {
        "messages": [*HELLO, {"role": "assistant", "content": "Fine.", "reasoning": "They ask how I am."}, *HELLO],
        "add_generation_prompt": True,
        "chat_template_kwargs": {"enable_thinking": False, "eos_token": "<END>"},
    },
    "roles": {
        "messages": [{"role": "developer", "content": "Be short."}, *HELLO, {"role": "stop", "content": "never"}],
        "add_generation_prompt": True,
    },
}
# Lists of parts stay lists for transformers, and only templates that read them make sense of them.
OF_PARTS = {"parts": {"messages": PARTS, "add_generation_prompt": True}}


def answer(tokenizer: Any, template: str, chat: dict[str, Any]) -> dict[str, Any] | None:
    """Return the text and the ids that transformers makes of a chat; None if it refuses the chat."""
    options = {name: value for name, value in chat.items() if name not in ("messages", "chat_template_kwargs")}
    options |= chat.get("chat_template_kwargs", {})
    try:
        text = tokenizer.apply_chat_template(chat["messages"], chat_template=template, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(chat["messages"], chat_template=template, return_dict=False, **options)
    except Exception:
        return None
    return {"text": text, "ids": ids}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_bytes(gzip.decompress((HERE / "gpt2-tokenizer.json.gz").read_bytes()))
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = []
    for template, source in TEMPLATES.items():
        chats = CHATS | (OF_PARTS if template == "parts" else {})
        cases += [
            {"template": template, "chat": chat, "answer": answer(tokenizer, source, fields)}
            for chat, fields in chats.items()
        ]
    golden = {
        "tokenizer_config": TOKENIZER_CONFIG,
        "special_texts": tokenizer.special_tokens_map,
        "chats": CHATS | OF_PARTS,
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "chats.json"
    # A line for each case.
    head = json.dumps(golden, ensure_ascii=False, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    path.write_text(f'{head},\n "cases": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
