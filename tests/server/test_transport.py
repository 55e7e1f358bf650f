"""Below HTTP's surface: odd heads, old protocols, TLS; no byte goes elsewhere."""

import asyncio
import contextlib
import json
import shutil
import ssl
import subprocess

import pytest

from server.config import ServerConfig
from server.serving import make_tls
from tests.server.fakes import chat, completion

COMPLETIONS = "/v1/completions"
BODY = json.dumps(completion()).encode()
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HEAD
LENGTH = f"Content-Length: {len(BODY)}\r\n".encode()


async def connect(running, **options):
    host, port = running.url.partition("://")[2].split(":")
    return await asyncio.open_connection(host, int(port), **options)


async def exchange(running, data, **options):
    """Sends bytes on a connection of their own; all that comes until it closes."""
    reader, writer = await connect(running, **options)
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


async def check_unharmed(running):
    status, _, answer = await running.post(COMPLETIONS, completion())
    assert (status, answer["choices"][0]["text"]) == (200, "hello world")


HEADS = {
    "two lengths": b"Content-Length: 5\r\nContent-Length: 7\r\n",
    "length and chunks": LENGTH + b"Transfer-Encoding: chunked\r\n",
    "a negative length": b"Content-Length: -1\r\n",
    "a length that is no number": b"Content-Length: +5\r\n",
    "a long header": b"X-Long: " + b"a" * 9000 + b"\r\n" + LENGTH,
    "200 headers": b"".join(b"X-%d: a\r\n" % i for i in range(200)) + LENGTH,
    "a control character": b"X-Odd: a\x00b\r\n" + LENGTH,
    "a space before the colon": b"X-Odd : a\r\n" + LENGTH,
}


@pytest.mark.parametrize("name", HEADS)
def test_odd_heads_are_refused_and_the_connection_closed(serve, name):
    async def body(running):
        answer = await exchange(running, POST + HEADS[name] + b"\r\n" + BODY)
        assert status_of(answer) in (400, 431)
        assert not running.engine.added
        await check_unharmed(running)

    serve(body)


def test_http_1_0(serve):
    async def body(running):
        head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + LENGTH
        answer = await exchange(running, head + b"\r\n" + BODY)
        head, _, text = answer.partition(b"\r\n\r\n")
        assert status_of(head) == 200
        assert json.loads(text)["choices"][0]["text"] == "hello world"
        assert b"chunked" not in head.lower()
        streamed = json.dumps(completion(stream=True)).encode()
        length = f"Content-Length: {len(streamed)}\r\n\r\n".encode()
        old = POST.replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = await exchange(running, old + length + streamed)
        head, _, text = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert text.endswith(b"data: [DONE]\n\n")
        await check_unharmed(running)

    serve(body)


def test_a_client_that_waits_to_be_told_to_go_on(serve):
    async def body(running):
        reader, writer = await connect(running)
        writer.write(POST + LENGTH + b"Connection: close\r\nExpect: 100-continue\r\n")
        writer.write(b"\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert status_of(await reader.read()) == 200
        writer.close()
        close = LENGTH + b"Connection: close\r\nExpect: miracles\r\n\r\n"
        assert status_of(await exchange(running, POST + close + BODY)) == 417
        await check_unharmed(running)

    serve(body)


def test_no_other_protocol_is_offered(serve):
    async def body(running):
        upgrade = b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        reader, writer = await connect(running)
        writer.write(POST + LENGTH + upgrade + b"HTTP2-Settings: AAAA\r\n\r\n" + BODY)
        status = status_of(await reader.readline())
        assert status == 200 or 400 <= status < 500
        writer.close()
        for line in (
            b"TRACE / HTTP/1.1\r\n",
            b"CONNECT example.org:443 HTTP/1.1\r\n",
            b"POST http://example.org/ HTTP/1.1\r\n",
            b"BREW /v1/completions HTTP/1.1\r\n",
            b"PRI * HTTP/2.0\r\n",
        ):
            answer = await exchange(running, line + HEAD + b"Connection: close\r\n\r\n")
            assert 400 <= status_of(answer) < 500, line
        await check_unharmed(running)

    serve(body)


# --- TLS ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Names of a certificate's file, which signs itself, and of its key's."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    names = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -nodes -days 2 -subj /CN=localhost -newkey ec"
    options = "-pkeyopt ec_paramgen_curve:prime256v1"
    name = "-addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*f"{command} {options} {name}".split(), "-out", names[0], "-keyout", names[1]],
        check=True,
        capture_output=True,
    )
    return names


REQUEST = POST + LENGTH + b"Connection: close\r\n\r\n" + BODY


def test_tls(serve, certificate):
    async def body(running):
        assert running.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=certificate[0])
        answer = await exchange(running, REQUEST, ssl=trusting)
        assert status_of(answer) == 200
        assert b"hello world" in answer
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(running, ssl=ssl.create_default_context())
        assert b"200 OK" not in await exchange(running, REQUEST)
        assert len(running.engine.added) == 1

    serve(body, ssl_certfile=certificate[0], ssl_keyfile=certificate[1])


def test_tls_of_clients_that_show_a_certificate(serve, certificate):
    async def body(running):
        known = ssl.create_default_context(cafile=certificate[0])
        known.load_cert_chain(*certificate)
        assert status_of(await exchange(running, REQUEST, ssl=known)) == 200
        unknown = ssl.create_default_context(cafile=certificate[0])
        # By TLS 1.3 the handshake of the client ends before it is judged.
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert await exchange(running, REQUEST, ssl=unknown) == b""
        assert len(running.engine.added) == 1

    options = dict(zip(("ssl_certfile", "ssl_keyfile"), certificate, strict=True))
    serve(body, ssl_ca_certs=certificate[0], **options)


def test_old_versions_of_tls_are_off(certificate):
    context = make_tls(
        ServerConfig(ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    )
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_only_this_machine_is_connected_to(serve, connections):
    async def body(running):
        await check_unharmed(running)
        await running.stream("/v1/chat/completions", chat())
        await running.get("/openapi.json")
        assert {host for host, *_ in connections} == {"127.0.0.1"}
        # The test would notice.
        with pytest.raises(OSError, match="do not connect"):
            await asyncio.open_connection("192.0.2.1", 9)
        assert connections.pop() == ("192.0.2.1", 9)

    serve(body)
