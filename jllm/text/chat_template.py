"""Conversations to prompts, by the checkpoint's Jinja template in a sandbox."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.errors import ConfigError, InvalidRequestError
from jllm.text.tokenizer import Tokenizer

PARAMETER = "messages"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    Attributes:
        chat_template: Jinja source, or the name of one of the model's templates; None
            is the model's own.
        add_generation_prompt: Ends with the header of the assistant's answer.
        continue_final_message: Leaves the last message open, to be continued.
        tools: JSON schemas of functions, for templates that present them.
        add_special_tokens: Puts BOS and the like in front of what the template wrote.
        template_kwargs: Further variables for the template.
    """

    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[dict[str, Any]] | None = None
    add_special_tokens: bool = False
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> "ChatOptions":
        """Makes options from the keywords of `chat`, named as in vLLM.

        Raises:
            InvalidRequestError: A keyword is unknown or has a wrong type.
        """
        values = dict(keywords)
        kwargs = values.pop("chat_template_kwargs", None)
        types = {
            "chat_template": (str, type(None)),
            "add_generation_prompt": bool,
            "continue_final_message": bool,
            "tools": (list, tuple, type(None)),
            "add_special_tokens": bool,
        }
        for name, value in values.items():
            if name not in types:
                raise InvalidRequestError(f"chat has no option {name}", parameter=name)
            if not isinstance(value, types[name]):
                raise InvalidRequestError(
                    f"{name}={value!r} has a wrong type", parameter=name
                )
        if not isinstance(kwargs, Mapping | None):
            raise InvalidRequestError(
                f"chat_template_kwargs={kwargs!r} must map names to values",
                parameter="chat_template_kwargs",
            )
        return cls(**values, template_kwargs=kwargs or {})


def load_chat_template(file: str) -> str:
    """Reads a template from a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template={file!r} cannot be read: {error}") from error


def render_chat(tokenizer: Tokenizer, messages: Any, options: ChatOptions) -> str:
    """Renders a conversation by transformers' own renderer.

    That is Jinja's immutable sandbox, and the template sees plain JSON values only.

    Raises:
        InvalidRequestError: A message is malformed, there is no template, or the
            template refuses the conversation; then the message is the template's.
    """
    conversation = check_messages(messages)
    if options.add_generation_prompt and options.continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other",
            parameter="continue_final_message",
        )
    hf = tokenizer.hf
    if options.chat_template is None and hf.chat_template is None:
        raise InvalidRequestError(
            "the model has no chat template; give one as chat_template",
            parameter="chat_template",
        )
    _check_template_kwargs(hf, options.template_kwargs)
    try:
        source = str(hf.get_chat_template(options.chat_template, options.tools))
        conversation = [_fit_to_template(m, source) for m in conversation]
        return hf.apply_chat_template(
            conversation,
            tools=None if options.tools is None else list(options.tools),
            chat_template=options.chat_template,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            **options.template_kwargs,
        )
    # A template is foreign code, which may fail in any way.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InvalidRequestError(
            f"the chat template failed: {reason}", parameter=PARAMETER
        ) from error


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks messages and gives them the form that templates expect.

    Text parts of a content are joined by newlines, a call's arguments are an object,
    and the content of a message with nothing but calls is empty.

    Raises:
        InvalidRequestError: Names the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages must be a list", parameter=PARAMETER)
    if not messages:
        raise InvalidRequestError("messages must not be empty", parameter=PARAMETER)
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object", parameter=PARAMETER)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"{where}.role={role!r} must be a string such as 'user'",
            parameter=PARAMETER,
        )
    checked = dict(message)
    calls = message.get("tool_calls")
    if calls is None:
        # Clients send it for messages without calls; templates ask whether it is there.
        checked.pop("tool_calls", None)
    else:
        checked["tool_calls"] = _check_calls(f"{where}.tool_calls", calls)
    content = message.get("content")
    if content is None and calls:
        content = ""
    return {**checked, "content": _check_content(f"{where}.content", content)}


def _check_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if isinstance(calls, (str, bytes)) or not isinstance(calls, Sequence):
        raise InvalidRequestError(f"{where} must be a list", parameter=PARAMETER)
    return [_check_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _check_call(where: str, call: Any) -> dict[str, Any]:
    """A call whose arguments, a string of JSON in the API, are an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(
            f"{where} must hold a function with a name", parameter=PARAMETER
        )
    arguments = function.get("arguments") or "{}"
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{where}.function.arguments is no JSON: {error}", parameter=PARAMETER
        ) from error
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(
            f"{where}.function.arguments must be a JSON object", parameter=PARAMETER
        )
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _fit_to_template(message: dict[str, Any], source: str) -> dict[str, Any]:
    """Gives roles and fields the names that this template knows them by."""
    fitted = dict(message)
    if fitted["role"] == "developer":
        # The API's newer word; hardly a template knows it, and all know the older one.
        fitted["role"] = "system"
    reasoning = fitted.get("reasoning") or fitted.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        fitted |= {"reasoning": reasoning, "reasoning_content": reasoning}
        # A template that knows it by this name takes it instead of content.
        if "message.thinking" in source and not fitted["content"]:
            fitted.setdefault("thinking", reasoning)
    return fitted


def _check_content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidRequestError(
            f"{where} must be a string or a list of text parts", parameter=PARAMETER
        )
    texts: list[str] = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise InvalidRequestError(
                f"{where}[{i}] must be a text part: only text is supported",
                parameter=PARAMETER,
            )
        texts.append(text)
    return "\n".join(texts)


def _check_template_kwargs(hf: Any, kwargs: Mapping[Any, Any]) -> None:
    """Refuses variables that would change how the template is run."""
    reserved = set(inspect.signature(hf.apply_chat_template).parameters)
    reserved |= {"conversations", "messages"}
    reserved -= {"kwargs", "documents"}
    for name in kwargs:
        if name in reserved or not isinstance(name, str):
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name!r}",
                parameter="chat_template_kwargs",
            )
