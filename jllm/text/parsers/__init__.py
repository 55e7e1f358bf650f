"""Output text to reasoning, content and tool calls, piece by piece in linear time."""
