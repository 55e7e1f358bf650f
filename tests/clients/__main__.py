"""Starts a server on the embedded model, and lets clients of others talk to it.

Run as `python -m tests.clients CLIENT_PYTHON`: the clients have an environment of their
own, since they ask for other versions of packages than we do.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
CLIENTS = ("with_openai", "with_litellm", "with_langchain", "with_curl", "with_schemas")
SECONDS = 300
LOCAL = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""Keeps litellm from asking the network for prices."""


@contextlib.contextmanager
def running_server():
    """Yields the URL of a server that is ready."""
    command = "serve --port 0 --default-model --tool-call-parser hermes"
    server = subprocess.Popen(
        [sys.executable, "-m", "jllm", *command.split(), "--enable-auto-tool-choice"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.match(r"ready on (http://\S+)", line):
                break
        else:
            raise SystemExit("".join(lines))
        # The log is read on, or the pipe fills up and the server waits for it.
        with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
            try:
                yield found[1]
            finally:
                server.terminate()
    finally:
        server.kill()
        server.wait()


def main(python):
    """Runs every client; the exit code is the number of those that failed."""
    num_failed = 0
    with running_server() as url:
        for client in CLIENTS:
            code = subprocess.run(
                [python, FOLDER / f"{client}.py", url],
                env=os.environ | LOCAL,
                timeout=SECONDS,
                check=False,
            ).returncode
            print(f"{client}: {'ok' if code == 0 else 'FAILED'}", flush=True)
            num_failed += code != 0
    return num_failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
