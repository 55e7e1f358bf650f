"""How hosts come together, and who is turned away."""

import contextlib
import logging
import socket
import threading
import time

import pytest

from jllm.config import EngineConfig, HostConfig
from jllm.distributed import join as module
from jllm.distributed.facts import difference, make_facts
from jllm.distributed.join import follow, lead, read_secret
from jllm.errors import ConfigError
from tests.jllm.distributed.processes import SECRET, free_port

FACTS = {"version of jax": "1", "seed": "0", "checkpoint file config.json": "ab"}


@pytest.fixture(autouse=True)
def no_jax(monkeypatch):
    """Devices are not needed here, and a process can join others once only."""
    monkeypatch.setattr(module, "start_jax", lambda config: None)


@pytest.fixture
def configs(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")

    def make(host_id, **other):
        fields = {
            "coordinator": f"127.0.0.1:{make.port}",
            "num_hosts": 3,
            "host_id": host_id,
            "secret_file": str(secret),
            "timeout": 5.0,
            "start_timeout": 5.0,
        }
        return HostConfig(**fields | other)

    make.port = free_port()
    return make


def run_all(*calls):
    """Calls in threads; results or errors in their order."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except ConfigError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=[i]) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stranger(port, data):
    """Sends bytes to the port once it is there, and waits to be turned away."""
    for _ in range(500):
        try:
            connection = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.01)
    # What was not read makes the end of the connection an error.
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_hosts_meet_whatever_strangers_send(configs, caplog):
    caplog.set_level(logging.INFO, "jllm")

    def late(host):
        # Strangers come first.
        stranger(configs.port, b"GET / HTTP/1.0\r\n\r\n" + b"x" * 40)
        stranger(configs.port, b"\0")
        return follow(configs(host), FACTS)

    leader, *followers = run_all(
        lambda: lead(configs(0), FACTS), lambda: late(1), lambda: late(2)
    )
    lines = [r.message for r in caplog.records if "turned away" in r.message]
    assert len(lines) == 4
    got = []
    thread = threading.Thread(target=lambda: got.extend(followers[0].orders()))
    thread.start()
    other = threading.Thread(target=lambda: list(followers[1].orders()))
    other.start()
    leader.announce_pool(64)
    for follower in followers:
        follower.report_capacity(100 + follower._config.host_id)
    assert leader.least_capacity(500) == 101
    leader.close()
    thread.join()
    other.join()
    assert got == [["pool", 64]]


def test_programs_are_used_when_all_hosts_have_them(configs):
    leader, *followers = run_all(
        lambda: lead(configs(0), FACTS),
        lambda: follow(configs(1), FACTS),
        lambda: follow(configs(2), FACTS),
    )
    followers[0].note_ready(64, ("decode", 8))
    followers[1].note_ready(32, ("decode", 8))
    followers[1].note_ready(64, ("decode", 8))
    deadline = time.monotonic() + 5
    while not leader.is_ready(64, ("decode", 8)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leader.is_ready(64, ("decode", 8))
    assert not leader.is_ready(32, ("decode", 8))
    assert not leader.is_ready(64, ("decode", 1))
    run_all(leader.close, *(lambda f=f: list(f.orders()) for f in followers))


def test_what_differs_is_told_on_all_hosts(configs):
    other = FACTS | {"seed": "1"}
    results = run_all(
        lambda: lead(configs(0), FACTS),
        lambda: follow(configs(1), FACTS),
        lambda: follow(configs(2), other),
    )
    for error in (results[0], results[2]):
        assert str(error) == "host 2 differs from host 0: seed is 1, not 0"
    assert isinstance(results[1], ConfigError)


def test_a_wrong_number_of_hosts_is_told(configs):
    results = run_all(
        lambda: lead(configs(0), FACTS),
        lambda: follow(configs(1, num_hosts=2), FACTS),
    )
    assert "host 1 was started with num_hosts=2, host 0 with num_hosts=3" in str(
        results[0]
    )
    assert str(results[1]) == str(results[0])


def test_a_host_that_does_not_come_is_named(configs):
    config = configs(0, start_timeout=0.3)
    results = run_all(lambda: lead(config, FACTS), lambda: follow(configs(2), FACTS))
    assert str(results[0]) == "host 1 has not come within 0.3 s"


def test_a_first_host_that_is_not_there_is_told(configs):
    with pytest.raises(ConfigError, match=r"coordinator='127.0.0.1:\d+' cannot be"):
        follow(configs(1, start_timeout=0.3), FACTS)


def test_another_secret_is_told(configs, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("fedcba9876543210")
    results = run_all(
        lambda: lead(configs(0, start_timeout=1.0), FACTS),
        lambda: follow(configs(1, secret_file=str(wrong)), FACTS),
    )
    assert "has it the same secret?" in str(results[1])
    assert "has not come" in str(results[0])


def test_a_short_secret_is_refused(tmp_path):
    (tmp_path / "secret").write_text("too short\n")
    with pytest.raises(ConfigError, match="holds 9 bytes, must have at least 16"):
        read_secret(str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(str(tmp_path / "missing"))


def test_facts_leave_out_what_may_differ():
    one, two = (
        make_facts(EngineConfig(model=name, seed=3), {"config.json": "ab"})
        for name in ("/mnt/a", "/mnt/b")
    )
    assert one == two
    other = make_facts(EngineConfig(seed=4), {"config.json": "cd"})
    assert difference(1, other, one) == (
        "host 1 differs from host 0: checkpoint file config.json is cd, not ab; "
        "seed is 4, not 3"
    )
    assert difference(1, {}, one).count("is missing") == len(one)
