"""GGUF files, dequantised once and kept as safetensors.

Reading a quantised GGUF takes tens of seconds, reading the converted copy about one. The copy is float32 and holds
exactly the dequantised numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fedfm.errors import ModelError

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


def _convert(file: Path, folder: Path) -> None:
    import transformers

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
    try:
        # The progress bar of unpacking has no switch of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, **unpack).float()
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install gguf.") from error
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{file} is not a GGUF file that transformers can read: {' '.join(str(error).split())[:300]}"
        ) from error
    _split_digits(tokenizer, file)
    length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(length, tokenizer.model_max_length)
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
