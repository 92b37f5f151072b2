"""Duplicates left out between sites that keep their rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")
from fedfm.dedup import Exact
from fedfm.dedup.party import DEAL, KEYS, LEAVE, TAGS
from fedfm.deploy import bundle
from fedfm.deploy.kept import Kept
from fedfm.errors import FedfmError
from fedfm.recipe import Recipe
from tests.conftest import dialogue
from tests.deploy.world import Answer, Trial, at_home, found

SHORT: dict[str, Any] = {"rounds": 1, "evaluation": {"every": 0}}
Rows = dict[str, list[str]]


def written(place: Path, rows: Rows) -> Path:
    """A file of dialogues by their owners."""
    lines = [{**dialogue(f"{text}?", f"{text}!"), "topic": owner} for owner, own in rows.items() for text in own]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


SHARED: Rows = {
    "ann": [f"a{i}" for i in range(8)] + [f"s{i}" for i in range(6)],
    "bob": [f"b{i}" for i in range(8)] + [f"s{i}" for i in range(3)],
    "cid": [f"c{i}" for i in range(8)] + [f"s{i}" for i in range(3, 6)] + ["c0"],
}
WITHIN: Rows = {owner: [f"{owner}{i}" for i in range(10)] * 2 for owner in ("ann", "bob")}
"""Which of a site's own equal rows stays hangs on no key, so all runs have the same."""


