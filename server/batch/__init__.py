"""The command `jllm batch`: jobs whose lines mean what the server's requests mean."""
