"""Rows rebuilt from what a server reads: every objective at the truth, words, labels and orders by hand, whole attacks
on models of one block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fedfm.audit import Case, conduct
from fedfm.audit.reconstruction import likeness
from fedfm.audit.reconstruction.attribute import Attribute
from fedfm.audit.reconstruction.dlg import DLG
from fedfm.audit.reconstruction.film import FILM, bag
from fedfm.audit.reconstruction.idlg import IDLG, labels
from fedfm.audit.reconstruction.inverting_gradients import InvertingGradients, variation
from fedfm.audit.reconstruction.lamp import LAMP, Attempt
from fedfm.audit.reconstruction.leak import leaks
from fedfm.audit.reconstruction.order import edges, moved
from fedfm.audit.reconstruction.prior import Prior, prior
from fedfm.audit.reconstruction.rehearsal import Rehearsal, apart, distance, rehearsal
from fedfm.core.plan import Training
from fedfm.errors import RecipeError
from fedfm.evaluate import Evaluation
from fedfm.federation import Federation
from fedfm.methods.fedavg import FedAvg
from fedfm.methods.lora.ffa_lora import FFALoRA
from fedfm.methods.zeroth.fedkseed import FedKSeed
from fedfm.models import load
from fedfm.privacy.dp_sgd import DPSGD
from fedfm.secure.secagg import SecAgg
from fedfm.spaces import Full, LoRA
from fedfm.tasks import CausalLM, Classify, ImageClassify
from fedfm.wire import Clip, LocalGaussian, TopK
from tests.conftest import People, byte_tokenizer, picture

STEP = Training(max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", max_grad_norm=0)
"""What gives a gradient away as it is."""
Make = Callable[..., Case]


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one block whose attention tells tokens apart, as that of trained models does."""
    folder = tmp_path_factory.mktemp("sharp")
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def eye_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of one block for images of 4 x 4."""
    folder = tmp_path_factory.mktemp("eye")
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(folder)
    return folder


def people(*clients: Sequence[str]) -> People:
    """Clients with these texts of classes 0, 1, 2, 0, ...; and others to guess by."""
    others = [{"text": text, "label": at % 3} for at, text in enumerate(("we go", "up", "hm so", "it is"))]
    names = ("ann", "bob", "cid")
    return People(
        {
            name: {
                "train": [{"text": t, "label": at % 3} for at, t in enumerate(texts)],
                "validation": [],
                "test": others,
            }
            for name, texts in zip(names, clients, strict=False)
        }
    )


@pytest.fixture
def made(sharp_folder: Path) -> Make:
    """A case of one round of text classification."""

    def make(*clients: Sequence[str], **changes: Any) -> Case:
        settings = {"space": Full(), "training": STEP, "rounds": 1, "evaluation": Evaluation(every=0), **changes}
        method, round = settings.pop("method", FedAvg()), settings.pop("round", 1)
        run = Federation(str(sharp_folder), method, people(*clients), settings.pop("task", Classify()), **settings)
        return Case(run, {"of": torch.zeros(1)}, round=round)

    return make


def truth(work: Rehearsal) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and classes of the true rows."""
    ids = torch.nn.utils.rnn.pad_sequence([row.input_ids for row in work.leak.rows], batch_first=True)
    classes = F.one_hot(torch.stack([row.target for row in work.leak.rows]), work.classes)
    return work.embedded(ids), classes.float()


def test_likeness_by_hand() -> None:
    assert likeness.overlap([1, 2, 2], [2, 1, 3]) == pytest.approx(4 / 6)
    assert likeness.overlap([1, 2, 3], [1, 2, 4], 2) == pytest.approx(2 / 4)
    assert likeness.subsequence([1, 9, 2, 3], [1, 2, 3, 8]) == pytest.approx(6 / 8)
    assert likeness.subsequence([3, 2, 1], [1, 2, 3]) == pytest.approx(2 / 6)
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert likeness.psnr(image, image + 0.1) == pytest.approx(20, abs=1e-4)
    other = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    for measure, most in ((likeness.psnr, likeness.MOST), (likeness.ssim, 1.0)):
        assert measure(image, image) == pytest.approx(most)
        assert measure(image, other) < measure(image, image + 0.05) < most
    for alike in (likeness.overlap, likeness.subsequence):
        assert alike([4, 5], [4, 5]) == 1
        assert alike([4, 5], [6, 7]) == 0
    assert likeness.overlap([7], [7], 2) == 1
    assert likeness.overlap([7], [8], 2) == 0