@pytest.fixture
def make(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    def made(rows: Rows = SHARED, kind: Any = "exact", **changes: Any) -> Recipe:
        place = written(tmp_path / "rows.jsonl", rows)
        source = {"kind": "file", "path": str(place)}
        data = {"source": source, "partition": {"kind": "natural", "column": "topic"}, "deduplicate": kind}
        return recipe(data=data, **changes)

    return made


@pytest.fixture
def trial(make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    def made(sites: int = 3, **changes: Any) -> Trial:
        place = tmp_path / "federation"
        bundle.rehearsal(place, make(**changes), sites, "127.0.0.1:9092")
        return Trial(place, monkeypatch)

    return made


def left_out(there: Trial) -> dict[str, list[int]]:
    return dict(json.loads((there.folder / "coordinator" / "compared.json").read_text())["left_out"])


def kept(there: Trial) -> Rows:
    """What each site trains and tests on."""
    out: Rows = {}
    for name in there.names:
        node = there.site(name)._node
        assert node
        data: Any = node[1].worker.trainer.data
        out[name] = [row["messages"][0]["content"][:-1] for row in data.own.everything(name)]
    return out


def change(there: Trial, site: str, **policy: Any) -> None:
    place = there.folder / "sites" / site / "policy.yaml"
    place.write_text(yaml.safe_dump({**yaml.safe_load(place.read_text()), **policy}))


# The same as in one process.


def test_of_equal_rows_one_stays_whichever_site_has_it(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)
    there.run()
    rows = [text for own in kept(there).values() for text in own]
    assert len(rows) == len(set(rows))
    assert set(rows) == {text for own in SHARED.values() for text in own}
    data = json.loads((there.folder / "coordinator" / "run" / "data.json").read_text())["summary"]
    assert data["duplicates"] == {site: len(own) for site, own in left_out(there).items() if own}
    assert sum(data["duplicates"].values()) == 7
    assert data["left_out"] == []
    weights = {site: of["weight"] for site, of in there.records[1]["participants"].items()}
    assert weights == {site: data["counts"][site]["train"] for site in there.names}
    verdicts = {(line["verdict"], line["phase"]) for line in there.audit if "phase" in line}
    assert {("admitted", phase) for phase in (KEYS, DEAL, TAGS, LEAVE)} <= verdicts
    assert "7 rows were left out as duplicates" in (there.folder / "coordinator" / "run" / "report.html").read_text()


def test_sites_come_to_the_weights_of_one_process(
    trial: Callable[..., Trial], make: Callable[..., Recipe], tmp_path: Path
) -> None:
    there = trial(sites=2, rows=WITHIN)
    there.run()
    assert left_out(there) == {owner: list(range(10, 20)) for owner in ("ann", "bob")}
    assert found(there.folder / "coordinator" / "run") == found(at_home(make(rows=WITHIN), 2, tmp_path))


def test_near_rows_are_found_between_sites(trial: Callable[..., Trial]) -> None:
    long = "the patient has a mild fever after the scan of the left knee and some pain in the ward"
    other = [" ".join(chr(97 + (i * 7 + k * k) % 26) * 5 for k in range(12)) for i in range(10)]
    there = trial(sites=2, rows={"ann": [long, *other[:5]], "bob": [long + "s", *other[5:]]}, kind="near", **SHORT)
    there.run()
    rows = [text for own in kept(there).values() for text in own]
    assert sum(long in text for text in rows) == 1
    assert set(other) < set(rows)


def test_classes_count_by_their_names_however_a_site_numbers_them(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    def rows(names: list[str]) -> Dataset:
        labels = [names.index("flu"), names.index("knee")]
        data = Dataset.from_dict({"text": ["it hurts", "it hurts"], "label": labels})
        return data.cast_column("label", ClassLabel(names=names))

    one, other = (
        Kept(tmp_path / str(i), Exact()).fingerprints(rows(n))
        for i, n in enumerate((["flu", "knee"], ["knee", "back", "flu"]))
    )
    assert one == other == [[b"3:fluit hurts"], [b"4:kneeit hurts"]]


# After a crash.


def test_a_resumed_run_is_the_uninterrupted_one(
    trial: Callable[..., Trial], make: Callable[..., Recipe], tmp_path: Path
) -> None:
    there = trial(sites=2, rows=WITHIN, method="feddyn", rounds=2)

    def die(site: str, header: dict[str, Any], body: bytes) -> Answer:
        if header["settings"].get("round") == 2:
            raise KeyboardInterrupt
        return header, body

    there.down = die
    with pytest.raises(KeyboardInterrupt):
        there.run()
    before = left_out(there)
    asked: list[str] = []

    def spy(site: str, header: dict[str, Any], body: bytes) -> Answer:
        asked.append(header["settings"].get("phase", ""))
        return header, body

    there.down = spy
    there.sites.clear()  # Site processes start again, too.
    there.run(resume=True)
    assert not {KEYS, DEAL, TAGS} & set(asked)
    assert left_out(there) == before
    home = at_home(make(rows=WITHIN, method="feddyn", rounds=2), 2, tmp_path)
    assert found(there.folder / "coordinator" / "run") == found(home)


def test_a_crash_while_sites_are_told_changes_nothing(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)

    def die(site: str, header: dict[str, Any], body: bytes) -> Answer:
        if header["settings"].get("phase") == LEAVE and site == there.names[1]:
            raise KeyboardInterrupt
        return header, body

    there.down = die
    with pytest.raises(KeyboardInterrupt):
        there.run()
    before = left_out(there)
    there.down = lambda site, header, body: (header, body)
    there.sites.clear()
    there.run(resume=True)
    assert left_out(there) == before
    rows = [text for own in kept(there).values() for text in own]
    assert len(rows) == len(set(rows)) == len({text for own in SHARED.values() for text in own})


def test_a_new_run_compares_anew(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)
    there.run()
    run = there.folder / "coordinator" / "run"
    run.rename(run.with_name("before"))
    asked: list[str] = []

    def spy(site: str, header: dict[str, Any], body: bytes) -> Answer:
        asked.append(header["settings"].get("phase", ""))
        return header, body

    there.down = spy
    there.run()
    assert asked.count(TAGS) == 3


def test_rows_that_changed_meanwhile_are_not_trained_on(trial: Callable[..., Trial]) -> None:
    there = trial(sites=2, rows=WITHIN, rounds=2, evaluation={"every": 0})
    victim = there.names[0]

    def swap(site: str, header: dict[str, Any], body: bytes) -> Answer:
        if header["settings"].get("round") == 2 and site == victim:
            place = there.folder / "sites" / victim / "rows.jsonl"
            place.write_text("".join(sorted(place.read_text().splitlines(keepends=True), reverse=True)))
            there.sites.pop(victim)
        return header, body

    there.down = swap
    there.run()
    [dropped] = there.records[2]["dropped"]
    assert dropped == {"client": victim, "reason": "DataError at the site, whose log says more"}


# Who refuses, lies or is away.


def test_a_site_compares_nothing_unless_its_policy_says_so(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)
    strict = there.names[0]
    change(there, strict, deduplicate=[])
    coordinator = there.folder / "coordinator" / "coordinator.yaml"
    coordinator.write_text(coordinator.read_text().replace("least: 3", "least: 2"))
    with pytest.warns(UserWarning, match="takes no part"):
        there.run()
    assert list(there.records[1]["participants"]) == there.names[1:]
    [refused] = [line for line in there.audit if line["verdict"] == "refused"]
    assert (
        "its policy's deduplicate allows only none, but the recipe's data.deduplicate is 'exact'" in refused["reason"]
    )


def test_a_coordinator_cannot_empty_a_site(trial: Callable[..., Trial]) -> None:
    there = trial(sites=2, rows=WITHIN, **SHORT)
    change(there, there.names[0], max_left_out=0.49)
    with pytest.raises(
        FedfmError,
        match=r"the rows of 2 sites must be compared, but those of 1 were; 'ann' was "
        r"dropped: site 'ann' refuses: its policy's max_left_out allows 0\.49 of the rows to be left "
        r"out, but 10 of 20 are to go",
    ):
        there.run()


def test_a_site_that_is_away_takes_no_part_where_fewer_are_enough(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)
    coordinator = there.folder / "coordinator" / "coordinator.yaml"
    coordinator.write_text(coordinator.read_text().replace("least: 3", "least: 2"))
    away = there.names[0]

    def lost(site: str, header: dict[str, Any], body: bytes) -> Answer:
        if site == away and header["settings"].get("phase") == TAGS:
            there.sites.pop(away)  # Restarted: its keys are gone.
        return header, body

    there.down = lost
    there.run()
    data = json.loads((there.folder / "coordinator" / "run" / "data.json").read_text())["summary"]
    assert data["left_out"] == [away]
    assert list(there.records[1]["participants"]) == there.names[1:]
    assert not there.records[1]["dropped"]
    log = (there.folder / "coordinator" / "log.jsonl").read_text()
    assert "has no keys for the comparison of rows: it was not asked for any, or was restarted" in log


def test_nobody_is_too_slow_to_be_compared(trial: Callable[..., Trial]) -> None:
    there = trial(**SHORT)
    there.delivery = {"enough": 1}
    there.run()
    assert set(left_out(there)) == set(there.names)
    assert json.loads((there.folder / "coordinator" / "run" / "data.json").read_text())["summary"]["left_out"] == []
    assert len(there.records[1]["participants"]) == 1, "of a round the first answer is enough"


def test_a_site_trains_on_nothing_before_its_rows_were_compared(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = trial(sites=2, **SHORT)
    monkeypatch.setattr("fedfm.deploy.coordinator.Coordinator.compared", lambda self, members, link: members)
    there.run()
    reasons = {line["reason"] for line in there.audit if line["verdict"] == "refused"}
    assert reasons == {"its rows were not compared with those of the other sites, as the recipe asks"}


def test_a_stranger_among_the_sites_gets_no_key(trial: Callable[..., Trial]) -> None:
    there = trial(sites=2, **SHORT)
    shutil.rmtree(there.folder / "sites" / there.names[0] / "peers")
    with pytest.raises(FedfmError, match=r"'bob' was dropped: it has no key of the site 'cid'.*Put cid\.pub into"):
        there.run()


def test_what_a_site_is_told_is_checked(tmp_path: Path) -> None:
    from datasets import Dataset

    from fedfm.deploy.policy import Policy, Refused
    from fedfm.errors import BadUpdate, DataError

    rows = Dataset.from_dict({"text": list("abcd")})
    allowed = Policy.model_validate(
        {"name": "n", "coordinator": "h:1", "data": {"kind": "file", "path": "x"}, "models": ["m"]}
    )
    kept = Kept(tmp_path / "rows.json", Exact())
    with pytest.raises(BadUpdate, match="its rows were not compared in this run"):
        kept.leave(rows, [1], allowed)
    kept.fingerprints(rows)
    assert kept.of(rows)["text"] == list("abcd")
    for wrong in ([4], [2, 1], [1, 1], [-1]):
        with pytest.raises(BadUpdate, match="are not places of its rows, in order and each once"):
            kept.leave(rows, wrong, allowed)
    with pytest.raises(Refused, match=r"max_left_out allows 0\.5 of the rows to be left out, but 3 of 4 are to go"):
        kept.leave(rows, [0, 1, 2], allowed)
    with pytest.raises(BadUpdate, match="others keep one that matches, so it has nothing to train on"):
        kept.leave(rows, [0, 1, 2, 3], allowed.model_copy(update={"max_left_out": 1.0}))
    assert not kept.known
    kept.leave(rows, [1, 3], allowed)
    kept.leave(rows, [1, 3], allowed)
    assert Kept(tmp_path / "rows.json", Exact()).of(rows)["text"] == ["a", "c"]
    with pytest.raises(BadUpdate, match="told to leave out other rows than before"):
        kept.leave(rows, [1], allowed)
    with pytest.raises(BadUpdate, match="compared already in this run"):
        kept.fingerprints(rows)
    with pytest.raises(DataError, match="are not those that were compared in this run"):
        kept.of(Dataset.from_dict({"text": list("abce")}))


def test_a_site_that_asks_for_an_epsilon_refuses(trial: Callable[..., Trial]) -> None:
    there = trial(sites=1, stages=[{"kind": "clip", "max_norm": 1.0}, {"kind": "local-gaussian", "std": 50.0}], **SHORT)
    change(there, there.names[0], max_epsilon=100.0)
    with pytest.warns(UserWarning, match="takes no part"), pytest.raises(FedfmError, match="sites must be there"):
        there.run()
    [refused] = [line for line in there.audit if line["verdict"] == "refused"]
    assert (
        "by data.deduplicate its rows decide on which rows others train, and of that no epsilon speaks"
        in (refused["reason"])
    )


def test_a_run_that_goes_on_has_the_same_kind(trial: Callable[..., Trial]) -> None:
    there = trial(sites=2, rows=WITHIN, **SHORT)
    there.run()
    recipe = there.folder / "app" / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    content["data"]["deduplicate"] = {"kind": "near"}
    recipe.write_text(yaml.safe_dump(content))
    for name in there.names:
        change(there, name, deduplicate=["*"])
    there.sites.clear()
    said = r"its rows were compared by Exact\(\), and the recipe says Near\(bands=16"
    with pytest.warns(UserWarning, match="takes no part"), pytest.raises(FedfmError, match=said):
        there.run(resume=True)
