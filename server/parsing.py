"""Which parsers read the outputs of this model, and what a choice of tools demands."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jllm
from jllm import OutputParser, StructuredOutputsParams
from server.config import ServerConfig
from server.errors import bad_request
from server.llm import Llm

AUTO = "auto"


@dataclasses.dataclass(frozen=True, slots=True)
class Parsing:
    """The parsers of one model.

    Attributes:
        reasoning: Name of the reasoning parser, None if there is none.
        tools: Name of the tool call parser, None if there is none.
        special_tokens: Tokens that are no part of a text.
        allows_auto: Whether the model may decide to call tools.
    """

    reasoning: str | None = None
    tools: str | None = None
    special_tokens: tuple[str, ...] = ()
    allows_auto: bool = False

    @classmethod
    def of(cls, config: ServerConfig, llm: Llm) -> "Parsing":
        """Takes the parsers that the options name, or those of the chat template.

        Raises:
            ConfigError: There is no parser of that name, or they do not fit together.
        """
        try:
            hf = llm.get_tokenizer()
        except jllm.ConfigError:
            return cls()
        template = hf.chat_template
        found = jllm.detect_parsers(template if isinstance(template, str) else None)
        names = (config.reasoning_parser, config.tool_call_parser)
        reasoning, tools = (
            auto if name == AUTO else name
            for name, auto in zip(names, found, strict=True)
        )
        jllm.make_output_parser(reasoning=reasoning, tools=tools)
        # As the detokenizer knows them; `all_special_tokens` lacks most of them.
        added = hf.added_tokens_decoder.values()
        special = tuple(str(token) for token in added if token.special)
        return cls(reasoning, tools, special, config.enable_auto_tool_choice)

    def make(
        self,
        tools: Sequence[dict[str, Any]],
        prompt_text: str,
        *,
        is_stream: bool = False,
    ) -> OutputParser | None:
        """A parser for one output; None where all text is content.

        Args:
            tools: Those that the model may call.
            prompt_text: The prompt as rendered, which may end within reasoning.
            is_stream: Whether arguments are given as they come; else a call that is cut
                off is content, not a call with half its arguments.
        """
        calls = self.tools if tools else None
        if self.reasoning is None and calls is None:
            return None
        is_open = None
        if self.reasoning is not None:
            is_open = jllm.prompt_opens_reasoning(self.reasoning, prompt_text)
        return jllm.make_output_parser(
            reasoning=self.reasoning,
            tools=calls,
            tool_schemas=tools,
            starts_in_reasoning=is_open,
            special_tokens=self.special_tokens,
            stream_arguments=is_stream,
        )

    def needs_special_tokens(self, tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the parser of an output has to see special tokens."""
        parser = self.make(tools, "")
        return parser is not None and parser.needs_special_tokens

    def check_choice(self, tools: Sequence[dict[str, Any]], choice: Any) -> Any:
        """Completes and checks a choice of tools.

        Returns:
            "none", "auto", "required" or {"function": name}.

        Raises:
            ApiError: It cannot be met.
        """
        if choice is None:
            choice = "auto" if tools else "none"
        if choice == "none":
            return choice
        if not tools:
            raise bad_request("tool_choice needs tools", "tool_choice", "invalid_value")
        names = [tool["function"]["name"] for tool in tools]
        if isinstance(choice, dict) and choice["function"] not in names:
            raise bad_request(
                f"tool_choice names {choice['function'][:100]!r}, which is none of the "
                "tools",
                "tool_choice",
                "invalid_value",
            )
        if self.tools is None:
            raise bad_request(
                "the model has no known way to call tools; the server can be told one "
                "with --tool-call-parser",
                "tools",
                "unsupported_parameter",
            )
        if choice == "auto" and not self.allows_auto:
            raise bad_request(
                "tool_choice auto needs a server started with "
                "--enable-auto-tool-choice",
                "tool_choice",
                "unsupported_parameter",
            )
        return choice

    def constraint(
        self, tools: Sequence[dict[str, Any]], choice: Any, *, parallel: bool
    ) -> StructuredOutputsParams | None:
        """The form that required calls have; None where the model decides."""
        if self.tools is None or choice in ("none", "auto"):
            return None
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice["function"]}}
        return jllm.tool_constraint(
            self.tools, tools, choice, parallel_tool_calls=parallel
        )
