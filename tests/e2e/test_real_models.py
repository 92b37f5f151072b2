"""The command line on the embedded models and dialogues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import fedfm

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_small_demo(tmp_path: Path) -> None:
    """The demo's recipe over three topics for two rounds: the mean client gains on held-out dialogues."""
    sets = ["output_dir=run", "rounds=2", "data.max_clients=3", "data.max_examples=20", "references=[]", "samples=1"]
    done = fedfm(tmp_path, "run", str(ROOT / "recipes/demo.yaml"), "--json", *(w for s in sets for w in ("--set", s)))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    loss = {name: test["mean"]["loss"] for name, test in results["test"].items()}
    assert loss["fedit"] < loss["base"] - 0.1
    # What travels is what four blocks of rank-8 factors weigh: A [8, 576] twice, B [576, 8] and [192, 8], float32.
    factors = 4 * 4 * 8 * (576 + 576 + 576 + 192)
    assert factors < results["runs"]["fedit"]["bytes_up"] / 6 < 1.05 * factors
    assert results["samples"][0]["before"] != results["samples"][0]["after"]


@pytest.mark.slow
def test_classification_with_the_encoder(tmp_path: Path) -> None:
    """MiniLM with LoRA and a new head learns to tell questions on food from questions on money."""
    words = {"food": ("soup", "bread", "rice", "cake"), "money": ("bank", "loan", "cash", "fee")}
    ask = ("where is the {}", "I want {} now", "how much {} is there", "tell me about {}", "no more {} for me")
    rows = [f"{a.format(w)},{kind}\n" for kind, nouns in words.items() for w in nouns for a in ask]
    (tmp_path / "q.csv").write_text("text,label\n" + "".join(rows))
    recipe = f"""
model: all-minilm-l6-v2
method: fedavg
space: {{kind: lora, r: 4}}
task: {{kind: classify, max_length: 32}}
data:
  source: {{kind: file, path: {tmp_path / "q.csv"}}}
  partition: {{kind: iid, num_clients: 3}}
  splits: {{validation: 0.1, test: 0.3, group_by: ""}}
training: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 5.0e-3}}
rounds: 4
output_dir: run
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = fedfm(tmp_path, "run", "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    test = json.loads(done.stdout)["test"]
    assert test["fedavg"]["global"]["accuracy"] > 0.9 > test["base"]["global"]["accuracy"]
    assert test["fedavg"]["global"]["macro_f1"] > 0.9
