"""Layers on other machines: ggml's RPC backend, from both ends."""

import ctypes
import signal
import socket
import struct
from collections.abc import Sequence

from csp_edge import native
from csp_edge.errors import OptionError, ServerError

PORT = 50052
_TIMEOUT_S = 5.0

# what a client says first, and what comes back: version, and transports beside TCP (none)
_HELLO = struct.pack("<BQ24x", 14, 24)
_N_HELLO_BYTES = 8 + 4 + 24


class Servers:
    """Connections to RPC servers, whose devices a model's layers go to. To be closed after it.

    Args:
        endpoints: "host:port" each, IPv4.

    Raises:
        OptionError: they are not of this form.
        ServerError: one of them can't be reached, is at work for another process, or speaks another
            version of the protocol, or all have too many devices.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        if not isinstance(endpoints, list | tuple) or not all(
            isinstance(endpoint, str) for endpoint in endpoints
        ):
            raise OptionError(f"rpc={endpoints!r}: give a list like ['192.168.1.2:{PORT}']")
        self.endpoints = list(dict.fromkeys(_resolve(endpoint) for endpoint in endpoints))
        for endpoint in self.endpoints:
            if not native.csp_rpc_is_connected(endpoint.encode()):
                _say_hello(endpoint)
        names = (ctypes.c_char_p * len(self.endpoints))(*(e.encode() for e in self.endpoints))
        self._rpc, why = native.explained(native.csp_rpc_init, names, len(names))
        if not self._rpc:
            listed = ", ".join(self.endpoints)
            raise ServerError(f"RPC servers {listed}: {why or 'one of them lends no device'}")
        try:
            self.check()
        except ServerError:
            self.close()
            raise

    @property
    def devices(self) -> int:
        """Theirs and the GPUs of this machine, for llama.cpp's model parameters."""
        return int(native.csp_rpc_devices(self._rpc))

    def check(self) -> None:
        """Make sure that what was computed until now is theirs.

        Raises:
            ServerError: the connection to one of them is lost.
        """
        for endpoint in self.endpoints:
            if not native.csp_rpc_is_connected(endpoint.encode()):
                raise ServerError(
                    f"the connection to the RPC server {endpoint} is lost, and the layers that it "
                    "held: start it again, close what used it, and load the model anew"
                )

    def close(self) -> None:
        native.csp_rpc_free(self._rpc)
        self._rpc = None


def serve(host: str, port: int, n_threads: int) -> None:
    """Lend this machine's GPUs, or else its CPU, to one process at a time, until killed.

    ggml's server trusts its clients: listen where only trusted machines are. Call it from the main
    thread of a process that does nothing else.

    Raises:
        OptionError: there is no such address, or the port is taken.
        ServerError: the server ended.
    """
    if not 1 <= n_threads <= 512:
        raise OptionError(f"threads={n_threads}: give an integer from 1 to 512")
    endpoint = _resolve(f"{host}:{port}")
    try:
        socket.create_server((endpoint.split(":")[0], port)).close()
    except OSError as error:
        raise OptionError(f"can't listen on {endpoint}: {error.strerror}") from None
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own waits for C to return
    _, why = native.explained(native.csp_rpc_serve, endpoint.encode(), n_threads)
    raise ServerError(
        f"the RPC server on {endpoint} ended: {why or 'it could not accept a client'}"
    )


def _resolve(endpoint: str) -> str:
    """With the host's address for its name."""
    host, colon, port = endpoint.partition(":")
    if not (
        host
        and colon
        and port.isascii()
        and port.isdigit()
        and len(port) <= 5
        and 0 < int(port) < 2**16
    ):
        raise OptionError(f"RPC server {endpoint!r}: give HOST:PORT, like 192.168.1.2:{PORT}")
    try:
        return f"{socket.gethostbyname(host)}:{int(port)}"
    except (OSError, TypeError, UnicodeError):  # TypeError: a NUL in it
        raise OptionError(f"RPC server {endpoint!r}: no host of this name is known") from None


def _say_hello(endpoint: str) -> None:
    """Make sure that a server answers: llama.cpp would wait for it without end."""
    host, port = endpoint.split(":")
    try:
        with socket.create_connection((host, int(port)), _TIMEOUT_S) as connection:
            connection.sendall(_HELLO)
            with connection.makefile("rb") as file:
                answer = file.read(_N_HELLO_BYTES)
    except TimeoutError:
        raise ServerError(
            f"RPC server {endpoint}: no answer in {_TIMEOUT_S:.0f} s: it serves one process at a "
            "time, and may be at work for another"
        ) from None
    except OSError as error:
        raise ServerError(
            f"RPC server {endpoint}: {error.strerror or error}: start `csp-edge rpc-server` there"
        ) from None
    if len(answer) < _N_HELLO_BYTES or answer[:8] != struct.pack("<Q", _N_HELLO_BYTES - 8):
        raise ServerError(f"RPC server {endpoint}: what listens there is no RPC server of ggml's")
