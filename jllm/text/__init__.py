"""Text at the rim: prompts to tokens, tokens to text; knows no engine and no HTTP."""
