"""Real SuperNodes in front of servers that are not what they should be: nothing of what they say gets through.

The servers are sockets of this process, so that what arrives is seen byte for byte; one of them has a good certificate,
as otherwise nothing here would show anything.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedfm.deploy import bundle, keys, local
from fedfm.errors import FedfmError
from fedfm.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ASKED = b"POST /v1/fleet/activate-node"
"""What a SuperNode says first to a server that it believes."""
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Server:
    """Takes what it is sent and has nothing to give.

    Args:
        folder: with ``server.pem`` and ``server.key``; without one, it speaks no TLS.
    """

    def __init__(self, folder: Path | None) -> None:
        self.came: list[bytes] = []
        """What arrived in each connection, decrypted."""
        self.refused: list[str] = []
        """Why clients went away before they said anything."""
        self.raw: list[bytes] = []
        """How each connection began, as it was on the line."""
        self._context = None
        if folder:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._door = socket.create_server(("127.0.0.1", 0))
        self._door.settimeout(0.2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._door.getsockname()[1]}"

    def close(self) -> None:
        self._ended.set()
        self._thread.join(20)
        self._door.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                line, _ = self._door.accept()
                line.settimeout(10)
                with line:
                    self._answer(line)

    def _answer(self, line: socket.socket) -> None:
        try:
            self.raw.append(line.recv(1 << 16, socket.MSG_PEEK))
            if self._context is None:
                self.came.append(line.recv(1 << 16))
                line.sendall(NOT_FOUND)
                return
            with self._context.wrap_socket(line, server_side=True) as secure:
                # In TLS 1.3 a client that does not believe is noticed when it is read from.
                self.came.append(secure.recv(1 << 16))
                secure.sendall(NOT_FOUND)
        except OSError as error:
            self.refused.append(str(error))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and a good certificate."""
    folder = tmp_path_factory.mktemp("coordinator")
    keys.authority(folder, "trial")
    keys.server_certificate(folder, ["127.0.0.1", "localhost"])
    (folder / "flower").mkdir()
    return folder


def of_another_host(coordinator: Path, folder: Path) -> Path:
    """A certificate of the same authority, for another machine."""
    folder.mkdir()
    for name in ("ca.key", "ca.pem"):
        (folder / name).write_bytes((coordinator / name).read_bytes())
        (folder / name).chmod(0o600)
    keys.server_certificate(folder, ["fl.example.org", "127.0.0.2"])
    return folder


def of_another_authority(coordinator: Path, folder: Path) -> Path:
    """A certificate for this machine by an authority of the same name."""
    keys.authority(folder, "trial")
    keys.server_certificate(folder, ["127.0.0.1", "localhost"])
    return folder


def expired(coordinator: Path, folder: Path) -> Path:
    """The good certificate in all but its dates, which ended yesterday."""
    folder.mkdir()
    good = x509.load_pem_x509_certificate((coordinator / "server.pem").read_bytes())
    signer: Any = load_pem_private_key((coordinator / "ca.key").read_bytes(), None)
    now = datetime.now(UTC)
    draft = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(good.issuer)
        .public_key(good.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in good.extensions:
        draft = draft.add_extension(extension.value, extension.critical)
    (folder / "server.pem").write_bytes(draft.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes((coordinator / "server.key").read_bytes())
    return folder


WRONG: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "expired": (expired, "certificate has expired"),
    "another host": (of_another_host, "IP address mismatch|certificate is not valid for '127.0.0.1'"),
    "another authority": (of_another_authority, "certificate signature failure|unable to get local issuer certificate"),
}


@pytest.fixture(scope="module")
def visited(coordinator: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Server, str]]]:
    """Servers, each with what a SuperNode that was sent to it said until it ended. They go there side by side."""
    place = tmp_path_factory.mktemp("sites")
    folders: dict[str, Path | None] = {"good": coordinator, "no TLS": None}
    folders |= {name: make(coordinator, place / f"{name} server") for name, (make, _) in WRONG.items()}
    servers = {name: Server(folder) for name, folder in folders.items()}
    processes = local.Processes(place / "logs")
    try:
        for name, server in servers.items():
            site = place / name
            keys.node_keys(site)
            (site / "ca.pem").write_bytes((coordinator / "ca.pem").read_bytes())
            # No app is started here: the process that would start them is left out.
            command = [*local.supernode(site, server.address, local.free_port()), "--isolation", "process"]
            processes.start(name, command, local.environment(site / "flower"))
        until = time.monotonic() + 90
        while any(process.poll() is None for process in processes.running.values()) and time.monotonic() < until:
            time.sleep(0.2)
        said = {name: (processes.logs / f"{name}.log").read_text(errors="replace") for name in servers}
        codes = {name: process.poll() for name, process in processes.running.items()}
        assert all(codes.values()), (codes, said)  # all have ended, and not well
        yield {name: (server, said[name]) for name, server in servers.items()}
    finally:
        processes.end()
        for server in servers.values():
            server.close()