def test_rows_are_matched_so_that_all_together_are_most_alike() -> None:
    # Taken one by one, the first true row would get the second recovered one, and the other nothing.
    assert likeness.matched([[1, 2], [1, 2, 3]], [[1, 2, 3, 4], [1, 2, 3]], likeness.overlap) == [0, 1]
    assert likeness.matched([[5]], [[4], [5]], likeness.overlap) == [None, 0]
    assert likeness.matched([], [[4], [5]], likeness.overlap) == [None, None]


def test_ssim_of_one_window_by_hand() -> None:
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    y = torch.tensor([[[0.0, 0.5], [1.0, 0.5]]])
    # Means 0.5 and 0.5, variances of a sample 1/3 and 1/6, covariance 1/6.
    c1, c2 = 1e-4, 9e-4
    assert likeness.ssim(x, y) == pytest.approx((0.5 + c1) * (1 / 3 + c2) / ((0.5 + c1) * (0.5 + c2)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"space": LoRA(r=4)},
        {"training": Training(max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd")},
        {"training": Training(**{**vars(STEP), "weight_decay": 0.1})},
        {"stages": (Clip(1e-3),)},
        {"stages": (TopK(0.3),)},
        {"space": LoRA(r=4), "training": Training(**{**vars(STEP), "max_steps": 3, "per_device_train_batch_size": 2})},
        {
            "space": LoRA(r=4),
            "training": Training(
                max_steps=3, per_device_train_batch_size=2, learning_rate=0.5, optim="sgd", max_grad_norm=0.1
            ),
        },
    ],
    ids=["full", "lora", "max_grad_norm", "decay", "clip", "topk", "steps", "clipped-steps"],
)
def test_the_objective_is_0_at_the_truth_and_not_elsewhere(made: Make, changes: dict[str, Any]) -> None:
    case = made(["fox", "a", "bees"], **changes)
    [leak] = leaks(case, 9)
    with rehearsal(case, leak) as work:
        inputs, classes = truth(work)
        found = work.change(inputs, classes)
        assert float(apart(found, work.signal)) < 1e-5
        assert float(distance(found, work.signal)) < 1e-5
        for wrong in ((inputs.flip(0), classes), (inputs, classes.flip(1))):
            assert float(apart(work.change(*wrong), work.signal)) > 1e-3
    if changes.get("training", STEP).max_steps == 3:
        assert work.note() == "3 local steps done over"


def test_the_mean_of_a_secure_sum_is_rehearsed_with_its_weights(made: Make) -> None:
    case = made(["fox", "a", "bees"], ["no"], ["up"], secure=SecAgg())
    [leak] = leaks(case, 9)
    assert [work.share for work in leak.works] == [3, 1, 1]
    with rehearsal(case, leak) as work:
        assert float(apart(work.change(*truth(work)), work.signal)) < 1e-4
    leak = replace(leak, works=tuple(replace(work, share=1) for work in leak.works))
    with rehearsal(case, leak) as work:
        assert float(apart(work.change(*truth(work)), work.signal)) > 1e-3


def test_the_model_is_left_as_it_was(made: Make) -> None:
    case = made(["fox"])
    [leak] = leaks(case, 1)
    model = case.reader.loaded.model
    before = model.config._attn_implementation
    with rehearsal(case, leak):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before != "eager"
    assert all(p.equal(case.reader.space.initial[n]) for n, p in case.reader.space.parameters.items())


def test_the_cosine_does_not_see_lengths_and_lies_between_0_and_2() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = ([torch.randn(3, 2, generator=draw), torch.randn(4, generator=draw)] for _ in range(2))
    value = float(apart(one, other))
    assert 0 < value < 2
    assert float(apart(one, [7 * t for t in other])) == pytest.approx(value, rel=1e-5)
    assert float(apart(one, one)) == pytest.approx(0, abs=1e-6)
    assert float(apart(one, [-3 * t for t in one])) == pytest.approx(2, rel=1e-6)
    assert float(distance(one, [2 * t for t in one])) == pytest.approx(1 / 4, rel=1e-5)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_label_of_a_single_row_is_always_read(made: Make, label: int, optim: str) -> None:
    case = made(["fox"], training=Training(max_steps=1, learning_rate=1e-2, optim=optim))  # type: ignore[arg-type]
    case.federation.members.data["ann"]["train"][0]["label"] = label  # type: ignore[attr-defined]
    [leak] = leaks(case, 1)
    with rehearsal(case, leak) as work:
        assert labels(work).tolist() == F.one_hot(torch.tensor([label]), 3).tolist()
        # And without a bias, from the rows of the weight.
        biased = work.names.index("classifier.bias")
        work.names.pop(biased), work.signal.pop(biased)
        if optim == "sgd":
            assert labels(work).argmax(1).tolist() == [label]


def test_labels_of_several_rows_are_read_one_after_the_other(made: Make) -> None:
    case = made(["fox", "a", "bees", "no"])
    [leak] = leaks(case, 1)
    with rehearsal(case, leak) as work:
        assert sorted(labels(work).argmax(1).tolist()) == [0, 0, 1, 2]


def test_what_is_attacked_are_the_rows_of_the_round(made: Make) -> None:
    texts = ["ab", "cd", "ef", "gh", "ij", "kl"]
    for steps, size, used in ((1, 2, 2), (2, 2, 4), (4, 2, 6)):
        training = Training(**{**vars(STEP), "max_steps": steps, "per_device_train_batch_size": size})
        case = made(texts, training=training)
        [leak] = leaks(case, 1)
        assert len(leak.rows) == used
        assert leak.steps == steps
        assert bag(case, leak) == sorted({t for row in leak.rows for t in row.input_ids.tolist()})
        assert float(leak.weights().sum()) == pytest.approx(1)
        for (client, at), row in zip(leak.places, leak.rows, strict=True):
            assert case.reader.encoded(client, "train")[at].input_ids.equal(row.input_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": Training(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2)},
        {"training": Training(**{**vars(STEP), "max_steps": 3, "weight_decay": 0.1})},
        {"training": Training(max_steps=3, learning_rate=1e-2, weight_decay=0.1)},
        {"secure": SecAgg()},
        {"stages": (Clip(1e-2),)},
    ],
    ids=["sgd", "adamw", "decay", "adamw-decay", "secagg", "clip"],
)
def test_the_words_of_a_batch_are_those_whose_rows_changed(made: Make, changes: dict[str, Any]) -> None:
    case = made(["a red fox", "bees", "no"], ["wild"], ["up"], **changes)
    for leak in leaks(case, 9):
        assert bag(case, leak) == sorted({t for row in leak.rows for t in row.input_ids.tolist()})


