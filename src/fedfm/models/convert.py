"""GGUF files, dequantised once and kept as safetensors.

Reading a quantised GGUF takes tens of seconds, reading the converted copy about one. The copy is float32 and holds
exactly the dequantised numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from fedfm.errors import ModelError
from fedfm.models.architectures import require_weights
from fedfm.wire.admit import brief

FORMAT = 2
"""Version of the converted copy; part of its folder's name."""


def cache_folder() -> Path:
    """``$FEDFM_CACHE``, or ``fedfm`` in the user's cache folder."""
    if chosen := os.environ.get("FEDFM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedfm"


def converted(file: Path) -> Path:
    """The folder with the converted copy of a GGUF file, made now if it is not there.

    Two processes may convert at once: each writes a folder of its own and the second one to finish drops its copy. A
    folder under the final name is always whole.

    Raises:
        ModelError: the file is no GGUF that transformers understands, or the copy cannot be written.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror or error}.") from error
    if magic != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file that transformers can read: it begins with {magic!r}.")
    final = cache_folder() / "models" / f"{file.stem}-{digest}-v{FORMAT}"
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=final.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the converted copy of {file} to {final.parent}: {error.strerror}. "
            "Set FEDFM_CACHE to another folder."
        ) from error
    try:
        _convert(file, part)
        part.chmod(0o755)
        _sync(part)
        try:
            part.rename(final)
        except OSError:
            # Another process was faster; its copy is the same.
            if not final.exists():
                raise
    except OSError as error:
        raise ModelError(
            f"cannot write the converted copy of {file} to {final}: {error.strerror or error}. "
            "Free space (about 4 bytes a parameter), or set FEDFM_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


_LEAST = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 8: 8, 9: 12, 10: 8, 11: 8, 12: 8}
"""Least bytes of a GGUF value by its type: 8 is a text after its length, 9 an array after its type and length."""
_TEXT, _ARRAY = 8, 9


def _check_header(file: Path) -> None:
    """Walk the header of a GGUF file, comparing every length that it claims with the bytes that are left.

    Readers count to what a header claims, without end if it lies.

    Raises:
        ModelError: a length cannot be true, or the header is none that readers know.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(data)
        except (struct.error, ValueError, KeyError) as error:
            reason = f"it has a value of unknown type {error}" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{file} is damaged, or no GGUF file: {reason}. Fetch it anew.") from error


def _walk(data: mmap.mmap) -> None:
    at = 4

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def within(count: int, size: int, what: str) -> int:
        if count * size > len(data) - at:
            raise ValueError(f"it claims {count} {what} in the {len(data) - at} bytes that are left")
        return count

    def skip(size: int) -> None:
        nonlocal at
        at += within(size, 1, "bytes")

    def value(kind: int, depth: int = 0) -> None:
        if kind == _TEXT:
            skip(number("<Q"))
        elif kind == _ARRAY:
            if depth == 4:
                raise ValueError("its arrays are nested more than 4 deep")
            member, count = number("<I"), number("<Q")
            within(count, _LEAST[member], "members of an array")
            if member in (_TEXT, _ARRAY):
                for _ in range(count):
                    value(member, depth + 1)
            else:
                skip(count * _LEAST[member])
        else:
            skip(_LEAST[kind])

    if (version := number("<I")) not in (2, 3):
        raise ValueError(f"its version is {version}, and only 2 and 3 can be read")
    tensors, keys = number("<Q"), number("<Q")
    # A tensor has at least a length, a number of dimensions, a type and an offset; a key a length, a type and a byte.
    within(tensors, 24, "tensors")
    within(keys, 13, "keys")
    for _ in range(keys):
        value(_TEXT)
        value(number("<I"))
    for _ in range(tensors):
        value(_TEXT)
        skip(8 * number("<I"))
        skip(4 + 8)


def _convert(file: Path, folder: Path) -> None:
    import transformers

    _check_header(file)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "local_files_only": True,
    }
    # Versions that can keep weights packed must be told to unpack them; older ones always do. Without a dtype argument
    # the linears come out as ordinary layers, float16 where the file says so.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    kind = transformers.AutoModelForCausalLM
    try:
        # The progress bar of unpacking has no switch of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            config = transformers.AutoConfig.from_pretrained(**source)
            require_weights(kind, config, file.stat().st_size, str(file))
            model = kind.from_pretrained(**source, **unpack).float()
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        _split_digits(tokenizer, file)
        length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(length, tokenizer.model_max_length)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install gguf.") from error
    except Exception as error:
        # What a lie in the file breaks comes out of the readers as any error; the tokenizers raise a bare Exception.
        reason = brief(str(error)) or type(error).__name__
        raise ModelError(f"{file} is not a GGUF file that transformers can read: {reason}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any, file: Path) -> None:
    """Give the tokenizer of a SmolLM file its split at single digits, which transformers drops when it reads GGUF.

    Without it the spaces before a number become other tokens than those that the model was trained on.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _sync(folder: Path) -> None:
    """Wait until the disk has the files: a folder under its final name must be whole after a power cut too."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
