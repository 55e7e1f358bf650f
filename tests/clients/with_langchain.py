"""langchain-openai: answers, streams, structured outputs and tools."""

import sys

import pydantic
from langchain_openai import ChatOpenAI


class Animal(pydantic.BaseModel):
    """An animal."""

    legs: int = pydantic.Field(ge=0, le=8)
    wild: bool


def main(url):
    model = ChatOpenAI(
        model="jllm",
        base_url=f"{url}/v1",
        api_key="none",
        max_tokens=400,
        max_retries=0,
    )
    question = "Once upon a time"
    answer = model.invoke(question)
    assert answer.usage_metadata["output_tokens"] <= 400, answer
    chunks = list(model.stream(question))
    assert sum(bool(chunk.content) for chunk in chunks) > 1, chunks
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Animal, method=method)
        assert isinstance(structured.invoke(question), Animal), method
    bound = model.bind_tools([Animal], tool_choice="any")
    calls = bound.invoke(question).tool_calls
    assert calls
    assert all(Animal.model_validate(call["args"]) for call in calls), calls


if __name__ == "__main__":
    main(*sys.argv[1:])
