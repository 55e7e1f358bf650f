"""Runs the command line: `python -m jllm`."""

import sys

from jllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
