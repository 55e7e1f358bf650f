"""Keys, hosts and origins."""

import asyncio

import pytest

from server.auth import PUBLIC
from server.config import ServerConfig
from server.serving import load_keys
from tests.server.fakes import chat, completion

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer secret"}
WRONG = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer secre"},
    {"Authorization": "Bearer  secret"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer"},
    {"Authorization": "bearer secret"},
    {"Authorization": "Basic secret"},
    {"Authorization": "secret"},
    [("Authorization", "Bearer secret"), ("Authorization", "Bearer secret")],
]


def test_every_route_is_guarded_but_three(serve):
    async def body(running):
        seen = set()
        for route in running.server_routes():
            method, path = route.method, route.resource.canonical
            if method in ("HEAD", "OPTIONS", "*"):
                continue
            url = running.url + path.replace("{id}", "x")
            for headers in WRONG:
                async with running.session.request(
                    method, url, headers=headers
                ) as response:
                    is_page = path == "/" or path.startswith("/web/")
                    if is_page or (method, path) in PUBLIC:
                        assert response.status == 200, path
                    else:
                        assert response.status == 401, (method, path, headers)
                        challenge = response.headers["WWW-Authenticate"]
                        assert challenge == "Bearer"
                        answer = await response.json()
                        code = None if headers == {} else "invalid_api_key"
                        assert answer["error"]["code"] == code
            seen.add(path)
        assert {"/v1/completions", "/tokenize", "/metrics", "/start_profile"} <= seen

    serve(body, api_key=["secret", "other"], profiler_dir="unused")


def test_tricks_with_paths_find_no_way_in(serve):
    async def body(running):
        host, port = running.url.removeprefix("http://").split(":")
        for target in (
            "/v1/../v1/models",
            "//v1/models",
            "/v1/%2e%2e/v1/models",
            "/health/../v1/models",
            "/v1/models;/health",
            "/v1/models/",
            "http://x/health?/../v1/models",
            "/V1/MODELS",
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                f"GET {target} HTTP/1.1\r\nHost: x/health?\r\n"
                "X-Original-URL: /health\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await reader.read()
            writer.close()
            status = answer.split()[1]
            assert b'"object":"list"' not in answer
            # In its absolute form a target is routed by its path, here a public one.
            expected = (b"200",) if "health?" in target else (b"400", b"401", b"404")
            assert status in expected, (target, answer)
        async with running.session.get(f"{running.url}/v1/models?api_key=secret") as r:
            assert r.status == 401

    serve(body, api_key=["secret"])


def test_each_key_opens(serve, tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    config = ServerConfig(api_key=["secret"], api_key_file=str(file))
    assert load_keys(config) == ("secret", "one", "two")

    async def body(running):
        for key in ("secret", "one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await running.post(CHAT, chat(), headers))[0] == 200
        assert (await running.get("/v1/models"))[0] == 401

    serve(body, api_key=["secret"], api_key_file=str(file))


@pytest.mark.parametrize("isolate", [False, True])
def test_keys_may_share_no_cached_prompts(serve, isolate):
    async def body(running):
        for key in ("a", "b"):
            headers = {"Authorization": f"Bearer {key}"}
            await running.post("/v1/completions", completion(cache_salt="s"), headers)
            await running.post(CHAT, chat(cache_salt="s"), headers)
        salts = [request.cache_salt for request in running.engine.added]
        assert len(set(salts)) == (2 if isolate else 1)
        assert salts[0] == salts[1]

    serve(body, api_key=["a", "b"], isolate_keys=isolate)


def test_other_hosts_are_refused_on_loopback(serve):
    async def body(running):
        for host, status in (
            ("localhost:1234", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("friend.example", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
        ):
            found, _, answer = await running.get("/v1/models", {"Host": host})
            assert found == status, (host, answer)

    serve(body, allowed_hosts=["friend.example"])


def test_origins(serve):
    async def body(running):
        origin = {"Origin": "https://page.example"}
        question = origin | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        async with running.session.options(running.url + CHAT, headers=question) as r:
            assert r.status == 204
            assert r.headers["Access-Control-Allow-Origin"] == "https://page.example"
            assert "authorization" in r.headers["Access-Control-Allow-Headers"]
        _, headers, _ = await running.post(CHAT, chat(), KEY | origin)
        assert headers["Access-Control-Allow-Origin"] == "https://page.example"
        status, headers, _ = await running.post(CHAT, chat(), origin)
        assert status == 401
        evil = {"Origin": "https://evil.example"}
        _, headers, _ = await running.post(CHAT, chat(), KEY | evil)
        assert "Access-Control-Allow-Origin" not in headers

    serve(body, api_key=["secret"], allowed_origins=["https://page.example"])


def test_no_origins_by_default(serve):
    async def body(running):
        headers = {"Origin": "https://page.example"}
        _, found, _ = await running.get("/v1/models", headers)
        assert "Access-Control-Allow-Origin" not in found
        question = headers | {"Access-Control-Request-Method": "POST"}
        async with running.session.options(running.url + CHAT, headers=question) as r:
            assert r.status == 405

    serve(body)
