"""Loopback ports for servers that stop and come back: on the same port, whatever ran meanwhile."""

import random
import socket

# Below what the system hands out to outgoing connections (32768 and above): one of those could
# take the port of a server that is being restarted.
LOWEST, HIGHEST = 20_000, 32_767


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            probe = socket.socket()
            try:
                probe.bind(("127.0.0.1", random.randint(LOWEST, HIGHEST)))
            except OSError:
                probe.close()
            else:
                held.append(probe)
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()
