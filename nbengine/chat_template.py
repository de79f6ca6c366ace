"""Chat templates: a model's own Jinja text, rendered in a sandbox.

`Tokenizer.apply_chat_template` is the only caller. A template comes with downloaded weights and is
somebody else's program, so it runs in Jinja's immutable sandbox: no attribute beginning with an
underscore, no method that changes an argument, no long range. The names and settings around it are
those that templates on the hub are written for, and the rendered text equals transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nbengine.errors import InvalidRequest, UnsupportedModel, shown

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Raises `UnsupportedModel` for a template that Jinja can't parse."""
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise UnsupportedModel(
                f"the model's chat template can't be parsed, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model was trained on, up to where its answer
        begins if `add_generation_prompt`. `variables` are further names for the template.

        Raises `InvalidRequest` for malformed messages, and with the template's own words where the
        template refuses them.
        """
        conversation = validate_messages(messages)
        try:
            return self._template.render(
                **variables, messages=conversation, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may fail in every way that an expression can
            raise InvalidRequest(f"the model's chat template refused: {error}") from error


def validate_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as dicts of their own whose `content` is a string (parts of type "text" are
    joined with line breaks) or, where a message calls tools instead of speaking, None.

    Raises `InvalidRequest` that says which message is wrong and how.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            f"messages must be a list of dicts with role and content, not {type(messages).__name__}"
        )
    if not messages:
        raise InvalidRequest("messages is empty: a conversation needs at least one message")
    return [_validated(message, f"message {index}") for index, message in enumerate(messages)]


def _validated(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{name} must be a dict, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"{name} has the role {shown(role)}; roles are {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "\n".join(_text_of(part, f"{name}, part {i}") for i, part in enumerate(content))
    elif content is None and message.get("tool_calls"):
        pass
    elif not isinstance(content, str):
        raise InvalidRequest(
            f"{name} has content of type {type(content).__name__}; it must be a string or a list "
            'of {"type": "text", "text": ...} parts'
        )
    return {**message, "content": content}


def _text_of(part: Any, name: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{name} must be a dict, not {type(part).__name__}")
    if part.get("type") != "text":
        raise InvalidRequest(
            f"{name} has the type {shown(part.get('type'))}; this engine reads parts of type "
            '"text" only'
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} has text of type {type(text).__name__}; it must be a string")
    return text


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < and &, which belong in a prompt as they are.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