def test_frozen_embeddings_tell_no_words(made: Make) -> None:
    case = made(["a red fox"], space=LoRA(r=2))
    [leak] = leaks(case, 1)
    assert bag(case, leak) == []
    assert not [name for name in leak.exposed.change if "word_embeddings" in name]


def test_noise_hides_words(made: Make) -> None:
    plain, noisy, private = (
        made(["a red fox"], **more)
        for more in (
            {},
            {"stages": (Clip(0.1), LocalGaussian(1.0))},
            {"privacy": DPSGD(noise_multiplier=2.0, max_grad_norm=0.1)},
        )
    )
    [leak] = leaks(plain, 1)
    true = {token for row in leak.rows for token in row.input_ids.tolist()}
    known = [
        likeness.overlap(sorted(bag(case, leak)), sorted(true))
        for case in (plain, noisy, private)
        for leak in leaks(case, 1)
    ]
    assert known[0] == 1
    assert max(known[1:]) < 0.4


class Alphabetical(Prior):
    """Thinks letters should follow each other as in the alphabet."""

    def __init__(self) -> None:
        pass

    def nats(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([sum(abs(b - a - 1) for a, b in itertools.pairwise(text)) for text in texts]).float()

    note = "by the alphabet"


def test_a_sentence_is_written_as_the_language_model_likes_it_and_not_twice() -> None:
    film = FILM(beams=3, repeat=10.0)
    assert film.written(Alphabetical(), [12, 10, 11, 13], 4, []) == [10, 11, 12, 13]
    assert film.written(Alphabetical(), [12, 10, 11, 13], 4, [[10, 11, 12, 13]]) != [10, 11, 12, 13]
    # Staying costs one nat a step, going back more; a pair that comes again costs ten.
    assert film.written(Alphabetical(), [10, 11], 4, []) == [10, 10, 11, 11]


def test_reordering_keeps_the_tokens_and_never_makes_it_worse(made: Make) -> None:
    case, draw = made(["fox"]), torch.Generator().manual_seed(0)
    [leak] = leaks(case, 1)
    film = FILM(orders=40)
    for text in ([13, 11, 10, 12], [5, 5, 9], [8]):
        found = film.ordered(case, leak, Alphabetical(), text, draw)
        assert sorted(found) == sorted(text)
        assert film.score(case, leak, Alphabetical(), found) <= film.score(case, leak, Alphabetical(), text)
    assert film.ordered(case, leak, Alphabetical(), [13, 11, 10, 12], draw) == [10, 11, 12, 13]


def test_other_orders_are_permutations_that_leave_the_edges() -> None:
    draw, seen = torch.Generator().manual_seed(0), set()
    for number in range(400):
        order = moved(list(range(7)), number, 1, 2, draw)
        assert sorted(order) == list(range(7))
        assert (order[0], order[-2:]) == (0, [5, 6])
        seen.add(tuple(order))
    assert len(seen) > 10
    assert moved([4, 5, 6], 0, 1, 1, draw) == [4, 5, 6]


def test_edges_are_what_the_tokenizer_adds() -> None:
    class Framing:
        def __call__(self, text: str, return_special_tokens_mask: bool) -> dict[str, list[int]]:
            return {"input_ids": [101, 7, 102], "special_tokens_mask": [1, 0, 1]}

    assert edges(Framing()) == ([101], [102])
    assert edges(byte_tokenizer()) == ([], [])


def test_a_prior_sums_the_nats_of_tokens_and_sees_no_padding(llama_folder: Path) -> None:
    asked = Prior(load(str(llama_folder), head="causal_lm"))
    texts = [[70, 71, 72], [80]]
    model, first = asked.loaded.model, asked.loaded.tokenizer.bos_token_id
    for text, nats in zip(texts, asked.nats(texts).tolist(), strict=True):
        ids = torch.tensor([[first, *text]])
        scores = model(input_ids=ids).logits[0].log_softmax(1)
        assert nats == pytest.approx(-sum(float(scores[at, token]) for at, token in enumerate(text)), rel=1e-5)
    assert asked.each(texts).tolist() == pytest.approx((asked.nats(texts) / torch.tensor([3, 1])).tolist())
    # The same through text: both have the same tokenizer.
    assert Prior(asked.loaded, byte_tokenizer()).nats(texts).tolist() == pytest.approx(asked.nats(texts).tolist())


def test_a_language_model_is_its_own_prior_and_its_sentences_are_scored_by_gradients(llama_folder: Path) -> None:
    rows = [{"text": "red fox"}, {"text": "bees"}]
    run = Federation(
        str(llama_folder),
        FedAvg(),
        People({"ann": {"train": rows, "validation": [], "test": [{"text": "up we go"}]}}),
        CausalLM(),
        space=Full(),
        training=STEP,
        rounds=1,
        evaluation=Evaluation(every=0),
    )
    case = Case(run, {"of": torch.zeros(1)})
    film = FILM(beams=2, orders=4)
    assert film.refusal(case) == ""
    assert prior(case, "").loaded is run.bench.loaded
    words, tokens, *_ = film.look(case)
    assert words.value == 1
    assert words.chance < 1
    assert tokens.trials == 2
    assert len(tokens.examples) == 2
    assert {true for _, true in tokens.examples} == {"red fox", "bees"}
    [leak] = leaks(case, 1)
    text = leak.rows[0].input_ids.tolist()
    asked = prior(case, "")
    with rehearsal(case, leak):
        assert film.score(case, leak, asked, text) > FILM(beta=0).score(case, leak, asked, text)


def test_dlg_rebuilds_a_text_token_by_token_and_protections_prevent_it(made: Make) -> None:
    attack = DLG(iterations=20)
    tokens, _, order, exact = attack.look(made(["fox"]))
    assert (tokens.value, order.value, exact.value) == (1, 1, 1)
    assert tokens.examples == (("fox", "fox"),)
    assert tokens.chance < 0.5
    noisy = made(["fox"], stages=(Clip(0.1), LocalGaussian(1.0)))
    assert DLG(iterations=3, restarts=1).look(noisy)[3].value == 0
    assert DLG(iterations=3, restarts=1).look(made(["fox"], space=LoRA(r=1)))[3].value == 0


def test_idlg_rebuilds_a_text_with_the_label_known(made: Make) -> None:
    assert IDLG(iterations=20).look(made(["fox"]))[3].value == 1


def test_lamp_rebuilds_and_its_discrete_steps_never_raise_the_objective(made: Make, llama_folder: Path) -> None:
    case = made(["fox"])
    attack = LAMP(prior=str(llama_folder), iterations=60, beginnings=10, orders=12, every=20, regular=0.1)
    tokens, *_ = attack.look(case)
    assert tokens.value > tokens.chance
    assert "texts judged by" in tokens.notes
    [leak] = leaks(case, 1)
    with rehearsal(case, leak) as work:
        attempt = Attempt(attack, work, prior(case, attack.prior), torch.Generator().manual_seed(1))
        inputs, _ = truth(work)
        mean, std = work.scale
        true = (inputs - mean) / std
        assert float(attempt.mismatch(true).detach()) < 1e-5
        for z in (true[:, [1, 0, 2]], true):
            assert attempt.judged(attempt.reordered(z)) <= attempt.judged(z)
        # With the gradient alone to please, the order found is that of the text.
        strict = Attempt(LAMP(prior=attack.prior, fluency=0.0, orders=40), work, attempt.prior, attempt.draw)
        assert work.tokens(work.made(strict.reordered(true[:, [1, 0, 2]])))[0].equal(leak.rows[0].input_ids)


@pytest.fixture
def seen(eye_folder: Path) -> Make:
    """A case of one round of image classification, with an image of its own shade."""

    def make(*shades: int, **changes: Any) -> Case:
        rows = [{"image": picture(shade), "label": at % 2} for at, shade in enumerate(shades)]
        others = [{"image": picture(shade), "label": 0} for shade in (20, 90, 160)]
        settings = {"space": Full(), "training": STEP, "rounds": 1, "evaluation": Evaluation(every=0), **changes}
        members = People({"ann": {"train": rows, "validation": [], "test": others}})
        run = Federation(str(eye_folder), FedAvg(), members, ImageClassify(), **settings)
        return Case(run, {"of": torch.zeros(1)})

    return make


def test_images_are_rebuilt_by_their_gradient(seen: Make) -> None:
    signal, structure = InvertingGradients(iterations=200).look(seen(230))
    assert signal.value > 15 > signal.chance
    assert (signal.low, signal.high) == (0.0, likeness.MOST)  # one image says nothing of others
    assert structure.measure == "SSIM"
    [noisy, _] = InvertingGradients(iterations=30).look(seen(230, stages=(Clip(0.1), LocalGaussian(1.0))))
    assert noisy.value < 12


def test_images_stay_within_what_pixels_can_be(seen: Make) -> None:
    case = seen(230)
    [leak] = leaks(case, 1)
    [pixels], _ = InvertingGradients(iterations=5, learning_rate=5.0).recover(case, leak)
    assert float(pixels.abs().max()) <= 1 + 1e-6  # mean and spread of the processor are 0.5


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    assert float(variation(image)) == pytest.approx((0 + 2) / 2 + (1 + 3) / 2)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_an_attribute_is_found_by_the_gradient_that_it_makes(made: Make, optim: str) -> None:
    training = Training(**{**vars(STEP), "optim": optim, "weight_decay": 0.01})
    case = made(["fox", "a", "bees"], training=training)
    attack = Attribute()
    [finding] = attack.look(case)
    assert (finding.measure, finding.value, finding.trials) == ("label found", 1, 3)
    assert finding.chance == pytest.approx(3 / 7)
    [leak] = leaks(case, 1)
    rows = [case.members.rows(client, "train")[at] for client, at in leak.places]
    assert attack.mismatch(case, leak, rows, [row["label"] for row in rows]) < 1e-4
    assert attack.mismatch(case, leak, rows, [0, 0, 0]) > 1e-2


def test_an_attribute_that_the_model_does_not_see_is_not_found(made: Make) -> None:
    case = made(["fox", "a", "bees", "no"])
    data = case.federation.members.data  # type: ignore[attr-defined]
    for split in ("train", "test"):
        for at, row in enumerate(data["ann"][split]):
            row["town"] = ("x", "y")[at % 2]
    attack = Attribute(field="town")
    [leak] = leaks(case, 1)
    rows = [case.members.rows(client, "train")[at] for client, at in leak.places]
    values = {attack.mismatch(case, leak, rows, [a, b, "x", "y"]) for a in "xy" for b in "xy"}
    assert len(values) == 1
    [finding] = attack.look(case)
    assert not finding.leaks
    assert Attribute(field="shoe").refusal(case) == "rows have no field 'shoe'"


def test_attacks_say_why_they_cannot_be_carried_out(made: Make, llama_folder: Path, federation: Any) -> None:
    chat = Case(federation(FedAvg()), {"of": torch.zeros(1)})
    assert DLG().refusal(chat) == "it is for the task classify or image-classify, not for chat"
    full = federation(FedKSeed(), space=Full())
    assert FILM().refusal(Case(full, {})) == "clients of fedkseed send no change of weights"
    headless = made(["fox"], method=FFALoRA(), space=LoRA(r=2))
    assert IDLG().refusal(headless) == ""
    no_prior = LAMP(prior="/no/such/model.gguf").refusal(made(["fox"]))
    assert no_prior == ("it asks a language model which texts are likely, and there is no file /no/such/model.gguf")
    with pytest.raises(RecipeError, match="DLG iterations must be at least 1, but is 0"):
        DLG(iterations=0)
    with pytest.raises(RecipeError, match="FILM beams must be at least 1, but is 0"):
        FILM(beams=0)


def test_an_audit_holds_what_was_recovered(made: Make) -> None:
    case = made(["fox"], ["bee"])
    told: list[str] = []
    found = conduct.conduct(case, [Attribute(), DLG(iterations=1, restarts=1, clients=1)], told.append)
    assert found["attacks"]["dlg"] == {"aim": "reconstruction", "sees": "uploads"}
    assert found["rows"] == 0
    [attribute, tokens, *_] = found["findings"]["run"]
    assert attribute["trials"] == 2
    assert (tokens["trials"], tokens["measure"]) == (1, "tokens recovered (F1)")
    assert tokens["examples"][0][1] == "fox"
