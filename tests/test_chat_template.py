"""Chat templates: the same text as transformers, in a sandbox, with errors that a caller can use."""

from __future__ import annotations

import pytest

from nbengine.chat_template import ChatTemplate, validate_messages
from nbengine.errors import InvalidRequest, UnsupportedModel
from tests.smollm2 import smollm2_tokenizer

USER = [{"role": "user", "content": '2 < 3 & "é"?'}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]

LLAMA = """
{%- set system_message = "" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {{- "<|start|>" + message.role + "\\n\\n" + message["content"] | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant\\n\\n" }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
  {% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]
  {% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
  {% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
  {% endif %}
{% endfor %}"""
BLOCKS = """{% for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {# a comment #}
{{ loop.index }}: {{ m.content }}
{% endfor %}
{% generation %}<x>{% endgeneration %}
"""
TOOLS = """{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}{% endfor %}{{ messages[0].content | tojson }}"""
NAMESPACE = """{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}{%- set ns.n = ns.n + m.content | length -%}{%- endfor -%}
{{ ns.n }} {{ undefined_name }}{{ strftime_now('%Y') | length }} {{ enable_thinking is defined }}"""


@pytest.mark.parametrize("messages", [USER, TALK], ids=["one", "talk"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "source", [LLAMA, MISTRAL, BLOCKS, TOOLS, NAMESPACE, "smollm2"], ids=range(6)
)
def test_rendered_text_equals_that_of_transformers(source, messages, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    if source == "smollm2":
        source = smollm2_tokenizer()._default_template.source
    if source == MISTRAL:
        messages = [m for m in messages if m["role"] != "system"]
    tools = [{"type": "function", "function": {"name": "f<&>", "description": "é"}}]
    names = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools, "enable_thinking": False}
    expected, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt, **names
    )
    text = ChatTemplate(source).render(messages, add_generation_prompt=prompt, **names)
    assert text == expected[0]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_can_not_leave_the_sandbox(attack):
    with pytest.raises(InvalidRequest):
        ChatTemplate(attack).render(USER)


def test_the_attr_filter_finds_nothing_private():
    source = "{{ ('' | attr('__class__')) | attr('__mro__') }}{{ ''.__class__ }}"
    assert ChatTemplate(source).render(USER) == ""


def test_rendering_changes_no_message_of_the_caller():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].clear() }}").render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_what_a_template_refuses_is_said_in_its_own_words():
    with pytest.raises(InvalidRequest, match="Only user and assistant roles are supported!"):
        ChatTemplate(MISTRAL).render([{"role": "system", "content": "x"}])


def test_an_expression_that_fails_is_an_invalid_request_too():
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate("{{ 1 + messages[0].content }}").render(USER)


def test_a_template_that_can_not_be_parsed_names_its_line():
    with pytest.raises(UnsupportedModel, match="line 2"):
        ChatTemplate("a\n{% for %}")


def test_text_parts_are_joined_with_line_breaks():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert validate_messages([{"role": "user", "content": parts}]) == [
        {"role": "user", "content": "a\nb"}
    ]


def test_other_fields_of_a_message_reach_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert ChatTemplate("{{ messages[0].tool_calls[0].name }}").render([call]) == "f"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hello", "list of dicts"),
        ({"role": "user", "content": "x"}, "list of dicts"),
        (None, "NoneType"),
        (["hello"], "message 0 must be a dict"),
        ([*USER, {"content": "x"}], "message 1 has the role None"),
        ([{"role": "root", "content": "x"}], "'root'; roles are system"),
        ([{"role": ["user"], "content": "x"}], "message 0 has the role"),
        ([{"role": "user"}], "content of type NoneType"),
        ([{"role": "user", "content": 5}], "content of type int"),
        ([{"role": "user", "content": b"x"}], "content of type bytes"),
        ([{"role": "user", "content": ["x"]}], "part 0 must be a dict"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text of type NoneType"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "part 0 has the type 'image_url'",
        ),
    ],
)
def test_malformed_messages_are_refused_by_place(messages, words):
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate("x").render(messages)
