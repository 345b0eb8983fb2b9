# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Make `chats.json`: the prompts that transformers makes of chats by templates of the kinds that models have.

    oracle/bin/python tests/golden/make_chats.py [FILE]

The environment is that of `make_golden.py`, with jinja2. The tokenizer is GPT-2's own with the special tokens of
`TOKENIZER_CONFIG`. For each template and chat there is the text and its ids, or `null` where transformers refuses it.
For some there are also the tokens with which the shipped model goes on, greedily, until a token of `ENDS`.
The templates, in `chat_templates/`, are written for this, each after a kind that is common on the hub.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

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


# Of the shipped model: what ends an answer, by its generation_config.json, and who is asked.
ENDS = [0, 14]
ASKED = {"human-and-assistant": ("hello", "talk", "to be continued"), "tools-as-json": ("tools",)}
NEW_TOKENS = 24


def continuations() -> list[dict[str, Any]]:
    """Return the tokens with which the shipped model goes on after some chats; two that are near a tie are none."""
    folder = HERE.parent.parent / "fastgpt2" / "models" / "demo"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder)
    found = []
    for template, chats in ASKED.items():
        for chat in chats:
            asked = answer(tokenizer, TEMPLATES[template], CHATS[chat])
            assert asked is not None
            ids = asked["ids"]
            made = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ENDS, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            for logits in made.logits:
                first, second = logits[0].topk(2).values.tolist()
                assert first - second > 1e-3, "a near tie: ask for another chat"
            new = made.sequences[0][len(ids) :].tolist()
            found.append({"template": template, "chat": chat, "ids": ids, "new": new})
    return found


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
        "ends": ENDS,
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "chats.json"
    # A line for each case.
    head = json.dumps(golden, ensure_ascii=False, indent=1).removesuffix("\n}")
    lists = {"cases": cases, "continuations": continuations()}
    parts = [f' "{name}": [\n' + ",\n".join(map(to_json, rows)) + "\n ]" for name, rows in lists.items()]
    path.write_text(",\n".join([head, *parts]) + "\n}\n", "utf-8")


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
