"""The comparison with peers: all get the batches that fedfm draws, and what is made of their seconds is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.speed import compare, prepare
from benchmarks.speed.memory import Watch
from fedfm import Chat, Federation, FedIT, Training, Uniform, load
from fedfm.evaluate import Evaluation
from fedfm.tasks.task import Batch, Losses, TaskModel
from fedfm.train import Trainer
from tests.conftest import dialogue

PEERS = Path(compare.__file__).parent / "peers"


@dataclass(frozen=True)
class Seen(Chat):
    """Notes the tokens of every batch."""

    batches: list[list[list[int]]] = field(default_factory=list, compare=False)

    def losses(self, model: TaskModel, batch: Batch) -> Losses:
        rows = zip(batch.input_ids, batch.lengths, strict=True)
        self.batches.append([row[:length].tolist() for row, length in rows])
        return super().losses(model, batch)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the peers as their own environments do, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(PEERS))

    def get(name: str) -> ModuleType:
        module = __import__(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield get
    for name in ("work", "plain"):
        sys.modules.pop(name, None)


def test_peers_get_the_batches_that_the_trainer_draws(federation: Callable[..., Federation]) -> None:
    task = Seen()
    made = federation(
        FedIT(),
        task=task,
        rounds=3,
        sampler=Uniform(count=2),
        # Of 3, 4 and 6 examples, so that passes end within a round and last batches are smaller.
        training=Training(max_steps=4, per_device_train_batch_size=2),
        evaluation=Evaluation(every=0),
        engine=Trainer,
    )
    rounds, encoded = prepare.schedule(made)
    outcome = made.run()
    assert [list(r["participants"]) for r in outcome.records[1:]] == [list(r) for r in rounds]
    wanted = [
        [encoded[client][i]["input_ids"] for i in places]
        for one in rounds
        for client, steps in one.items()
        for places in steps
    ]
    assert task.batches == wanted
    assert len(wanted) == 3 * 2 * 4


def test_the_plain_loop_comes_to_the_losses_of_fedfm(
    llama_folder: Path, tmp_path: Path, peers: Callable[[str], ModuleType]
) -> None:
    rows = {f"client{i}": [dialogue(f"{i} {j}?", "ab" * (1 + (i + j) % 4)) for j in range(4 + i)] for i in range(3)}
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    made = prepare.job(
        tmp_path, "chat", load(str(llama_folder)), rows, Chat(max_length=64), lora, training, 2, 3, "a tiny job"
    )
    (tmp_path / "job.json").write_text(json.dumps(made))
    work = peers("work").Work.read(tmp_path)
    assert work.steps == 2 * 3 * 3
    assert [work.weight(client) for client in work.clients(0)] == [4, 5, 6]
    _, _, losses = peers("plain").text(work, bf16=False)
    outcome = peers("fedfm_peer").federation(work, {"engine": Trainer, "bf16": False}).run()
    found = [[c["loss"] for c in r["participants"].values()] for r in outcome.records[1:]]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor([sum(x) / len(x) for x in found]))


def test_an_empty_job_has_as_many_bytes_as_said(tmp_path: Path, peers: Callable[[str], ModuleType]) -> None:
    about = prepare.prepare("c", tmp_path, clients=3, rounds=2, megabytes=0.5)
    work = peers("work").Work.read(tmp_path)
    assert sum(t.nbytes for t in work.initial().values()) == 500_000
    assert (about["clients"], work.steps, work.tokens) == (3, 6, 0)
    # Zeros, to which two rounds add 1 each.
    _, _, losses = peers("plain").empty(work)
    assert losses == [2.0]


def test_batches_are_padded_to_their_longest_example(tmp_path: Path, peers: Callable[[str], ModuleType]) -> None:
    module = peers("work")
    work = module.Work(tmp_path, {"kind": "chat", "pad_token_id": 9})
    batch = work.collate([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    # (1 * 2 + 3 * 6) / 4 = 5.
    assert module.mean([{"a": torch.tensor([2.0])}, {"a": torch.tensor([6.0])}], [1, 3])["a"].tolist() == [5.0]


def run(train_s: float, startup_s: float = 1.0, peak_mb: float = 100.0, **more: Any) -> dict[str, Any]:
    return {
        "train_s": train_s,
        "steps": 10,
        "startup_s": startup_s,
        "peak_mb": peak_mb,
        "losses": [2.0],
        "mode": "fp32",
        **more,
    }


def test_medians_of_seconds_and_of_ratios_within_a_pass() -> None:
    passes = [
        {"plain": run(10.0), "fast": run(4.0, 3.0, 150.0)},  # 0.4 of the plain loop
        {"fast": run(6.0, 5.0, 130.0), "plain": run(30.0)},  # 0.2: everything was slow but fast less so
        {"plain": run(20.0), "fast": run(6.0, 4.0, 120.0)},  # 0.3
    ]
    found = compare.summary(passes)
    assert found["fast"] == pytest.approx(
        {
            "seconds_a_step": 0.6,
            "least": 0.4,
            "most": 0.6,
            "startup_s": 4.0,
            "peak_mb": 130.0,
            "passes": 3,
            "ratio": 0.3,  # not 6 / 20, the ratio of the medians, though it happens to be the same
            "memory_ratio": 1.3,
            "deviation": 0.0,
        }
    )
    assert found["plain"]["seconds_a_step"] == pytest.approx(2.0)
    assert found["plain"]["ratio"] == 1.0


def test_a_pass_without_the_plain_loop_gives_no_ratio() -> None:
    found = compare.summary([{"fast": run(4.0)}, {"fast": run(6.0), "plain": run(10.0)}])
    assert found["fast"]["seconds_a_step"] == pytest.approx(0.5)
    assert found["fast"]["ratio"] == pytest.approx(0.6)
    assert "ratio" not in compare.summary([{"fast": run(4.0)}])["fast"]


def test_who_does_other_work_is_named() -> None:
    plain = run(1.0, losses=[2.0, 1.0])
    near, far = run(1.0, losses=[2.0, 1.0005]), run(1.0, losses=[2.0, 1.002])
    assert compare.deviation(near, plain) == pytest.approx(0.0005)
    assert compare.deviation(run(1.0), plain) == float("inf")
    passes = [
        {
            "plain": plain,
            "near": near,
            "far": far,
            "short": run(1.0),
            "not a number": run(1.0, losses=[2.0, float("nan")]),
            "half": {**far, "mode": "fused-bf16"},
        }
    ]
    assert [f.peer for f in compare.strangers(passes)] == ["far", "short", "not a number"]


def test_failures_are_shown_and_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import sys; print('no such thing', file=sys.stderr); sys.exit(3)")
    monkeypatch.setitem(compare.SCRIPTS, "plain", str(script))
    about = {"job": "c", "kind": "empty", "about": "nothing", "clients": 1}
    monkeypatch.setattr(compare, "prepared", lambda *_: about)
    out = tmp_path / "out.json"
    words = ["c", "--peers", "plain", "--clients", "1", "--megabytes", "0", "--repeats", "2", "--out", str(out)]
    assert compare.main(words) == 1
    assert "no such thing" in capsys.readouterr().err
    [job] = json.loads(out.read_text())["jobs"]
    assert [f["peer"] for f in job["failures"]] == ["plain", "plain"]
    assert "ended with code 3" in job["failures"][0]["reason"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_memory_counts_children_and_ends_what_is_left() -> None:
    # The child holds 40 MB and outlives its parent, as daemons do.
    child = "import time; held = bytearray(b'x' * 40_000_000); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1)"
    watch = Watch("PEER_RUN=test-of-memory")
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PEER_RUN": "test-of-memory"})
    watch.start()
    process.wait()
    began = time.monotonic()
    watch.stop()
    assert watch.processes == 2
    assert 40 < watch.peak_mb < 120
    assert time.monotonic() - began < 5
