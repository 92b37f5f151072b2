"""What a client does in :mod:`nvflare_peer`: NVFlare's Client API around the plain loop.

Runs in the client's own process, which keeps the model from round to round.
"""

from __future__ import annotations

import os
import sys

import nvflare.client as flare
import torch
from nvflare.client import FLModel
from plain import train
from work import Work, put, tuned


def main(folder: str) -> None:
    """Answer tasks until the run is over; the first one only asks whether the client is there."""
    # As many clients work at a time as there are cores, or more; threads of their own would only wait for each other.
    torch.set_num_threads(int(os.environ["PEER_CLIENT_THREADS"]))
    flare.init()
    work = Work.read(folder)
    client = list(work.about["clients"])[int(flare.get_site_name().removeprefix("site-")) - 1]
    model = None if work.kind == "empty" else work.model().train()
    while flare.is_running():
        if (task := flare.receive()) is None:
            break
        values, number = {name: torch.as_tensor(value) for name, value in task.params.items()}, task.current_round
        loss = 0.0
        if "there" in values:
            result = {"there": torch.zeros(1)}
        elif model is None:
            result = {name: t + 1 for name, t in values.items()}
        else:
            put(tuned(model), values)
            loss = train(work, model, number, client, bf16=False)
            result = {name: p.detach().clone() for name, p in tuned(model).items()}
        flare.send(
            FLModel(
                params={name: t.numpy() for name, t in result.items()},
                metrics={"loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": work.weight(client)},
            )
        )


main(sys.argv[1])
