"""How hosts come together: connections, proofs, and a comparison of what they run."""

import atexit
import contextlib
import errno
import logging
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from jllm.config import HostConfig
from jllm.distributed.channel import (
    HANDSHAKE_SECONDS,
    Channel,
    ChannelClosedError,
    HandshakeError,
    accept,
    broadcast,
    join,
)
from jllm.distributed.ending import start_thread
from jllm.distributed.facts import difference
from jllm.distributed.follower import Follower
from jllm.distributed.leader import Leader
from jllm.distributed.messages import MessageError
from jllm.errors import ConfigError

logger = logging.getLogger("jllm")

MIN_SECRET_BYTES = 16
MAX_UNPROVEN = 64
"""Connections at a time that have not proved anything yet."""

RETRY_SECONDS = 0.2
"""Between two attempts to reach the first host."""

JAX_HEARTBEAT_SECONDS = 600
"""How long JAX's own service lets a host be silent: longer than our watchdog does,
since it ends processes without a word about which host it was."""

SHUTDOWN_SECONDS = 60

Joined = tuple[int, int, Channel, Mapping[str, str]]
"""Id, number of hosts as it was told, connection, and facts of a host."""


def lead(config: HostConfig, facts: Mapping[str, str]) -> Leader:
    """Waits for the other hosts, compares what they run, and starts JAX on all.

    Peers that do not know the secret are turned away, with a line in the log.

    Raises:
        ConfigError: A host differs, or does not come in time; names it.
    """
    secret = read_secret(config.secret_file)
    channels: dict[int, Channel] = {}
    with _listen(config) as listener:
        try:
            _gather(config, secret, facts, listener, channels)
        except ConfigError as error:
            with contextlib.suppress(ChannelClosedError):
                broadcast(list(channels.values()), "refused", str(error))
            for channel in channels.values():
                channel.close()
            raise
    with contextlib.suppress(ChannelClosedError):  # the leader sees that a host is gone
        broadcast(list(channels.values()), "welcome")
    leader = Leader(config, channels)
    start_jax(config)
    # Before JAX's own, which waits for all hosts to end.
    atexit.register(leader.close)
    return leader


def follow(config: HostConfig, facts: Mapping[str, str]) -> Follower:
    """Joins the first host, has it compare what this one runs, and starts JAX.

    Raises:
        ConfigError: It cannot be reached, does not know the secret, or runs something
            else.
    """
    secret = read_secret(config.secret_file)
    channel = _connect(config, secret)
    try:
        channel.limit(config.start_timeout)
        channel.send("facts", dict(facts))
        name, *values = channel.receive()
        channel.limit(None)
    except (ChannelClosedError, MessageError) as error:
        channel.close()
        raise ConfigError(
            f"host 0 has ended before all hosts were there: {error}"
        ) from error
    if name != "welcome":
        channel.close()
        raise ConfigError(str(values[0]) if values else name)
    follower = Follower(config, channel)
    start_jax(config)
    return follower


def start_jax(config: HostConfig) -> None:
    """Makes the devices of all hosts known to this process.

    Raises:
        ConfigError: JAX has begun to use this host's devices alone.
    """
    import jax

    # It would take over SIGTERM, which servers and Slurm use to ask for an orderly end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.jax_address,
            config.num_hosts,
            config.host_id,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(config.start_timeout)),
            heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        raise ConfigError(f"JAX cannot be started on several hosts: {error}") from error


def read_secret(path: str) -> bytes:
    """Reads the secret that all hosts share.

    Raises:
        ConfigError: The file cannot be read, or holds less than 16 bytes.
    """
    try:
        secret = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"secret_file={path!r} cannot be read: {error}") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"secret_file={path!r} holds {len(secret)} bytes, must have at least "
            f"{MIN_SECRET_BYTES}"
        )
    return secret


def _listen(config: HostConfig) -> socket.socket:
    host, port = config.address
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        # A name of a service, or an address outside of this host's network.
        if error.errno != errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"coordinator={config.coordinator!r} cannot be listened on: {error}"
            ) from error
    return socket.create_server(("", port), backlog=128)


