"""Formats by name, named as in vLLM, and which of them a model uses."""

from collections.abc import Mapping

from jllm.errors import ConfigError
from jllm.text.parsers.formats import ToolFormat
from jllm.text.parsers.glm import GlmCalls
from jllm.text.parsers.harmony import Harmony
from jllm.text.parsers.llama_json import LlamaJson
from jllm.text.parsers.mistral import MistralCalls
from jllm.text.parsers.pythonic import PythonicCalls
from jllm.text.parsers.reasoning import TaggedReasoning
from jllm.text.parsers.sections import SectionCalls
from jllm.text.parsers.tagged_json import TaggedJson
from jllm.text.parsers.xml_calls import XmlCalls

_BAR = "\uff5c"
"""The wide vertical line of DeepSeek's special tokens."""
_DSML = f"{_BAR}DSML{_BAR}"
_ASSISTANT = f"<{_BAR}Assistant{_BAR}>"
_SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"

_DEEPSEEK = SectionCalls(
    opener=f"<{_BAR}tool▁calls▁begin{_BAR}>",
    closer=f"<{_BAR}tool▁calls▁end{_BAR}>",
    call=f"<{_BAR}tool▁call▁begin{_BAR}>",
    call_end=f"<{_BAR}tool▁call▁end{_BAR}>",
    separator=_SEPARATOR,
)
_DEEPSEEK_V3 = SectionCalls(
    opener=_DEEPSEEK.opener,
    closer=_DEEPSEEK.closer,
    call=_DEEPSEEK.call,
    call_end=_DEEPSEEK.call_end,
    separator=_DEEPSEEK.separator,
    has_type=True,
)
_KIMI = SectionCalls(
    opener="<|tool_calls_section_begin|>",
    closer="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    separator="<|tool_call_argument_begin|>",
    has_id=True,
)


def _dsml(section: str) -> XmlCalls:
    return XmlCalls(
        opener=f"<{_DSML}{section}>",
        closer=f"</{_DSML}{section}>",
        call=f'<{_DSML}invoke name="',
        call_end=f"</{_DSML}invoke>",
        parameter=f'<{_DSML}parameter name="',
        parameter_end=f"</{_DSML}parameter>",
        name_end='">',
        tells_strings=True,
    )


def _functions(section: str) -> XmlCalls:
    return XmlCalls(
        opener=f"<{section}>",
        closer=f"</{section}>",
        call="<function=",
        call_end="</function>",
        parameter="<parameter=",
        parameter_end="</parameter>",
        name_end=">",
    )


_MINIMAX = XmlCalls(
    opener="<minimax:tool_call>",
    closer="</minimax:tool_call>",
    call='<invoke name="',
    call_end="</invoke>",
    parameter='<parameter name="',
    parameter_end="</parameter>",
    name_end='">',
)

TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v31": _DEEPSEEK,
    "deepseek_v32": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "glm45": GlmCalls(),
    "glm47": GlmCalls(),
    "granite": TaggedJson("<|tool_call|>"),
    "hermes": TaggedJson("<tool_call>", "</tool_call>"),
    "jamba": TaggedJson("<tool_calls>", "</tool_calls>"),
    "kimi_k2": _KIMI,
    "llama3_json": LlamaJson(),
    "llama4_json": LlamaJson(),
    "llama4_pythonic": PythonicCalls("<|python_start|>", "<|python_end|>"),
    "longcat": TaggedJson("<longcat_tool_call>", "</longcat_tool_call>"),
    "minimax_m2": _MINIMAX,
    "mistral": MistralCalls(),
    "openai": Harmony(),
    "pythonic": PythonicCalls(),
    "qwen3_coder": _functions("tool_call"),
    "qwen3_xml": _functions("tool_call"),
    "seed_oss": _functions("seed:tool_call"),
}
"""Tool parsers by name."""

_THINK = TaggedReasoning()
_ALWAYS_THINK = TaggedReasoning(opens_by_default=True)

REASONING_FORMATS: Mapping[str, TaggedReasoning | Harmony] = {
    "deepseek_r1": _ALWAYS_THINK,
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "kimi_k2": TaggedReasoning(call_openers=_KIMI.openers),
    "minimax_m2": _ALWAYS_THINK,
    "mistral": TaggedReasoning("[THINK]", "[/THINK]"),
    "openai_gptoss": Harmony(),
    "qwen3": TaggedReasoning(call_openers=frozenset({"<tool_call>"})),
    "seed_oss": TaggedReasoning("<seed:think>", "</seed:think>"),
    "step3": _ALWAYS_THINK,
}
"""Reasoning parsers by name."""

# What a template says, and the tool parser that reads the model's answer to it; the
# first that fits is taken, so that the particular stands before the general.
_TOOL_SIGNS = (
    (("<|channel|>", "<|start|>"), "openai"),
    ((_DSML, "function_calls>"), "deepseek_v32"),
    ((_DSML, "tool_calls>"), "deepseek_v4"),
    ((_SEPARATOR, "```json"), "deepseek_v3"),
    ((_SEPARATOR,), "deepseek_v31"),
    (("<|tool_call_argument_begin|>",), "kimi_k2"),
    (("<arg_key>", "\n<arg_key>"), "glm45"),
    (("<arg_key>",), "glm47"),
    (("seed:tool_call>", "<function="), "seed_oss"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<longcat_tool_call>",), "longcat"),
    (("<tool_call>",), "hermes"),
    (("<|tool_call|>",), "granite"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|start_header_id|>", '"parameters"'), "llama3_json"),
    (("<|start_header_id|>", "[func_name1("), "pythonic"),
)
_REASONING_SIGNS = (
    (("<|channel|>", "<|start|>"), "openai_gptoss"),
    (("[THINK]",), "mistral"),
    (("seed:think>",), "seed_oss"),
    (("<think>", "<arg_key>"), "glm45"),
    (("<minimax:tool_call>", "<think>"), "minimax_m2"),
    (("<think>", "<|tool_call_argument_begin|>"), "kimi_k2"),
    (("</think>", _ASSISTANT, "thinking"), "deepseek_v3"),
    (("</think>", _ASSISTANT), "deepseek_r1"),
    (("</think>",), "qwen3"),
)


def tool_format(name: str) -> ToolFormat:
    """The tool parser of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TOOL_FORMATS:
        raise ConfigError(_unknown("tool_call_parser", name, TOOL_FORMATS))
    return TOOL_FORMATS[name]


def reasoning_format(name: str) -> TaggedReasoning | Harmony:
    """The reasoning parser of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in REASONING_FORMATS:
        raise ConfigError(_unknown("reasoning_parser", name, REASONING_FORMATS))
    return REASONING_FORMATS[name]


def detect_parsers(
    chat_template: str | None, model_type: str | None = None
) -> tuple[str | None, str | None]:
    """Tells which parsers read the outputs of a model.

    Args:
        chat_template: Its template, which shows how calls and reasoning are written.
        model_type: As in config.json; decides where the template shows neither.

    Returns:
        Names of the reasoning and of the tool parser; None where the model does not
        seem to reason or to call.
    """
    if model_type == "gpt_oss":
        return "openai_gptoss", "openai"
    template = chat_template or ""
    return _first(_REASONING_SIGNS, template), _first(_TOOL_SIGNS, template)


def _first(signs: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str | None:
    for words, name in signs:
        if all(word in template for word in words):
            return name
    return None


def _unknown(option: str, name: str, known: Mapping[str, object]) -> str:
    return f"{option}={name!r} must be one of {', '.join(sorted(known))}"
