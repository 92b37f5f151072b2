"""FedHDS: Qin et al. 2025, Federated Data-Efficient Instruction Tuning for Large Language Models (arXiv 2410.10926).

Most rows of a client resemble other rows, its own or those of others, and tuning on all of them costs time and
overfits. Before it trains in a round, a client groups its rows by the states that the newest model has for them in all
of its layers, and sends the centroid of each group. The server groups all centroids and keeps one of each group of
groups. Clients train on the rows nearest to the kept centroids, and on nothing else.

Differences from the paper:
- What was not in the abstract was taken from the authors' code: the states of the last token in all layers in a row,
  t-SNE to two dimensions on each client by itself, HDBSCAN, ``min_cluster`` 5 (2 for Dolly), 2 on the server. That each
  client has coordinates of its own, by which the server then compares clients, is the paper's. Here t-SNE begins with
  the same seed everywhere, so that at least equal rows get equal coordinates.
- Where HDBSCAN sees no cluster in a client's rows, they are one; the paper's client would take no part. Where it sees
  none in the centroids, the server keeps all of them; the paper's code would set the adapter to zero.
- HDBSCAN is that of scikit-learn, which counts a point among its own neighbours, so that two equal centroids are a
  cluster. The library of the paper's code asks for one neighbour more, and may not see them.
- With a fixed number of steps, few rows are seen again and again; ``num_train_epochs`` makes the work follow the rows,
  as the paper does.
- FedHDS-Turbo, which takes the states of a smaller model, is not here, because one model is in memory.
- Which of its centroids are kept stays unknown to the others; the code does not say how clients are told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedfm.core import seeds, trees
from fedfm.core.jobs import Fit, Job
from fedfm.core.method import Client, Method, Paper, Server, State, Work
from fedfm.core.traits import Trait, Traits
from fedfm.core.update import Kind, Tensors, Update
from fedfm.errors import BadUpdate, DataError, NoUpdates, require
from fedfm.tasks.task import Batch, collate
from fedfm.train.rows import OnRows

if TYPE_CHECKING:
    from fedfm.train.trainer import Trainer

PERPLEXITY = 30
"""Of t-SNE: about how many neighbours count; fewer rows have fewer."""


@dataclass(frozen=True)
class States(Job):
    """What the model has for each training example in all of its layers, one after the other, ``[N, (L + 1) D]``.

    Args:
        pooling: the state of the last token, or the mean of all.
    """

    pooling: Literal["last", "mean"] = "last"

    def run(self, trainer: Trainer, client: Client) -> torch.Tensor:
        """Run the model without its head, and without dropout."""
        examples = trainer.examples(client, "train")
        trainer.space.load(self.tensors, self.patches)
        trainer.mode(training=False)
        found: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        with torch.no_grad(), trainer.autocast():
            for chunk in trainer.chunks(examples):
                batch = collate([examples[i] for i in chunk], trainer.pad, trainer.device)
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask}
                layers = trainer.loaded.model.base_model(**inputs, output_hidden_states=True).hidden_states
                pooled = torch.cat([self._pooled(states.float(), batch) for states in layers], 1)
                for i, row in zip(chunk, pooled.cpu(), strict=True):
                    found[i] = row
                trainer.pulse(0)
        return torch.stack(found)

    def _pooled(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One state for each example, ``[B, D]``, of states ``[B, T, D]``."""
        if self.pooling == "last":
            return states[torch.arange(len(states)), batch.lengths - 1]
        return (states * batch.mask[..., None]).sum(1) / batch.lengths[:, None]


