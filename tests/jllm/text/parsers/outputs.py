"""Outputs of models in each tool format, and how tests run parsers over them."""

import dataclasses
import itertools
import json

from jllm import ContentDelta, ReasoningDelta, make_output_parser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "flags": {"type": "array", "items": {"type": "string"}},
                    "note": {"type": ["string", "null"]},
                },
            },
        },
    }
]
ARGUMENTS = {"city": 'Köln "am"\nRhein', "days": 3, "flags": ["a", "b]"], "note": None}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
BAR = "\uff5c"


@dataclasses.dataclass(frozen=True)
class Parsed:
    reasoning: str = ""
    content: str = ""
    calls: tuple = ()


def join(deltas):
    """Puts deltas together as a client does, and checks their form."""
    reasoning, content, calls = "", "", []
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            assert delta.text
            reasoning += delta.text
        elif isinstance(delta, ContentDelta):
            assert delta.text
            content += delta.text
        elif delta.id is not None:
            assert delta.name
            assert delta.index == len(calls)
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.name is None
            assert delta.arguments
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return Parsed(reasoning, content, tuple(map(tuple, calls)))


def parse(pieces, tools=None, reasoning=None, **options):
    """What a parser makes of a text, given as a string or in pieces."""
    parser = make_output_parser(
        reasoning=reasoning, tools=tools, tool_schemas=TOOLS, **options
    )
    deltas = [d for piece in pieces for d in parser.push(piece)]
    return join([*deltas, *parser.finish()])


def cut(text, places):
    """The text in pieces, cut at these places."""
    edges = [0, *sorted({p % (len(text) + 1) for p in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def _hermes(arguments):
    return f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'


def _section(call):
    begin, end = f"<{BAR}tool▁calls▁begin{BAR}>", f"<{BAR}tool▁calls▁end{BAR}>"
    return f"{begin}{call}\n{call}{end}"


def _deepseek(head, tail):
    call, end = f"<{BAR}tool▁call▁begin{BAR}>", f"<{BAR}tool▁call▁end{BAR}>"
    return _section(f"{call}{head}{TEXT}{tail}{end}")


_SEP = f"<{BAR}tool▁sep{BAR}>"
_DSML = f"{BAR}DSML{BAR}"
_XML = (
    "<function=weather>\n<parameter=city>\n{city}\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n<parameter=flags>\n{flags}\n</parameter>\n"
    "<parameter=note>\nnull\n</parameter>\n</function>"
).format(city=ARGUMENTS["city"], flags=json.dumps(ARGUMENTS["flags"]))
_PAIRS = [
    ("city", ARGUMENTS["city"], "true"),
    ("days", "3", "false"),
    ("flags", json.dumps(ARGUMENTS["flags"]), "false"),
    ("note", "null", "false"),
]


def _invoke(mark, tells):
    parameters = "\n".join(
        f'<{mark}parameter name="{key}"'
        + (f' string="{is_string}"' if tells else "")
        + f">{value}</{mark}parameter>"
        for key, value, is_string in _PAIRS
    )
    return f'<{mark}invoke name="weather">\n{parameters}\n</{mark}invoke>'


def _dsml(section):
    call = _invoke(_DSML, tells=True)
    return f"<{_DSML}{section}>\n{call}\n{call}\n</{_DSML}{section}>"


def _glm(line):
    pairs = line.join(
        f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>"
        for key, value, _ in _PAIRS
    )
    call = f"<tool_call>weather{line}{pairs}{line}</tool_call>"
    return f"{call}\n{call}"


_PYTHON = "weather(city='Köln \"am\"\\nRhein', days=3, flags=[\"a\", 'b]'], note=None)"
_HARMONY = (
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    f"{TEXT}<|call|>"
)
_CODE = f"<|channel|>commentary json<|message|>{TEXT}<|call|>"
_KIMI = (
    f"<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{TEXT}"
    "<|tool_call_end|>"
)
_LLAMA = f'{{"name": "weather", "parameters": {TEXT}}}'
_OBJECT = f'{{"name": "weather", "arguments": {TEXT}}}'

CASES = [
    ("hermes", f"{_hermes(TEXT)}\n{_hermes(TEXT)}"),
    ("hermes", f"<tool_call>[{_OBJECT}, {_OBJECT}]"),
    (
        "hermes",
        f'<tool_call>{{"arguments": {TEXT}, "name": "weather"}}\n{_hermes(TEXT)}',
    ),
    ("hermes", _hermes(json.dumps(TEXT)) + _hermes(TEXT)),
    ("longcat", _hermes(TEXT).replace("tool_call", "longcat_tool_call") * 2),
    ("granite", f"<|tool_call|>[{_OBJECT}, {_OBJECT}]"),
    ("jamba", f"<tool_calls>[{_OBJECT}, {_OBJECT}]</tool_calls>"),
    ("llama3_json", f"{_LLAMA}; {_LLAMA}"),
    ("llama4_json", f"<|python_tag|>{_LLAMA};{_OBJECT}"),
    ("pythonic", f"[{_PYTHON}, {_PYTHON}]"),
    ("pythonic", f"<|python_tag|>[{_PYTHON},{_PYTHON},]"),
    ("llama4_pythonic", f"<|python_start|>[{_PYTHON}, {_PYTHON}]<|python_end|>"),
    ("mistral", f"[TOOL_CALLS] [{_OBJECT}, {_OBJECT}]"),
    ("mistral", f"[TOOL_CALLS]weather{TEXT}[TOOL_CALLS]weather{TEXT}"),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{TEXT}" * 2),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{TEXT}" * 2),
    ("deepseek_v3", _deepseek(f"function{_SEP}weather\n```json\n", "\n```")),
    ("deepseek_v31", _deepseek(f"weather{_SEP}", "")),
    ("deepseek_v32", _dsml("function_calls")),
    ("deepseek_v4", _dsml("tool_calls")),
    (
        "kimi_k2",
        f"<|tool_calls_section_begin|>{_KIMI}{_KIMI}<|tool_calls_section_end|>",
    ),
    ("glm45", _glm("\n")),
    ("glm47", _glm("")),
    (
        "qwen3_coder",
        f"<tool_call>\n{_XML}\n</tool_call>\n<tool_call>\n{_XML}\n</tool_call>",
    ),
    ("qwen3_xml", f"<tool_call>{_XML}{_XML}</tool_call>"),
    ("qwen3_coder", f"{_XML}\n</tool_call>\n{_XML}"),
    ("seed_oss", f"<seed:tool_call>\n{_XML}\n{_XML}\n</seed:tool_call>"),
    (
        "minimax_m2",
        "<minimax:tool_call>\n" + _invoke("", tells=False) * 2 + "</minimax:tool_call>",
    ),
    ("openai", f"{_HARMONY}<|start|>assistant{_HARMONY}"),
    ("openai", f"<|start|>assistant to=functions.weather{_CODE}{_HARMONY}"),
]
"""Tool parser and an output that makes the same call twice."""
