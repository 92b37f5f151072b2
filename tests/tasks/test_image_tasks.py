"""What models of images are shown, where class scores come from, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedfm.core.client import View
from fedfm.core.jobs import Features, Fit, Loss, Predict
from fedfm.core.method import Method
from fedfm.core.plan import Training
from fedfm.core.update import Member
from fedfm.errors import DataError, FedfmError, ModelError, RecipeError
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.feddpa import FedDPA
from fedfm.methods.lora.fedit import FedIT
from fedfm.methods.optim.fedprox import FedProx
from fedfm.models import Loaded, load
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.spaces import Full, LoRA
from fedfm.spaces.space import Space
from fedfm.tasks import ImageClassify, ZeroShotImage
from fedfm.tasks.task import Task, TaskModel, collate
from fedfm.train import Trainer, private
from tests.conftest import People, picture

NAMES = ("cat", "grey_dog", "bird")
SMALL = LoRA(r=2, lora_alpha=4)
ANN = View(Member("ann", 6), 1)


def rows(n: int, shift: int = 0) -> list[dict[str, Any]]:
    return [{"image": picture(60 * ((i + shift) % 3) + i), "label": (i + shift) % 3} for i in range(n)]


PEOPLE = People(
    {
        name: {"train": rows(n, n), "validation": rows(2), "test": rows(3)}
        for name, n in (("ann", 6), ("bob", 4), ("cid", 5))
    }
)


def made(folder: Path, method: Method, task: Task, space: Space = SMALL, **changes: Any) -> Federation:
    settings: dict[str, Any] = {
        "training": Training(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2),
        "rounds": 2,
        "load": {"label_names": NAMES},
        **changes,
    }
    return Federation(str(folder), method, PEOPLE, task, space=space, **settings)


def clip(folder: Path) -> Loaded:
    return load(str(folder), head="zero_shot_image_classification", label_names=NAMES)


def test_an_image_is_what_the_processor_makes_of_it_in_colour(vit_folder: Path) -> None:
    loaded = load(str(vit_folder), head="image_classification", label_names=NAMES)
    [one] = ImageClassify().encode([{"image": picture(255), "label": 2}], loaded)
    # The processor takes 0.5 away and divides by 0.5: black is -1 and white 1, in all three colours.
    wanted = torch.full((3, 8, 8), -1.0)
    wanted[:, :4] = 1.0
    torch.testing.assert_close(one.values, wanted)
    assert one.target.item() == 2
    assert len(one) == 0
    clear = Image.new("RGBA", (16, 8), (255, 0, 0, 255))
    [red] = ImageClassify().encode([{"image": clear, "label": 0}], loaded)
    assert red.values is not None
    assert red.values.mean((1, 2)).tolist() == pytest.approx([1, -1, -1], abs=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": None, "label": 0}, r"the column 'image' must hold images .*, but holds nothing. The source file"),
        ({"image": "a.png", "label": 0}, r"must hold images .*, but holds 'a.png'"),
        ({"image": picture(0), "label": 3}, r"label must be 0 to 2, but is 3"),
        ({"image": Image.fromarray(np.full((8, 8), 9000, np.uint16)), "label": 0}, r"8 bits a colour, .* mode 'I;16'"),
    ],
)
def test_what_is_no_image_or_class_is_refused(vit_folder: Path, row: dict[str, Any], message: str) -> None:
    loaded = load(str(vit_folder), head="image_classification", label_names=NAMES)
    with pytest.raises(DataError, match=message):
        ImageClassify().encode([row], loaded)


def test_images_of_several_sizes_are_refused_where_the_processor_leaves_them(vit_folder: Path) -> None:
    loaded = load(str(vit_folder), head="image_classification", label_names=NAMES)
    loaded.processor.do_resize = False
    both = [{"image": picture(1), "label": 0}, {"image": picture(1, 12), "label": 0}]
    with pytest.raises(
        DataError, match=r"makes images of \(3, 12, 12\) and of \(3, 8, 8\), and a batch needs one size"
    ):
        ImageClassify().encode(both, loaded)


def test_a_row_is_shown_by_its_size() -> None:
    row = {"image": picture(1), "label": 2}
    assert (ImageClassify().prompt(row), ImageClassify().answer(row)) == ("an image of 8 x 8 pixels", "2")


def test_scores_are_scaled_cosines_of_image_and_class_text(clip_folder: Path) -> None:
    loaded, task = clip(clip_folder), ZeroShotImage(template="a {class}!")
    batch = collate(task.encode(rows(2), loaded), 0)
    scores = task.scores(TaskModel(loaded.model), batch)
    with torch.no_grad():
        image = loaded.model.get_image_features(pixel_values=batch.values).pooler_output
        for k, text in enumerate(("a cat!", "a grey dog!", "a bird!")):
            ids = loaded.tokenizer([text], return_tensors="pt")["input_ids"]
            name = loaded.model.get_text_features(input_ids=ids).pooler_output
            wanted = loaded.model.logit_scale.exp() * torch.cosine_similarity(image, name)
            torch.testing.assert_close(scores[:, k], wanted, rtol=1e-4, atol=1e-4)
    losses = task.losses(TaskModel(loaded.model), batch)
    by_hand = [math.log(sum(math.exp(s - row[k]) for s in row)) for k, row in enumerate(scores.tolist())]
    assert losses.total.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_texts_run_once_for_a_batch(clip_folder: Path) -> None:
    loaded, task, seen = clip(clip_folder), ZeroShotImage(), []
    loaded.model.text_model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    task.scores(TaskModel(loaded.model), collate(task.encode(rows(6), loaded), 0))
    assert seen == [3]


def test_texts_need_names_room_and_a_text_tower(clip_folder: Path, vit_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"template must be a text with \{class\} once"):
        ZeroShotImage(template="a photo.")
    # 40 tokens can be read; a byte is one, and the end of the text another.
    fits = ZeroShotImage(template="x" * 31 + "{class}")
    assert len(fits.encode(rows(1), clip(clip_folder))) == 1
    long = ZeroShotImage(template="x" * 32 + "{class}")
    with pytest.raises(RecipeError, match=r"grey dog' has 41 tokens, but .* reads at most 40. Shorten task.template"):
        long.encode(rows(1), clip(clip_folder))
    nameless = load(str(clip_folder), head="zero_shot_image_classification", num_labels=3)
    with pytest.raises(
        ModelError, match=r"need two or more names, .* but are LABEL_0, LABEL_1, LABEL_2. Give them with"
    ):
        ZeroShotImage().encode(rows(1), nameless)
    blind = load(str(vit_folder), head="image_classification", label_names=NAMES)
    with pytest.raises(ModelError, match=r"has no text side, which names of classes need; use the task image-classify"):
        ZeroShotImage().encode(rows(1), blind)


@pytest.mark.parametrize("method", [FedAvg(), FedIT(), FedProx(mu=0.1)], ids=lambda m: m.id)
def test_a_vit_learns_and_its_new_head_travels(vit_folder: Path, method: Method) -> None:
    learning = Training(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2)
    together = made(vit_folder, method, ImageClassify(), training=learning, rounds=4)
    assert {n for n in together.method.start(together.layout).weights if "classifier" in n} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    before, outcome = together.assess(together.start()), together.run()
    after = together.assess(outcome.state)
    assert before is not None
    assert after is not None
    assert after.pooled["loss"] < 0.8 * before.pooled["loss"]


@pytest.mark.parametrize(("fixture", "task"), [("vit_folder", ImageClassify()), ("clip_folder", ZeroShotImage())])
def test_engines_agree_and_the_full_model_can_be_tuned(
    fixture: str, task: Task, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    fused = made(folder, FedAvg(), task).run().state.weights
    alone = made(folder, FedAvg(), task, engine=Trainer).run().state.weights
    assert max(float((fused[n] - t).abs().max()) for n, t in alone.items()) < 1e-6
    whole = made(folder, FedAvg(), task, space=Full())
    start = dict(whole.start().weights)
    assert any((t != start[n]).any() for n, t in whole.run().state.weights.items())


def test_features_of_images(vit_folder: Path, clip_folder: Path) -> None:
    for folder, task, width in ((vit_folder, ImageClassify(), 32), (clip_folder, ZeroShotImage(), 16)):
        one = made(folder, FedAvg(), task)
        found = one.trainer.answer(Features({}, "train"), ANN)
        assert found.shape == (6, width)
        batch = collate(one.trainer.encoded("ann", "train"), 0)
        model = one.bench.loaded.model
        with torch.no_grad():
            if width == 32:
                wanted = model.vit(pixel_values=batch.values).last_hidden_state.mean(1)
            else:
                wanted = model.get_image_features(pixel_values=batch.values).pooler_output
                wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_are_encoded_once_and_their_size_counts(vit_folder: Path) -> None:
    one = made(vit_folder, FedAvg(), ImageClassify())
    first = one.trainer.encoded("ann", "train")
    assert one.trainer.encoded("ann", "train") is first
    # Of 8 x 8 x 3 numbers of 4 bytes, 16 bytes a token, beside the 64 of an object.
    assert one.trainer._encoded._tokens == 6 * (64 + 48)  # type: ignore[attr-defined]


def test_private_gradients_are_those_of_examples_not_of_texts(clip_folder: Path) -> None:
    """With as many classes as examples, gradients by the text tower's rows would have the right number."""
    step = Training(max_steps=1, per_device_train_batch_size=3, learning_rate=1.0, optim="sgd", max_grad_norm=0.0)
    one = made(clip_folder, FedAvg(), ZeroShotImage(), training=step)
    trainer = one.trainer
    own = trainer.encoded("ann", "train")[:3]
    gradients = []
    for example in own:
        params = one.bench.space.train_only(("*",))
        loss = trainer.losses([example], collate([example], 0)).total.sum()
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert all(g.norm() > 1e-3 for g in gradients)
    chosen = one.bench.space.train_only(("*",))
    with private._per_example(one.bench.space.model, chosen, trainer.task.rowwise):
        private._gradients(trainer, Fit({}), own, torch.arange(3), chosen)
        private._see(chosen, 3, private.AGREE)
        for i, wanted in enumerate(gradients):
            got = torch.cat([p.grad_sample[i].flatten() for p in chosen.values()])  # type: ignore[attr-defined]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    start = one.bench.space.initial
    rule = DPSGD(noise_multiplier=1e-3, max_grad_norm=1.0, delta=1e-3)
    done = made(clip_folder, FedAvg(), ZeroShotImage(), privacy=rule, training=step, rounds=1).run()
    assert any((t != start[n]).any() for n, t in done.state.weights.items())


def test_ranks_are_not_weighed_by_example_where_rows_are_texts(clip_folder: Path, vit_folder: Path) -> None:
    one = made(clip_folder, FedAvg(), ZeroShotImage())
    with pytest.raises(FedfmError, match="ranks cannot be weighed for each example in the task 'zero-shot-image'"):
        one.trainer.answer(Loss({}, split="test", gate=torch.ones(3, 2)), ANN)
    assert made(vit_folder, FedDPA(), ImageClassify()).run().state.weights


def test_predict_gives_class_scores(clip_folder: Path) -> None:
    one = made(clip_folder, FedAvg(), ZeroShotImage())
    assert one.trainer.answer(Predict({}, "test"), ANN).shape == (3, 3)
