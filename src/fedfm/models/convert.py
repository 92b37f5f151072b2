"""GGUF files, dequantised once and kept as safetensors.

Reading a quantised GGUF takes tens of seconds, reading the converted copy about one. The copy is float32 and holds
exactly the dequantised numbers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from fedfm.errors import ModelError

FORMAT = 1
"""Version of the converted copy; part of its folder's name."""


def cache_folder() -> Path:
    """``$FEDFM_CACHE``, or ``fedfm`` in the user's cache folder."""
    if chosen := os.environ.get("FEDFM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedfm"


def converted(file: Path) -> Path:
    """The folder with the converted copy of a GGUF file, made now if it is not there.

    Two processes may convert at once: each writes a folder of its own and the second one to finish drops its copy. A
    folder under the final name is always whole.

    Raises:
        ModelError: the file is no GGUF that transformers understands, or the copy cannot be written.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Without a dtype argument the linears come out as ordinary float32 layers.
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs the package gguf: pip install gguf.") from error
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{file} is not a GGUF file that transformers can read: {str(error).splitlines()[0]}"
        ) from error
    # The weights are plain float32 now, but the model still says that it is quantised and would refuse to be saved.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