@dataclass(frozen=True)
class FedHDS(Method):
    """$\\theta \\leftarrow \\theta + \\sum_k |\\tilde D_k| \\Delta_k / \\sum_k |\\tilde D_k|$, where $\\Delta_k$ is
    learnt on $\\tilde D_k$ alone: of each cluster of all clients' centroids, the one nearest to its middle is kept, and
    the row nearest to that one belongs to the set of its owner.

    Args:
        min_cluster: rows of a client that make a cluster, at least; the paper takes 5, and 2 for Dolly.
        dimensions: of the coordinates in which rows are clustered.
        reduction: how states become coordinates, t-SNE or principal components.
        pooling: which state of a row is taken: that of its last token, or the mean of all.
        noise: standard deviation of Gaussian noise on centroids, which then go through tanh first; 0 means neither.
    """

    paper: ClassVar[Paper | None] = Paper(
        title="Federated Data-Efficient Instruction Tuning for Large Language Models",
        authors="Qin, Wu, He, Deng",
        year=2025,
        venue="Findings of ACL",
        arxiv="2410.10926",
    )
    phases: ClassVar[tuple[str, ...]] = ("select", "local")
    traits: ClassVar[Traits] = Method.traits - {Trait.ONE_ASK, Trait.FORGETFUL, Trait.ONE_FIT}
    needs: ClassVar[Traits] = frozenset({Trait.VISIBLE})  # The centroids are read one by one.
    spaces: ClassVar[tuple[str, ...]] = ("lora",)
    up: ClassVar[str] = "centroids in a few dimensions; then, from who has a chosen row, the change of the adapter"
    down: ClassVar[str] = "the adapter; then, to who has a chosen row, which of its centroids are kept, and the adapter"

    min_cluster: int = 5
    dimensions: int = 2
    reduction: Literal["tsne", "pca"] = "tsne"
    pooling: Literal["last", "mean"] = "last"
    noise: float = 0.0

    def __post_init__(self) -> None:
        require(self, "min_cluster", self.min_cluster >= 2, "at least 2")
        # The fast form of t-SNE, the only one that many rows allow, has at most three.
        require(self, "dimensions", 1 <= self.dimensions <= 3, "1 to 3")
        require(self, "reduction", self.reduction in ("tsne", "pca"), "tsne or pca")
        require(self, "pooling", self.pooling in ("last", "mean"), "last or mean")
        require(self, "noise", 0 <= self.noise < float("inf"), "at least 0 and finite")

    def kind(self, phase: str) -> Kind:
        return self.sends if phase == "local" else Kind.KNOWLEDGE

    def expects(self, phase: str, message: Tensors) -> Tensors | None:
        """Changes of the weights; how many centroids a client has, only the client knows."""
        return trees.marked("", message) if phase == "local" else None

    def select(self, client: Client, message: Tensors) -> Work:
        """Send the centroids of the client's clusters, and remember which row is nearest to each."""
        states = yield States(self.compose(client, message), pooling=self.pooling)
        if not states.isfinite().all():
            raise DataError("the model's states of its rows are not finite")
        seed = seeds.derive(client.space.seed, client.round, "method", "coordinates") % 2**32
        places = coordinates(states.double().numpy(), self.dimensions, self.reduction, seed)
        labels, centroids = clusters(places, self.min_cluster)
        if not len(centroids):
            labels, centroids = np.zeros_like(labels), places.mean(0, keepdims=True)
        client.keep(trees.mark("own", {"rows": torch.tensor(nearest(places, labels, centroids))}))
        sent = torch.from_numpy(centroids).float()
        if self.noise:
            sent = sent.tanh() + self.noise * torch.randn(sent.shape, generator=client.draw("noise"))
        return Update({"centroids": sent}, weight=client.member.examples, kind=Kind.KNOWLEDGE)

    def read(self, phase: str, update: Update, message: Tensors) -> Update:
        """See that it holds centroids."""
        if phase == "select":
            centroids = update.tensors.get("centroids")
            if len(update.tensors) != 1 or centroids is None or centroids.shape[1:] != (self.dimensions,):
                raise BadUpdate(f"it does not hold centroids of {self.dimensions} dimensions")
        return update

    def round(self, server: Server, state: State) -> State:
        """Ask for centroids, then ask those to train who have a row that was chosen."""
        messages = {member: self.message(state, member) for member in server.members}
        centroids = {update.member: update.tensors["centroids"] for update in server.ask("select", messages)}
        if not centroids:
            raise NoUpdates("nobody's centroids could be used")
        kept = chosen(centroids)
        asked = {
            member: {**message, **trees.mark("kept", {"clusters": torch.tensor(kept[member.id])})}
            for member, message in messages.items()
            if member.id in kept
        }
        return self.apply(state, self.combine(state, server.ask("local", asked), server.mean), server.rule)

    def local(self, client: Client, message: Tensors) -> Work:
        """Train on the rows nearest to the client's kept centroids; their number is the weight of the change."""
        before = trees.marked("", message)
        rows = client.private["own:rows"][message["kept:clusters"]].tolist()
        job = Fit(self.compose(client, message), train=self.train, terms=self.terms(client, message))
        fitted = yield OnRows({}, job, tuple(sorted(rows)))
        client.keep({})
        after = {name: fitted.tensors[name] for name in before}
        metrics = {**fitted.metrics, "rows": len(rows)}
        return Update(trees.subtract(after, before), len(rows), metrics, self.sends)


def coordinates(states: np.ndarray, dimensions: int, reduction: str, seed: int) -> np.ndarray:
    """States ``[N, D]`` in a few dimensions, ``[N, dimensions]``; all in one place where there are too few of them."""
    from sklearn.decomposition import PCA  # takes a second to import, which no other method should have to wait for
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(states) <= dimensions:
        return np.zeros((len(states), dimensions))
    # In one thread, because sums of t-SNE that threads add up in another order end in another picture.
    with threadpool_limits(limits=1):
        if reduction == "pca":
            return PCA(dimensions, random_state=seed).fit_transform(states)
        close = min(PERPLEXITY, len(states) - 1)
        return TSNE(dimensions, perplexity=close, random_state=seed).fit_transform(states).astype(np.float64)


def clusters(places: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """HDBSCAN: the cluster of each place ``[N]``, below 0 for none, and the centroids ``[C, D]``.

    Args:
        places: ``[N, D]``.
        least: places of a cluster.
    """
    from sklearn.cluster import HDBSCAN

    if len(places) < least:
        return np.full(len(places), -1), places[:0]
    found = HDBSCAN(min_cluster_size=least, store_centers="centroid", copy=True).fit(places)
    return found.labels_, np.asarray(found.centroids_, dtype=places.dtype).reshape(-1, places.shape[1])


def nearest(places: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> list[int]:
    """For each cluster, which of its places is nearest to its centroid."""
    found = []
    for number, centroid in enumerate(centroids):
        inside = np.flatnonzero(labels == number)
        found.append(int(inside[np.linalg.norm(places[inside] - centroid, axis=1).argmin()]))
    return found


def chosen(centroids: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The positions of each client's kept centroids, for clients that have any: one centroid for each cluster of all,
    or all where no clusters are seen."""
    owners = [(id, position) for id, own in centroids.items() for position in range(len(own))]
    places = torch.cat(list(centroids.values())).double().cpu().numpy()
    labels, centres = clusters(places, 2)
    best = nearest(places, labels, centres) if len(centres) else range(len(owners))
    kept: dict[str, list[int]] = {}
    for at in sorted(best):
        kept.setdefault(owners[at][0], []).append(owners[at][1])
    return kept
