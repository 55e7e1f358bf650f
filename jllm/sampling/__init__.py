"""How the next token of each row is chosen: pure functions over arrays."""
