"""Other engines on the same checkpoint and workload, in turns with jllm."""
