"""Files that are whole or absent, and names that stay in their folder."""

from __future__ import annotations

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedfm.errors import StoreError
from fedfm.store import files
from fedfm.store.files import safe_name, write_bytes, write_json, writing


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_bytes_are_written_and_replaced_and_folders_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.bin"
    for durable in (True, False):
        write_bytes(path, b"one", durable=durable)
        assert path.read_bytes() == b"one"
        write_bytes(path, b"two", durable=durable)
        assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]  # nothing temporary stays


def test_a_full_disk_leaves_the_old_content_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        write_bytes(path, b"new")
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device. Free space or mend the permissions, then go on with --resume; "
        "or choose another output_dir."
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("method", ["open", "replace", "mkdir"])
def test_a_failure_at_any_step_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr(Path, method, full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"


def test_a_half_written_file_never_has_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The process dies while the file is flushed: what stands there then?
    path = tmp_path / "x.bin"

    def die(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert not path.exists()


def test_durable_writes_wait_for_the_disk_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, real = tmp_path / "x.bin", [], os.fsync

    def fsync(handle: int) -> None:
        seen.append(path.exists())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(path, b"new")
    assert seen == [False, True]  # the content, then the folder
    write_bytes(path, b"newer", durable=False)
    assert len(seen) == 2


def test_json_is_readable_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5], "where": Path("some/x")})
    assert json.loads(path.read_text()) == {"a": [1, 2.5], "where": "some/x"}
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == [1, 2.5]


def test_writing_lets_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), writing(Path("x")):
        _ = 1 / 0
    with pytest.raises(StoreError, match="cannot write x: odd"), writing(Path("x")):
        raise OSError("odd")  # without a strerror


NAMES = [
    "ann",
    "Ann",
    "a/b",
    "a%2Fb",
    "a b",
    "a_b",
    "a-b",
    "a+b",
    "..",
    ".",
    "...",
    "../../etc/passwd",
    "/etc/passwd",
    "a\\b",
    "C:\\x",
    "nul\0byte",
    "line\nbreak",
    "größe",
    "grösse",
    "客户",
    "~",
    "~root",
    ".hidden",
    "x" * 300,
    "x" * 299 + "y",
    "客" * 100,
    "客" * 99 + "户",
    "." * 100,
    "",
    "%",
    "%25",
    "\udc80",
    "\udc81",
    "\udc80" * 100,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_harmless_path_component(tmp_path: Path, name: str) -> None:
    safe = safe_name(name)
    assert 0 < len(safe) <= 255
    assert safe.isascii()
    assert not set(safe) & set("/\\\0\n .:")
    place = tmp_path / safe
    assert place.resolve().parent == tmp_path.resolve()
    place.mkdir()  # a file system takes it
    assert [p.name for p in tmp_path.iterdir()] == [safe]


def test_no_two_names_share_a_file() -> None:
    assert len({safe_name(name) for name in NAMES}) == len(NAMES)
    odd = [chr(i) for i in range(256)] + [f"%{i:02X}" for i in range(256)] + [f"{i:02X}" for i in range(16, 256)]
    assert len({safe_name(name) for name in odd}) == len(odd)


def test_the_longest_readable_name_and_the_first_shortened_one() -> None:
    assert safe_name("x" * 200) == "x" * 200
    short = safe_name("x" * 201)
    assert short.startswith("x" * 120)
    assert len(short) == 120 + 1 + 64 + 1  # the beginning, a mark, a SHA-256, a mark
    assert short == f"{'x' * 120}%{sha256(b'x' * 201).hexdigest()}%"


def test_the_empty_name_has_a_file_too() -> None:
    assert safe_name("") == f"%{sha256(b'').hexdigest()}%"


def test_nobody_can_choose_a_name_that_is_another_ones_shortened_form() -> None:
    for victim in ("a" * 300, "客" * 100, ""):
        beginning, digest = safe_name(victim)[:120], sha256(victim.encode()).hexdigest()
        guesses = [f"{beginning}{mark}{digest}{end}" for mark in ("-", "%", "%25", "") for end in ("", "%", "%25")]
        for guess in (*guesses, safe_name(victim), f"%{digest}%"):
            assert safe_name(guess) != safe_name(victim)


def test_a_folder_can_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[int] = []
    monkeypatch.setattr(os, "fsync", handles.append)
    files.sync_folder(tmp_path)
    assert len(handles) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handles[0])  # closed again
