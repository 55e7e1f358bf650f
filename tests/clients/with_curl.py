"""curl: what scripts and probes send."""

import json
import subprocess
import sys

JSON = ("-H", "Content-Type: application/json")
BODY = {"model": "jllm", "prompt": "Once upon a time", "max_tokens": 8}


def curl(*arguments):
    """Returns status and body."""
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def main(url):
    completions = f"{url}/v1/completions"
    status, body = curl(*JSON, "-d", json.dumps(BODY), completions)
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] == 8, body
    stream = json.dumps(BODY | {"stream": True})
    status, body = curl("-N", *JSON, "-d", stream, completions)
    assert status == 200, body
    assert body.rstrip().endswith("data: [DONE]"), body
    # More than 1024 bytes: curl sends the head first and waits to be told to go on.
    long = json.dumps(BODY | {"prompt": "a " * 600})
    status, body = curl(*JSON, "-H", "Expect: 100-continue", "-d", long, completions)
    assert status in (200, 400), body
    for path in ("/health", "/ready", "/v1/models"):
        assert curl("--head", f"{url}{path}")[0] == 200, path
    for arguments, expected in (
        ((completions,), 405),
        (("-X", "PUT", *JSON, "-d", "{}", completions), 405),
        ((*JSON, "-d", "{bad", completions), 400),
        (("-d", "{}", completions), 415),
        ((f"{url}/nothing",), 404),
    ):
        status, body = curl(*arguments)
        assert status == expected, (arguments, status, body)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    options = ("--http1.0", *JSON, "-d", json.dumps(BODY))
    assert curl(*options, completions)[0] == 200


if __name__ == "__main__":
    main(*sys.argv[1:])
