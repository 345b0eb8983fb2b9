"""Chats become prompts as transformers makes them, whatever the template is, and whatever it tries."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.chat_options import CHAT_FIELDS, MAX_CHAT_BYTES
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text import chat_template
from fastgpt2.engine.text.chat_template import ChatTemplate, find_sources, load_chat_template
from fastgpt2.engine.text.template_renderer import MAX_RENDERED_BYTES, Renderer
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, ConfigError, NoChatTemplate, PromptTooLong

ORACLE: dict[str, Any] = json.loads((GOLDEN / "chats.json").read_text("utf-8"))
TEMPLATES = {path.stem: path.read_text("utf-8") for path in (GOLDEN / "chat_templates").glob("*.jinja")}
HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    packed = (GOLDEN / "gpt2-tokenizer.json.gz").read_bytes()
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed))
    (folder / "tokenizer_config.json").write_text(json.dumps(ORACLE["tokenizer_config"]))
    return Tokenizer.from_folder(folder)


def rendered(source: str, messages: Any, continues: bool = False, **values: Any) -> str:
    """What a template makes of messages, or "!" and what is said."""
    renderer = Renderer()
    answer = renderer.answer({"sources": {"default": source}})
    if "error" not in answer:
        given = {"messages": deepcopy(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        answer = renderer.answer({"name": "default", "values": {**given, **values}, "continues": continues})
    return answer["text"] if "text" in answer else f"!{answer['error']}"


# --------------------------------------------------------------------------------- as transformers has it


def test_templates_have_the_special_tokens_by_their_names(tokenizer: Tokenizer) -> None:
    assert dict(tokenizer.special_texts) == ORACLE["special_texts"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_chat_becomes_what_transformers_makes_of_it(name: str, tokenizer: Tokenizer) -> None:
    renderer = Renderer()
    assert renderer.answer({"sources": {"default": TEMPLATES[name]}}) == {"text": ""}
    for case in (case for case in ORACLE["cases"] if case["template"] == name):
        request = GenerationRequest(**ORACLE["chats"][case["chat"]])
        values = {**tokenizer.special_texts, **deepcopy(request.template_values())}
        got = renderer.answer({"name": "default", "values": values, "continues": request.continue_final_message})
        if case["answer"] is None:
            assert "error" in got, case["chat"]
        else:
            assert got["text"] == case["answer"]["text"], case["chat"]
            assert tokenizer.encode_part(got["text"]) == case["answer"]["ids"]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The shipped model with two templates, a comma as the end of its tokenizer's texts, and ends of its own."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).symlink_to(DEMO_FOLDER / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ORACLE["ends"]}))
    (folder / "chat_template.jinja").write_text(TEMPLATES["human-and-assistant"])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATES["tools-as-json"])
    engine = Engine.load(folder, max_batch=1, prefix_memory=0, drafts="off")
    assert engine.chats
    yield engine
    engine.decoder.close()


@pytest.mark.processes
@pytest.mark.parametrize("case", ORACLE["continuations"], ids=lambda case: case["chat"])
def test_an_answer_is_the_one_that_transformers_generates(case: dict[str, Any], chatting: Engine) -> None:
    got = chatting.generate(ORACLE["chats"][case["chat"]], max_new_tokens=24)
    assert list(got.token_ids) == case["new"]
    assert got.usage.prompt_tokens == len(case["ids"])
    assert got.finish_reason == ("stop" if case["new"][-1] in ORACLE["ends"] else "length")


@pytest.mark.processes
def test_the_tokenizers_own_end_ends_an_answer_and_no_other_text(chatting: Engine, monkeypatch: Any) -> None:
    case = ORACLE["continuations"][0]
    end = case["new"][5]
    monkeypatch.setattr(chatting.tokenizer, "eos_token_id", end)
    got = chatting.generate(ORACLE["chats"]["hello"], max_new_tokens=24)
    assert (list(got.token_ids), got.finish_reason, got.stop_reason) == (case["new"][:6], "stop", None)
    on = chatting.generate({**ORACLE["chats"]["hello"], "ignore_eos": True}, max_new_tokens=24)
    assert list(on.token_ids) == case["new"] == list(chatting.generate(case["ids"], max_new_tokens=24).token_ids)


@pytest.mark.processes
def test_an_answer_has_all_room_unless_it_is_told_otherwise(chatting: Engine) -> None:
    request = {"messages": HELLO, "ignore_eos": True}
    got = chatting.generate(request)
    assert (got.usage.total_tokens, got.finish_reason) == (chatting.config.n_positions, "length")
    assert chatting.generate({**request, "max_new_tokens": 3, "truncate_prompt_tokens": 4}).usage.prompt_tokens == 4
    echoed = chatting.generate({**request, "max_new_tokens": 1, "echo": True, "prompt_logprobs": 0})
    assert echoed.text.startswith("\n\nHuman: Hello\n\nAssistant:")
    assert echoed.prompt_logprobs is not None
    assert len(echoed.prompt_logprobs) == echoed.usage.prompt_tokens
    with pytest.raises(PromptTooLong, match="leave out the oldest messages"):
        chatting.generate([{"role": "user", "content": "word " * 100_000}])


# ------------------------------------------------------------------------------------------ forms of a content


def test_parts_are_joined_for_templates_that_read_strings() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]}]
    assert rendered(PLAIN, parts) == "One\ntwo"
    assert rendered("{{ messages | tojson }}", parts) == '[{"role": "user", "content": "One\\ntwo"}]'
    alone = "{% for message in messages %}{% for part in message.content %}{{ part.text }};{% endfor %}{% endfor %}"
    assert rendered(alone, parts) == "One;two;"
    assert rendered(alone, HELLO) == "Hello;"
    assert rendered(alone, [{"role": "user", "content": "One "}], continues=True) == "One "


def test_what_the_record_makes_of_messages() -> None:
    class Made:
        def model_dump(self) -> dict[str, Any]:
            return {"role": "assistant", "content": None, "refusal": "No.", "audio": None}

    content = ["a", {"type": "input_text", "text": "b", "cache_control": {}}, {"type": "refusal", "refusal": "c"}]
    given = [Made(), {"role": "user", "content": content, "name": None}]
    request = GenerationRequest(messages=given)  # type: ignore[arg-type]
    assert request.messages == (
        {"role": "assistant", "refusal": "No."},
        {"role": "user", "content": [{"type": "text", "text": text} for text in "abc"]},
    )
    assert request.template_values() == {
        "messages": list(request.messages), "tools": None, "documents": None, "add_generation_prompt": True,
    }  # fmt: skip
    assert GenerationRequest(messages=HELLO, continue_final_message=True).adds_generation_prompt is False  # type: ignore[arg-type]
    assert request.given == {"messages": request.messages}
    assert request.with_tokens([1, 2]) == GenerationRequest((1, 2))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": "Hello"}, 'messages must be a list of messages, such as [{"role": "user", "content": "Hello"}]'),
        ({"messages": []}, "messages is an empty list: give at least one message"),
        ({"messages": ["Hello"]}, "messages[0] must be an object"),
        ({"messages": [{"content": "a"}]}, "messages[0].role must be a string of 1 to 64 characters"),
        ({"messages": [{"role": "r" * 65, "content": "a"}]}, "messages[0].role must be a string of 1 to 64"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content is missing: give a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string, or a list of parts"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0] must be an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0] is of the type 'image_url'; GPT-2 reads text alone: leave that part out",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text must be"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages is not valid Unicode: lone surrogate U+D800"),
        ({"messages": [{"role": "user", "content": "a", "x": object()}]}, "messages is no JSON"),
        ({"messages": [{"role": "user", "content": "a", "x": float("nan")}]}, "messages is no JSON"),
        ({"messages": HELLO * 5000}, "messages holds 5000 messages; the limit is 4096"),
        ({"messages": [{"role": "user", "content": "a" * MAX_CHAT_BYTES}]}, "bytes of JSON; the limit is 1048576"),
        ({"messages": HELLO, "prompt": "a"}, "prompt and messages are both given"),
        ({"prompt": "a", "tools": [{}]}, "tools goes with messages, and there are none"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt goes with messages"),
        (
            {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message are both true",
        ),
        ({"messages": HELLO, "tools": [5]}, "tools[0] must be an object"),
        ({"messages": HELLO, "documents": {}}, "documents must be a list of documents"),
        ({"messages": HELLO, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs holds tools, which is a"),
        ({"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}}, "a template comes with the model"),
        ({"messages": HELLO, "chat_template_kwargs": {"a b": 1}}, "no name that a template could have"),
        ({"messages": HELLO, "chat_template": "x"}, "chat_template is refused: a chat template comes with the model"),
    ],
)
def test_what_is_no_chat_is_told_by_a_sentence(engine: Engine, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        engine.generate(fields)
    assert said in str(caught.value)


def test_one_message_or_one_chat_in_the_wrong_place_is_told(engine: Engine) -> None:
    for prompts, said in (
        (HELLO[0], 'write [{"messages": [message]}]'),
        ([HELLO, HELLO[0]], 'write {"messages": [message]}'),
    ):
        with pytest.raises(BadRequest) as caught:
            engine.generate(prompts)  # type: ignore[arg-type]
        assert said in str(caught.value)


def test_a_model_without_a_template_says_so(engine: Engine) -> None:
    assert not engine.chats
    said = r"no chat template: continue prompts .* on the command line without --chat.*--chat-template FILE"
    for chat in (HELLO, {"messages": HELLO}, [HELLO, {"messages": HELLO}]):
        with pytest.raises(NoChatTemplate, match=said) as caught:
            engine.generate(chat)  # type: ignore[arg-type]
    assert "a chat whose last message is 'Hello'" in caught.value.__notes__[0]
    assert engine.generate({"prompt": "Hello", "chat_template_kwargs": {}, "tools": []}, max_new_tokens=1).token_ids
    assert CHAT_FIELDS[0] == "messages"


# ------------------------------------------------------------------------------------------------- the files


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert find_sources(tmp_path) == ({}, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert find_sources(tmp_path) == ({"default": "of a processor"}, tmp_path / "chat_template.json")
    settings = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "first"}, {"name": "rag", "template": "second"}]
    for value, found in (("one", {"default": "one"}), (named, {"default": "first", "rag": "second"})):
        settings.write_text(json.dumps({"chat_template": value}))
        assert find_sources(tmp_path) == (found, settings)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    assert find_sources(tmp_path)[0] == {"tool_use": "with tools"}
    (tmp_path / "chat_template.jinja").write_text("alone")
    found, where = find_sources(tmp_path)
    assert (found, where.name) == ({"tool_use": "with tools", "default": "alone"}, "chat_template.jinja")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("chat_template.jinja", b"\xff", "is not UTF-8 (byte 0)"),
        ("chat_template.jinja", b"a" * 300_000, "300000 bytes; a file of this kind has at most 262144"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a string, or a list of objects"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}', "chat_template must be a string, or a list"),
        ("tokenizer_config.json", b'{"chat_template": "', "is not JSON"),
        ("tokenizer_config.json", b'{"chat_template": "%s"}' % (b"a" * 300_000), "300000 characters"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": f"t{n}", "template": ""} for n in range(17)]}).encode(),
            "has 17 chat templates; the limit is 16",
        ),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": ""}]}', "rag none is the default"),
    ],
)
def test_a_models_template_that_cannot_be_used_is_a_note(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    template = load_chat_template(tmp_path)
    note = "".join(template.notes)
    assert said in note
    assert note.startswith(str(tmp_path / name))
    with pytest.raises(NoChatTemplate) as caught:
        template.render({"messages": HELLO}, False)
    assert str(caught.value) == note == template.objection


def test_without_jinja2_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    monkeypatch.setattr(chat_template, "find_spec", lambda _name: None)
    assert "pip install 'fastgpt2[chat]'" in load_chat_template(tmp_path).objection


def test_a_template_that_is_given_must_be_good(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the chat template .*none\.jinja: no such file"):
        load_chat_template(tmp_path, str(tmp_path / "none.jinja"))


@pytest.mark.processes
def test_a_given_template_is_taken_before_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "given.jinja").write_text(PLAIN)
    template = load_chat_template(tmp_path, str(tmp_path / "given.jinja"))
    assert template.render({"messages": HELLO}, False) == "Hello"
    template.close()
    (tmp_path / "given.jinja").write_text("{% for")
    with pytest.raises(ConfigError, match=r"given\.jinja: the chat template is no template \(TemplateSyntaxError"):
        load_chat_template(tmp_path, str(tmp_path / "given.jinja"))


# ------------------------------------------------------------------------------------------- hostile templates


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('Only\none') }}", "!refuses these messages: Only one"),
        ("{{ raise_exception('a' * 5000) }}", "!refuses these messages: " + "a" * 300),
        ("{{ nothing.at.all }}", "!cannot render these messages (UndefinedError: 'nothing' is undefined)"),
        ("{{ 1 // 0 }}", "!cannot render these messages (ZeroDivisionError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "!cannot render these messages (SecurityError"),
        ("{{ cycler.__init__.__globals__.os }}", "!cannot render these messages (SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(()) }}", "!cannot render these messages (SecurityError"),
        ("{{ ('%s' | attr('format'))(1) }}{{ dict.mro() }}", "!cannot render these messages"),
        ("{% set x = namespace(_a=1) %}", "!cannot render these messages (SecurityError"),
        ("{% set x = namespace() %}{% set x._a = 1 %}", "!cannot render these messages (SecurityError"),
        ("{% do messages.clear() %}", "!is no template (TemplateSyntaxError"),
        ("{% set x = messages.clear() %}", "!cannot render these messages (SecurityError"),
        ("{% include '/etc/passwd' %}", "!cannot render these messages (TypeError: no loader"),
        ("{% for a in range(10 ** 6) %}{% endfor %}", "!cannot render these messages (OverflowError"),
        ("{% for a in range(9999) %}{{ 'a' * 999 }}{% endfor %}", f"!makes more than {MAX_RENDERED_BYTES} bytes"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "!cannot render these messages (RecursionError"),
        ("{{ strftime_now('%Y') | length }}{{ dict(a=1) }}{{ dict.fromkeys('a') }}", "4{'a': 1}{'a': None}"),
    ],
)
def test_what_a_template_may_not_do(source: str, said: str) -> None:
    assert rendered(source, HELLO).startswith(said)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ messages | length }}", HELLO),
        (PLAIN, [{"role": "user", "content": ""}]),
        ("{{ messages[0].role }}{# content #}", HELLO),
    ],
)
def test_what_cannot_be_continued_is_told(source: str, messages: Any) -> None:
    assert "nothing to continue" in rendered(source, messages, continues=True)


@pytest.mark.processes
def test_a_template_without_end_ends_with_its_process() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    if_told = ChatTemplate({"default": f"{{% if messages[0].content == 'go' %}}{loop}{{% endif %}}ok"})
    assert not if_told.objection
    with pytest.raises(BadRequest, match="takes more than 1 s of computing or 256 MB for these messages"):
        if_told.render({"messages": [{"role": "user", "content": "go"}]}, False)
    assert if_told.render({"messages": HELLO}, False) == "ok"
    if_told.close()
    bomb = "{% set ns = namespace(x='a' * 99) %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    assert "takes more than" in ChatTemplate({"default": bomb}, "here").objection
