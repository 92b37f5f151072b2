"""pfl: ``FederatedAveraging`` on the ``SimulatedBackend`` in one process.

    python benchmarks/speed/peers/pfl_peer.py JOB OUT.json

One model stays in memory and users are trained one after another, as pfl does in a process. A user's data set gives
batches padded to their longest example, so that pfl has no more work than others; the metrics that it computes before
and after local training in its first iteration are constants here, as nobody else evaluates. Weights in the mean are
numbers of examples, by pfl's own ``WeightByDatapoints``. The empty job adds 1 to all parameters in place of training.

The clock starts before ``run``, with the model in memory, and stops when it returns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from work import BEGAN, Tensors, Work, arguments, average

User = tuple[int, str]
"""Round (from 0) and client, so that a user's data are the batches of that round."""


class Net(torch.nn.Module):
    """What pfl trains, with the losses of all steps so far."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.losses: list[float] = []
        if work.kind == "empty":
            # The names of parameters may hold no dots.
            parameters = {name.replace(".", "_"): torch.nn.Parameter(t) for name, t in work.initial().items()}
            self.inner: Any = torch.nn.ParameterDict(parameters)
        else:
            self.inner = work.model().train()

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """The batch loss."""
        loss = self.inner(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def metrics(self, **batch: torch.Tensor) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {"nothing": Weighted(0.0, 1.0)}


class Batches(Dataset):
    """A user's data of a round.

    Args:
        work: the job.
        user: whose, and of which round.
    """

    def __init__(self, work: Work, user: User) -> None:
        super().__init__(raw_data=(), user_id=user[1])
        self._work = work
        self._user = user

    def __len__(self) -> int:
        return int(self._work.weight(self._user[1]))

    def iter(self, batch_size: int | None) -> Iterator[Tensors]:
        """The batches of the job; an empty one has a single batch of nothing."""
        if self._work.kind == "empty":
            yield {}
            return
        for examples in self._work.batches(*self._user):
            yield self._work.collate(examples)


class AddOne(FederatedAveraging):
    """Federated averaging whose local training adds 1 to all parameters."""

    def train_one_user(
        self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any
    ) -> tuple[Any, Metrics]:
        """The change, and no metrics."""
        with torch.no_grad():
            for parameter in model.variable_map.values():
                parameter.add_(1)
        return model.get_model_difference(initial_model_state), Metrics()


class Rounds(TrainingProcessCallback):
    """Notes the mean loss of each round; all clients do the same number of steps.

    Args:
        net: whose losses.
    """

    def __init__(self, net: Net) -> None:
        self._net = net
        self.losses: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Go on."""
        if found := self._net.losses:
            self.losses.append(sum(found) / len(found))
        self._net.losses = []
        return False, Metrics()


def main() -> None:
    """Run and write."""
    asked = arguments(["default"])
    work = Work.read(asked.job)
    net, args = Net(work), work.training

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        tuned = [p for p in parameters if p.requires_grad]
        return torch.optim.AdamW(tuned, lr=lr, weight_decay=args["weight_decay"], fused=True)

    trainable = [p for p in net.parameters() if p.requires_grad]
    # The mean of the changes is added as it is: plain averaging.
    model = PyTorchModel(net, optimizer, central_optimizer=torch.optim.SGD(trainable, lr=1.0))
    users = iter([(number, client) for number in range(work.rounds) for client in work.clients(number)])
    data = FederatedDataset(lambda user: Batches(work, user), lambda: next(users))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    rounds = Rounds(net)
    params = NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=work.rounds,
        train_cohort_size=len(work.clients(0)),
        val_cohort_size=0,
    )
    train_params = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=args.get("learning_rate", 1.0),
        local_batch_size=args.get("per_device_train_batch_size", 1),
        local_max_grad_norm=args.get("max_grad_norm"),
    )
    algorithm = (AddOne if work.kind == "empty" else FederatedAveraging)()
    began = time.time()
    algorithm.run(
        params,
        backend,
        model,
        train_params,
        NNEvalHyperParams(local_batch_size=1),
        callbacks=[rounds],
        send_metrics_to_platform=False,
    )
    done = time.time()
    losses = [average(dict(net.inner.items()))] if work.kind == "empty" else rounds.losses
    work.report(asked.out, "pfl", asked.mode, startup_s=began - BEGAN, train_s=done - began, losses=losses)


if __name__ == "__main__":
    main()