def _gather(
    config: HostConfig,
    secret: bytes,
    facts: Mapping[str, str],
    listener: socket.socket,
    channels: dict[int, Channel],
) -> None:
    """Fills in the connections of all other hosts."""
    arrived: queue.SimpleQueue[Joined] = queue.SimpleQueue()
    stopped = threading.Event()
    start_thread(lambda: _accept_all(listener, secret, arrived, stopped), "jllm-accept")
    deadline = time.monotonic() + config.start_timeout
    try:
        while len(channels) < config.num_hosts - 1:
            try:
                host, num_hosts, channel, own = arrived.get(
                    timeout=max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                missing = {*range(1, config.num_hosts)} - channels.keys()
                names = ", ".join(map(str, sorted(missing)))
                raise ConfigError(
                    f"host {names} has not come within {config.start_timeout:g} s"
                ) from None
            if host in channels:
                with contextlib.suppress(ChannelClosedError):
                    channel.send("refused", f"host_id={host} is taken")
                channel.close()
                logger.warning("turned away a second host %d", host)
                continue
            channels[host] = channel
            logger.info("host %d of %d is there", host, config.num_hosts)
            if num_hosts != config.num_hosts or not 0 < host < config.num_hosts:
                raise ConfigError(
                    f"host {host} was started with num_hosts={num_hosts}, host 0 with "
                    f"num_hosts={config.num_hosts}"
                )
            if found := difference(host, own, facts):
                raise ConfigError(found)
    finally:
        stopped.set()
        _turn_away(arrived)


def _turn_away(arrived: "queue.SimpleQueue[Joined]") -> None:
    """Ends the connections of hosts that nobody waits for any more."""
    with contextlib.suppress(queue.Empty):
        while True:
            arrived.get_nowait()[2].close()


def _accept_all(
    listener: socket.socket,
    secret: bytes,
    arrived: "queue.SimpleQueue[Joined]",
    stopped: threading.Event,
) -> None:
    room = threading.Semaphore(MAX_UNPROVEN)
    listener.settimeout(RETRY_SECONDS)
    while not stopped.is_set():
        try:
            connection, address = listener.accept()
        except TimeoutError:
            continue
        except OSError:
            return  # closed
        room.acquire()

        def meet(connection: socket.socket, peer: str) -> None:
            try:
                arrived.put(_meet(connection, secret))
                if stopped.is_set():
                    _turn_away(arrived)
            except (HandshakeError, ChannelClosedError, MessageError) as error:
                logger.warning("turned away %s: %s", peer, error)
                connection.close()
            finally:
                room.release()

        peer = f"{address[0]} port {address[1]}"
        start_thread(lambda c=connection, p=peer: meet(c, p), "jllm-handshake")


def _meet(connection: socket.socket, secret: bytes) -> Joined:
    channel, host, num_hosts = accept(connection, secret)
    channel.limit(HANDSHAKE_SECONDS)
    name, *values = channel.receive()
    channel.limit(None)
    if name != "facts" or len(values) != 1 or not isinstance(values[0], dict):
        raise MessageError(f"host {host} tells nothing of itself")
    return host, num_hosts, channel, values[0]


def _connect(config: HostConfig, secret: bytes) -> Channel:
    """Connects to the first host, which may start later."""
    deadline = time.monotonic() + config.start_timeout
    while True:
        try:
            connection = socket.create_connection(config.address, HANDSHAKE_SECONDS)
            break
        # Names, too, may become known later.
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"coordinator={config.coordinator!r} cannot be reached: {error}"
                ) from error
            time.sleep(RETRY_SECONDS)
    try:
        return join(connection, secret, config.host_id, config.num_hosts)
    except HandshakeError as error:
        connection.close()
        raise ConfigError(
            f"coordinator={config.coordinator!r}: {error}; has it the same secret?"
        ) from error
