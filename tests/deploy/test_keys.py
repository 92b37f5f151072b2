"""Keys that nobody else reads, and certificates that a real TLS handshake believes or not."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfm.deploy import keys
from fedfm.errors import RecipeError, StoreError

HOSTS = ["localhost", "*.sites.example.org", "127.0.0.1", "::1"]
HOSTNAME_MISMATCH, IP_MISMATCH, NO_ISSUER, EXPIRED = 62, 64, 20, 10
"""Codes of OpenSSL."""


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """A folder with an authority, a server's certificate and signing keys."""
    folder = tmp_path / "coordinator"
    keys.authority(folder, "trial")
    keys.server_certificate(folder, HOSTS)
    keys.signing_keys(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a site's keys."""
    folder = tmp_path / "site"
    keys.node_keys(folder)
    keys.signing_keys(folder)
    return folder


@pytest.fixture
def no_mask() -> Iterator[None]:
    """New files are open to everybody unless who makes them says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def handshake(folder: Path, authority: Path, host: str) -> bytes:
    """What a client that trusts ``authority`` alone is sent when it connects to the server as ``host``."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(20)

        def answer() -> None:
            with contextlib.suppress(OSError):  # the client went away, as it should when it does not believe
                line, _ = door.accept()
                line.settimeout(20)
                with line, server.wrap_socket(line, server_side=True) as secure:
                    secure.sendall(b"hello")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with (
                socket.create_connection(door.getsockname(), timeout=20) as line,
                client.wrap_socket(line, server_hostname=host) as secure,
            ):
                return secure.recv(5)
        finally:
            thread.join(20)
            assert not thread.is_alive()


def refusal(folder: Path, authority: Path, host: str) -> int:
    """For what a client that trusts ``authority`` alone refuses the server as ``host``."""
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(folder, authority, host)
    return int(caught.value.verify_code)


@pytest.mark.usefixtures("no_mask")
def test_private_files_and_new_folders_are_the_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    keys.authority(folder, "trial")
    keys.server_certificate(folder, HOSTS)
    keys.signing_keys(folder)
    keys.node_keys(folder)
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        "ca.key": 0o600,
        "server.key": 0o600,
        "signing.key": 0o600,
        "node.key": 0o600,
        "ca.pem": 0o644,
        "server.pem": 0o644,
        "signing.pub": 0o644,
        "node.pub": 0o644,
    }


@pytest.mark.usefixtures("no_mask")
def test_a_private_file_is_closed_before_it_holds_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = {}, os.fdopen

    def fdopen(handle: int, how: str) -> object:
        status = os.fstat(handle)
        seen[Path(f"/proc/self/fd/{handle}").resolve().name] = stat.S_IMODE(status.st_mode), status.st_size
        return real(handle, how)

    monkeypatch.setattr(os, "fdopen", fdopen)
    keys.signing_keys(tmp_path)
    keys.node_keys(tmp_path)
    keys.authority(tmp_path, "trial")
    keys.server_certificate(tmp_path, HOSTS)
    private = {name: found for name, found in seen.items() if name.endswith(".key")}
    assert private == dict.fromkeys(("signing.key", "node.key", "ca.key", "server.key"), (0o600, 0))


MAKERS: list[tuple[Callable[[Path], None], tuple[str, str]]] = [
    (lambda folder: keys.authority(folder, "trial"), ("ca.key", "ca.pem")),
    (lambda folder: keys.server_certificate(folder, HOSTS), ("server.key", "server.pem")),
    (keys.node_keys, ("node.key", "node.pub")),
    (keys.signing_keys, ("signing.key", "signing.pub")),
]