def test_a_server_with_a_good_certificate_is_believed(visited: dict[str, tuple[Server, str]]) -> None:
    server, said = visited["good"]
    assert server.came[0].startswith(ASKED)
    assert "certificate verify failed" not in said


@pytest.mark.parametrize("name", WRONG)
def test_a_server_with_another_certificate_hears_nothing(visited: dict[str, tuple[Server, str]], name: str) -> None:
    server, said = visited[name]
    assert server.refused
    assert not [data for data in server.came if data]
    assert "Failed to initialize the connection" in said
    assert re.search(WRONG[name][1], said)


@pytest.mark.parametrize("name", [*WRONG, "good", "no TLS"])
def test_nothing_is_said_in_the_clear(visited: dict[str, tuple[Server, str]], name: str) -> None:
    """Nor to a server that speaks no TLS: it hears the wish for it, and no more."""
    server, _ = visited[name]
    assert wishes_tls(server)
    if name == "no TLS":
        assert server.came == server.raw


def wishes_tls(server: Server) -> bool:
    """Whether all connections began with a ClientHello."""
    return bool(server.raw) and all(d[:2] == b"\x16\x03" and b"HTTP" not in d and b"/v1/" not in d for d in server.raw)


@pytest.mark.parametrize("name", WRONG)
def test_the_coordinators_commands_believe_no_such_server_either(
    coordinator: Path, recipe: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    """What ``fedfm deploy`` and ``flwr`` say to a SuperLink starts programs there."""
    server = Server(WRONG[name][0](coordinator, tmp_path / "server"))
    try:
        bundle.init(tmp_path / "federation", recipe(), ["north"], server.address)
        (tmp_path / "federation" / "coordinator" / "ca.pem").write_bytes((coordinator / "ca.pem").read_bytes())
        with pytest.raises(FedfmError, match=r"unavailable|certificate"):
            local.flwr(tmp_path / "federation", "supernode", "list", "fedfm")
    finally:
        server.close()
    assert server.refused
    assert wishes_tls(server)
    assert not [data for data in server.came if data]


def test_who_speaks_no_tls_is_not_answered_by_the_superlink(coordinator: Path, tmp_path: Path) -> None:
    """Nor who trusts another authority, expects another host, or offers a TLS that is out of date."""
    address = f"127.0.0.1:{local.free_port()}"
    host, _, port = address.partition(":")
    processes = local.Processes(tmp_path / "logs")
    try:
        command = [*local.superlink(coordinator, address), "--isolation", "process"]
        processes.start("superlink", command, local.environment(tmp_path / "flower"), lambda: local.reachable(address))
        trusting = ssl.create_default_context(cafile=str(coordinator / "ca.pem"))
        assert health(http.client.HTTPSConnection(host, int(port), timeout=20, context=trusting)) == 200
        with pytest.raises((http.client.HTTPException, OSError)):
            health(http.client.HTTPConnection(host, int(port), timeout=20))
        other = ssl.create_default_context(cafile=str(of_another_authority(coordinator, tmp_path / "other") / "ca.pem"))
        with pytest.raises(ssl.SSLCertVerificationError):
            health(http.client.HTTPSConnection(host, int(port), timeout=20, context=other))
        with (
            pytest.raises(ssl.SSLCertVerificationError, match="mismatch"),
            socket.create_connection((host, int(port)), timeout=20) as line,
        ):
            trusting.wrap_socket(line, server_hostname="fl.example.org")
        old = ssl.create_default_context(cafile=str(coordinator / "ca.pem"))
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError, match=r"(?i)version|alert|EOF"):
            health(http.client.HTTPSConnection(host, int(port), timeout=20, context=old))
        processes.check()
    finally:
        processes.end()


def health(line: http.client.HTTPConnection) -> int:
    """The status with which a server says that it is well."""
    with contextlib.closing(line):
        line.request("GET", "/health")
        return line.getresponse().status
