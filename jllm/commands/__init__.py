"""Commands of `jllm` that load no engine: a module each."""
