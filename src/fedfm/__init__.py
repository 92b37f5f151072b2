"""fedfm: federated training, adaptation, evaluation and audit of foundation models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedfm.core.method import Method
    from fedfm.core.plan import Training
    from fedfm.data import Population, federate, from_datasets, from_rows
    from fedfm.federation import Federation
    from fedfm.methods.centralised import Centralised
    from fedfm.methods.fedavg import FedAvg
    from fedfm.methods.local_only import LocalOnly
    from fedfm.methods.lora.fedit import FedIT
    from fedfm.models import load
    from fedfm.sample import Poisson, Uniform
    from fedfm.spaces import Full, LoRA
    from fedfm.tasks import CausalLM, Chat, Classify

__version__ = "0.1.0"

# Where each public name lives; loaded when first used, so that `import fedfm` takes no time.
_HOMES = {
    "CausalLM": "fedfm.tasks",
    "Centralised": "fedfm.methods.centralised",
    "Chat": "fedfm.tasks",
    "Classify": "fedfm.tasks",
    "FedAvg": "fedfm.methods.fedavg",
    "FedIT": "fedfm.methods.lora.fedit",
    "Federation": "fedfm.federation",
    "Full": "fedfm.spaces",
    "LoRA": "fedfm.spaces",
    "LocalOnly": "fedfm.methods.local_only",
    "Method": "fedfm.core.method",
    "Poisson": "fedfm.sample",
    "Population": "fedfm.data",
    "Training": "fedfm.core.plan",
    "Uniform": "fedfm.sample",
    "federate": "fedfm.data",
    "from_datasets": "fedfm.data",
    "from_rows": "fedfm.data",
    "load": "fedfm.models",
}

__all__ = [
    "CausalLM",
    "Centralised",
    "Chat",
    "Classify",
    "FedAvg",
    "FedIT",
    "Federation",
    "Full",
    "LoRA",
    "LocalOnly",
    "Method",
    "Poisson",
    "Population",
    "Training",
    "Uniform",
    "federate",
    "from_datasets",
    "from_rows",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedfm' has no attribute {name!r}")