@pytest.mark.parametrize(("make", "names"), MAKERS, ids=["authority", "server", "node", "signing"])
@pytest.mark.parametrize("left", [0, 1], ids=["private left", "public left"])
def test_nothing_is_replaced(tmp_path: Path, make: Callable[[Path], None], names: tuple[str, str], left: int) -> None:
    if names[0] == "server.key":
        keys.authority(tmp_path, "trial")
    make(tmp_path)
    (tmp_path / names[1 - left]).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StoreError) as caught:
        make(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / names[left]} exists, and keys are never replaced. Move it away if a new one is to be made."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "signing.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="never replaced"):
        keys.signing_keys(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*signing\.key: No space left on device"):
        keys.signing_keys(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(StoreError, match=r"cannot make .*x: File exists"):
        keys.signing_keys(tmp_path / "x")


def test_the_authority(coordinator: Path) -> None:
    found = certificate(coordinator / "ca.pem")
    get = found.extensions.get_extension_for_class
    assert found.subject == found.issuer
    assert [a.value for a in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["trial"]
    assert get(x509.BasicConstraints).critical
    assert get(x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    usage = get(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert get(x509.SubjectKeyIdentifier).value == x509.SubjectKeyIdentifier.from_public_key(found.public_key())
    span = found.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=3649) < span <= timedelta(days=3650)
    assert found.not_valid_before_utc < datetime.now(UTC)
    key = load_pem_private_key((coordinator / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert (coordinator / "ca.key").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert key.public_key() == found.public_key()
    found.verify_directly_issued_by(found)


def test_the_servers_certificate(coordinator: Path) -> None:
    text = (coordinator / "server.pem").read_text()
    assert text.count("BEGIN CERTIFICATE") == 1
    assert text.endswith("-----END CERTIFICATE-----\n")
    found, issuer = certificate(coordinator / "server.pem"), certificate(coordinator / "ca.pem")
    found.verify_directly_issued_by(issuer)
    get = found.extensions.get_extension_for_class
    names = get(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "*.sites.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert list(get(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert get(x509.BasicConstraints).value == x509.BasicConstraints(ca=False, path_length=None)
    of_issuer = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert get(x509.AuthorityKeyIdentifier).value.key_identifier == of_issuer
    assert get(x509.SubjectKeyIdentifier).value == x509.SubjectKeyIdentifier.from_public_key(found.public_key())
    key = load_pem_private_key((coordinator / "server.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == found.public_key()
    assert key.public_key() != issuer.public_key()


@pytest.mark.parametrize("host", ["localhost", "north.sites.example.org", "127.0.0.1", "::1"])
def test_clients_believe_it_under_its_names(coordinator: Path, host: str) -> None:
    assert handshake(coordinator, coordinator / "ca.pem", host) == b"hello"


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("example.org", HOSTNAME_MISMATCH),
        ("a.b.sites.example.org", HOSTNAME_MISMATCH),
        ("127.0.0.2", IP_MISMATCH),
        ("::2", IP_MISMATCH),
    ],
)
def test_clients_do_not_believe_it_under_others(coordinator: Path, host: str, why: int) -> None:
    assert refusal(coordinator, coordinator / "ca.pem", host) == why


def test_clients_do_not_believe_another_authority_of_the_same_name(coordinator: Path, tmp_path: Path) -> None:
    keys.authority(tmp_path / "other", "trial")
    assert refusal(coordinator, tmp_path / "other" / "ca.pem", "localhost") == NO_ISSUER


def test_clients_believe_a_host_that_has_the_authoritys_name(tmp_path: Path) -> None:
    # Were subject and issuer one name, some libraries would take the certificate for one that signed itself.
    keys.authority(tmp_path, "localhost")
    keys.server_certificate(tmp_path, ["localhost"])
    assert handshake(tmp_path, tmp_path / "ca.pem", "localhost") == b"hello"


def test_clients_do_not_believe_it_when_it_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.authority(tmp_path, "trial")
    past = datetime.now(UTC) - timedelta(days=3)
    monkeypatch.setattr(keys, "_now", lambda: past)
    keys.server_certificate(tmp_path, ["localhost"], days=2)
    assert keys.expires(tmp_path) < datetime.now(UTC)
    assert refusal(tmp_path, tmp_path / "ca.pem", "localhost") == EXPIRED


def test_when_it_expires(tmp_path: Path) -> None:
    keys.authority(tmp_path, "trial")
    keys.server_certificate(tmp_path, ["localhost"], days=30)
    left = keys.expires(tmp_path) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    with pytest.raises(StoreError, match=r"there is no .*server\.pem"):
        keys.expires(tmp_path / "nowhere")
    (tmp_path / "server.pem").write_text("no certificate")
    with pytest.raises(StoreError, match=r"server\.pem must hold PEM"):
        keys.expires(tmp_path)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost:9092",
        "127.0.0.1:9092",
        "[::1]",
        "https://example.org",
        "a b",
        "-a.org",
        "a-.org",
        "a..b",
        "münchen.de",
        "256.0.0.1",
        "1.2.3",
        "a*.org",
        "x" * 64,
        ".".join(["x" * 60] * 5),
    ],
)
def test_what_is_no_host(tmp_path: Path, host: str) -> None:
    keys.authority(tmp_path, "trial")
    with pytest.raises(RecipeError, match="hosts must be DNS names or IP addresses without a port") as caught:
        keys.server_certificate(tmp_path, ["localhost", host])
    assert repr(host) in str(caught.value)
    assert not (tmp_path / "server.key").exists()


def test_a_long_name_and_one_given_twice(tmp_path: Path) -> None:
    long = ".".join(["x" * 60] * 4)
    keys.authority(tmp_path, "trial")
    keys.server_certificate(tmp_path, [long, "a", long])
    found = certificate(tmp_path / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == [long, "a"]


def test_other_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("", "x" * 65, "ü" * 33):
        with pytest.raises(RecipeError, match="name must have at least 1 and at most 64 bytes"):
            keys.authority(tmp_path, name)
    keys.authority(tmp_path, "ü" * 32)
    with pytest.raises(RecipeError, match="hosts must name at least one host"):
        keys.server_certificate(tmp_path, [])
    for days in (0, -1, 3651, 10**9):
        with pytest.raises(RecipeError, match=rf"days must be at least 1 and at most 36.*but is {days}"):
            keys.server_certificate(tmp_path, ["localhost"], days)
    assert {path.name for path in tmp_path.iterdir()} == {"ca.key", "ca.pem"}


def test_an_authority_that_is_absent_open_or_not_whole(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no .*ca\.key"):
        keys.server_certificate(tmp_path / "a", ["localhost"])
    assert not (tmp_path / "a").exists()
    keys.authority(tmp_path / "b", "trial")
    (tmp_path / "b" / "ca.key").chmod(0o644)
    with pytest.raises(StoreError, match=r"chmod 600 .*ca\.key"):
        keys.server_certificate(tmp_path / "b", ["localhost"])
    keys.authority(tmp_path / "c", "trial")
    shutil.copyfile(tmp_path / "b" / "ca.pem", tmp_path / "c" / "ca.pem")
    with pytest.raises(StoreError, match=r"ca\.key is not the key of .*ca\.pem"):
        keys.server_certificate(tmp_path / "c", ["localhost"])


def test_flowers_loaders_read_a_nodes_keys(site: Path) -> None:
    # flower-supernode reads the private key, flwr supernode register the public one, with these functions.
    key = load_ssh_private_key((site / "node.key").read_bytes(), None)
    shown = load_ssh_public_key((site / "node.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(shown, ec.EllipticCurvePublicKey)
    assert shown.curve.name == "secp384r1"
    assert key.public_key() == shown
    assert (site / "node.pub").read_text().startswith("ecdsa-sha2-nistp384 ")


def test_signing_keys_sign(site: Path, coordinator: Path) -> None:
    signature = keys.private(site / "signing.key").sign(b"message")
    keys.public(site / "signing.pub").verify(signature, b"message")
    with pytest.raises(InvalidSignature):
        keys.public(coordinator / "signing.pub").verify(signature, b"message")
    assert (site / "signing.key").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert (site / "signing.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_signing_key_that_others_may_open_is_not_used(site: Path, open_to: int) -> None:
    place = site / "signing.key"
    place.chmod(open_to)
    with pytest.raises(StoreError) as caught:
        keys.private(place)
    assert str(caught.value) == (
        f"{place} must be open to its owner alone (mode 0600), but has mode {open_to:04o}. Close it: chmod 600 {place}"
    )
    place.chmod(0o400)
    assert keys.private(place).sign(b"")
    assert keys.public(site / "signing.pub")  # that one is for all


def test_the_advice_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "north site"
    keys.signing_keys(folder)
    (folder / "signing.key").chmod(0o644)
    with pytest.raises(StoreError, match=r"chmod 600 '.*north site/signing\.key'$"):
        keys.private(folder / "signing.key")


def other_keys() -> dict[str, bytes]:
    """Private files of other sorts."""
    curve, edwards = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
    return {
        "another sort": curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "with a password": edwards.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
        "a public one": edwards.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "nothing": b"",
        "text": b"secret words\n",
    }


@pytest.mark.parametrize("sort", other_keys())
def test_a_file_that_holds_something_else(tmp_path: Path, sort: str) -> None:
    place = tmp_path / "signing.key"
    place.write_bytes(other_keys()[sort])
    place.chmod(0o600)
    wanted = "must hold an Ed25519 key" if sort == "another sort" else "must hold PEM without a password"
    with pytest.raises(StoreError, match=wanted) as caught:
        keys.private(place)
    assert "secret" not in str(caught.value)


def test_a_public_file_that_holds_something_else(tmp_path: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    place = tmp_path / "signing.pub"
    place.write_bytes(curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(StoreError, match="must hold an Ed25519 key"):
        keys.public(place)
    place.write_bytes(other_keys()["another sort"])
    with pytest.raises(StoreError, match="must hold PEM"):
        keys.public(place)


@pytest.mark.parametrize("load", [keys.private, keys.public])
def test_a_file_that_is_absent_or_a_folder(tmp_path: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(StoreError, match=r"there is no .*x\.key\. Make it: fedfm deploy certs"):
        load(tmp_path / "x.key")
    with pytest.raises(StoreError, match=r"cannot read .*: Is a directory"):
        load(tmp_path)
