"""Exit codes of the commands for federations: 0 done, 1 failed, 2 unusable input, 130 stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")
from fedfm.cli import main
from fedfm.deploy import channel, local, logs
from fedfm.errors import FedfmError
from fedfm.recipe import Recipe
from tests.deploy.conftest import Make

ADDRESS = "127.0.0.1:9092"
RESULTS = {
    "status": "completed",
    "title": "trial",
    "model": "m",
    "method": "fedit",
    "task": "chat",
    "primary": "loss",
    "parameters": {"total": 1, "trainable": 1, "shared": 1},
    "runs": {},
    "test": {"base": None, "fedit": None},
    "samples": [],
    "final": "final",
}


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        [line] = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


def fedfm(*words: object) -> Done:
    """The command line, in this process: the imports alone take seconds."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fedfm", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The logger and what signals do, as they were; until then a signal that no command awaits is a Ctrl-C."""

    def interrupt(*of: Any) -> None:
        raise KeyboardInterrupt

    before = logs.log.handlers[:], logs.log.level, logs.log.propagate
    awaited = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, action in awaited.items():
        signal.signal(number, action)
    logs.log.handlers[:], logs.log.propagate = before[0], before[2]
    logs.log.setLevel(before[1])


@pytest.fixture
def recipe_file(recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    place = tmp_path / "recipe.yaml"
    place.write_text(recipe().to_yaml())
    return place


# Before anything is started.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no"),
        ("", "recipe"),
        ("- a list", "recipe"),
        ("model: [", "not YAML"),
        ("title: !!python/object/apply:os.getcwd []", "not YAML"),
        ("rouns: 3", "Did you mean 'rounds'?"),
        ("model: m\nmethod: fedt", "Did you mean 'fedit'?"),
    ],
    ids=["absent", "empty", "list", "no YAML", "tags", "unknown key", "unknown method"],
)
@pytest.mark.parametrize("command", ["init", "up"])
def test_a_bad_recipe(recipe_file: Path, tmp_path: Path, command: str, content: str | None, words: str) -> None:
    good = yaml.safe_load(recipe_file.read_text())
    if content is None:
        recipe_file.unlink()
    elif content.startswith(("rouns", "model: m")):
        recipe_file.write_text(yaml.safe_dump(good | yaml.safe_load(content)))
    else:
        recipe_file.write_text(content)
    options = ("--sites", "north") if command == "init" else ("--local", "--sites", "1")
    done = fedfm("deploy", command, tmp_path / "new", "--recipe", recipe_file, *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.error
    assert "Traceback" not in done.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sites", "../north"], "letters, digits"),
        (["--sites", ","], "--sites"),
        (["--sites", "north,north"], "--sites"),
        (["--sites", "north", "--address", "here"], "--address must be HOST:PORT"),
        (["--sites", "north", "--listen", "here:0"], "--listen must be HOST:PORT"),
        (["--sites", "north", "--set", "rounds"], "--set takes KEY=VALUE"),
        (["--sites", "north", "--set", "data.public=0.5"], "data.public must be 0"),
    ],
)
def test_options_that_cannot_be_used(recipe_file: Path, tmp_path: Path, options: list[str], words: str) -> None:
    done = fedfm("deploy", "init", tmp_path / "new", "--recipe", recipe_file, *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.error
    assert not (tmp_path / "new").exists()


def test_init_and_certs(recipe_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    init = ("deploy", "init", place, "--recipe", recipe_file, "--sites", "north")
    assert fedfm(*init).code == 0
    again = fedfm(*init)
    assert (again.code, again.out) == (1, "")
    assert "is not empty" in again.error
    assert fedfm("deploy", "certs", place).code == 0
    assert fedfm("deploy", "certs", place).code == 0  # what is there stays
    (place / "coordinator" / "ca.key").unlink()
    (place / "coordinator" / "server.pem").unlink()
    lost = fedfm("deploy", "certs", place)
    assert lost.code == 1
    assert "ca.key" in lost.error
    assert fedfm("deploy", "init", "/proc/no/such", *init[3:]).code == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [(("deploy", "certs"), "fedfm deploy init"), (("deploy", "site"), "fedfm deploy init"), (("run",), "recipe")],
    ids=["certs", "site", "run"],
)
def test_a_folder_that_is_no_federation(tmp_path: Path, words: Sequence[str], told: str) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        done = fedfm(*words, place)
        assert (done.code, done.out) == (2, "")
        assert told in done.error
        assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("command", ["log", "status", "stop"])
def test_looking_at_what_is_no_federation(tmp_path: Path, command: str) -> None:
    done = fedfm(command, tmp_path / "absent")
    assert (done.code, done.out) == (2, "")
    assert "fedfm deploy init" in done.error


@pytest.mark.parametrize("command", ["status", "stop"])
def test_nothing_was_run(folder: Make, command: str) -> None:
    done = fedfm(command, folder(sites=1))
    assert (done.code, done.out) == (1, "")
    assert "nothing was run" in done.error


def test_an_earlier_run_is_not_given_up(folder: Make) -> None:
    place = folder(sites=1)
    (place / "coordinator" / "run").mkdir()
    (place / "coordinator" / "run" / "metrics.jsonl").write_text("")
    done = fedfm("run", place)
    assert (done.code, done.out) == (1, "")
    assert "--resume" in done.error


def test_up_says_that_it_is_local(tmp_path: Path, recipe_file: Path) -> None:
    done = fedfm("deploy", "up", tmp_path / "new", "--recipe", recipe_file)
    assert done.code == 2
    assert "--local" in done.error
    more = fedfm("deploy", "up", tmp_path / "new", "--local", "--sites", "9", "--recipe", recipe_file)
    assert more.code == 1
    assert "only 3 clients" in more.error


@pytest.mark.parametrize(
    "words",
    [
        ("deploy", "init"),
        ("deploy", "site"),
        ("run",),
        ("run", "x", "--rounds", "3"),
        ("deploy", "up", "--sites", "0"),
        ("stop",),
    ],
    ids=" ".join,
)
def test_words_that_are_none_of_the_command(words: Sequence[str]) -> None:
    done = fedfm(*words)
    assert (done.code, done.out) == (2, "")
    assert "Usage" in done.err


# A site.


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda site: (site / "signing.key").unlink(), 1, "fedfm deploy certs"),
        (lambda site: (site / "coordinator.pub").unlink(), 1, "coordinator.pub"),
        (lambda site: (site / "signing.key").write_text("no key"), 1, "signing.key must hold"),
        (lambda site: (site / "signing.key").chmod(0o644), 1, "must be open to its owner alone"),
        (lambda site: (site / "policy.yaml").write_text("models: ["), 2, "not YAML"),
        (lambda site: (site / "policy.yaml").write_text("name: x\nmodles: [m]\n"), 2, "modles"),
        (lambda site: (site / "state" / "last").write_text("no number"), 1, "is damaged"),
    ],
    ids=["no key", "no coordinator", "another file", "open", "no YAML", "unknown key", "damaged state"],
)
def test_a_site_that_cannot_be_served(folder: Make, spoil: Callable[[Path], Any], code: int, words: str) -> None:
    [site] = (folder(sites=1) / "sites").iterdir()
    (site / "state").mkdir(mode=0o700)
    spoil(site)
    done = fedfm("deploy", "site", site)
    assert (done.code, done.out) == (code, "")
    assert words in done.error
    assert not (site / "site.sock").exists()


def until_served(site: Path, then: Callable[[], Any]) -> threading.Thread:
    """Do something once the site answers."""

    def wait() -> None:
        until = time.monotonic() + 20
        while not channel.present(site / "site.sock") and time.monotonic() < until:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_site_that_is_stopped_ends_well(folder: Make, number: signal.Signals) -> None:
    """As a service it is not to be started again for that."""
    [site] = (folder(sites=1) / "sites").iterdir()
    thread = until_served(site, lambda: os.kill(os.getpid(), number))
    done = fedfm("deploy", "site", site)
    thread.join(20)
    assert done.code == 0, done.err
    assert not (site / "site.sock").exists()


def test_a_second_process_for_a_site(folder: Make) -> None:
    from fedfm.deploy.site import Site

    [place] = (folder(sites=1) / "sites").iterdir()
    first = Site(place)
    done = fedfm("deploy", "site", place)
    assert (done.code, done.out) == (1, "")
    assert "another process serves" in done.error
    first._lock.close()


# How a run ended.


@pytest.fixture
def ending(folder: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """A command over a federation whose Flower says that the run is under way, then how it ended."""
    place = folder(sites=1)

    def act(
        command: str, said: Sequence[str | Callable[[], Any]], *options: str, files: Any = (), reason: str = ""
    ) -> Done:
        run, left = place / "coordinator" / "run", list(said)

        def submit(folder: Path, resume: bool) -> int:
            run.mkdir()
            for name, content in dict(files).items():
                (run / name).write_text(json.dumps(content) + "\n")
            # As the run's own process does.
            lines = [{"time": 1.0, "message": "run failed", "reason": "long ago"}]
            lines += [{"time": time.time(), "message": "run failed", "reason": reason}] if reason else []
            (run.parent / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return 7

        def status(folder: Path) -> str:
            now = left.pop(0) if len(left) > 1 else left[0]
            return now if isinstance(now, str) else now() or "running"

        @contextmanager
        def federation(*of: Any) -> Iterator[Any]:
            yield local.Processes(place / "logs")

        monkeypatch.setattr("fedfm.cli.deploy.POLL_S", 0.0)
        monkeypatch.setattr("fedfm.cli.deploy.ASK_S", 0.0)
        monkeypatch.setattr(local, "submit", submit)
        monkeypatch.setattr(local, "status", status)
        monkeypatch.setattr(local, "current", lambda folder: 7)
        monkeypatch.setattr(local, "federation", federation)
        return fedfm(*(("deploy", "up", place, "--local") if command == "up" else ("run", place)), *options)

    return act


@pytest.mark.parametrize("command", ["run", "up"])
def test_a_run_that_is_completed(ending: Callable[..., Done], command: str) -> None:
    said = ["pending", "running", "finished:completed"]
    done = ending(command, said, "--json", files={"results.json": RESULTS})
    assert done.code == 0, done.err
    assert json.loads(done.out) == RESULTS


@pytest.mark.parametrize("command", ["run", "up"])
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_run_that_failed(ending: Callable[..., Done], command: str, as_json: bool) -> None:
    reason = "cannot write final: No space left"
    done = ending(command, ["running", "finished:failed"], *(["--json"] if as_json else []), reason=reason)
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith(f"error: the run failed: {reason}")


def test_a_run_that_failed_without_a_word(ending: Callable[..., Done]) -> None:
    """Why an earlier one failed is not said again, be it in the log or in its folder."""
    files = {"status.json": {"status": "failed", "reason": "long ago"}}
    done = ending("run", ["finished:failed"], "--resume", files=files)
    assert (done.code, done.out) == (1, "")
    assert "the run failed" in done.error
    assert "long ago" not in done.error


@pytest.mark.parametrize("command", ["run", "up"])
def test_a_run_that_somebody_stopped(ending: Callable[..., Done], command: str) -> None:
    done = ending(command, ["running", "finished:stopped"], "--json", files={"status.json": {"status": "stopped"}})
    assert (done.code, done.out) == (130, "")


@pytest.mark.parametrize(("command", "stops"), [("run", []), ("up", [("stop", "7", "fedfm")])])
def test_ctrl_c_leaves_a_run_and_stops_one_of_this_machine(
    ending: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, command: str, stops: list[tuple[str, ...]]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(local, "flwr", lambda folder, *words: asked.append(words) or "")
    done = ending(command, ["running", lambda: os.kill(os.getpid(), signal.SIGINT), "running"])
    assert (done.code, done.out) == (130, "")
    assert asked == stops


def test_a_second_ctrl_c_ends_it_at_once(ending: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    assert ending("run", ["running", twice, "running"]).code == 130


def test_a_process_that_ends_while_all_run_on_this_machine(
    ending: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(processes: local.Processes) -> list[str]:
        raise FedfmError("superlink ends again and again. It said: nothing")

    monkeypatch.setattr(local.Processes, "tend", ended)
    done = ending("up", ["running"])
    assert (done.code, done.out) == (1, "")
    assert "superlink ends again and again" in done.error


def lost() -> None:
    raise FedfmError("flwr list failed: SuperLink unavailable")


@pytest.mark.parametrize("command", ["run", "up"])
def test_a_coordinator_that_does_not_answer_for_a_while(ending: Callable[..., Done], command: str) -> None:
    done = ending(command, ["running", lost, lost, "finished:completed"], "--json", files={"results.json": RESULTS})
    assert done.code == 0, done.err


def test_a_coordinator_that_answers_no_more(ending: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfm.cli.deploy.SILENT_S", 0.0)
    done = ending("run", ["running", lost])
    assert (done.code, done.out) == (1, "")
    assert "SuperLink unavailable" in done.error


@pytest.mark.parametrize("option", [("--set", "rounds=3"), ("--overwrite",)], ids=lambda option: option[0])
def test_what_sites_agreed_to_is_not_changed_in_passing(folder: Make, option: Sequence[str]) -> None:
    place = folder(sites=1)
    done = fedfm("run", place, *option)
    assert (done.code, done.out) == (2, "")
    assert "whose sites have agreed to its recipe" in done.error


# What Flower says.


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a program that is none of fedfm's: it hangs up on everybody."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(0.1)

        def serve() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    door.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{door.getsockname()[1]}"
        ended.set()
        thread.join(20)


@pytest.mark.slow
def test_a_port_that_is_in_use(folder: Make, stranger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run at another's server, and nothing is left running."""
    started: list[Any] = []
    start = local.Processes.start

    def note(processes: local.Processes, *words: Any) -> None:
        start(processes, *words)
        started.extend(processes.running.values())

    monkeypatch.setattr(local.Processes, "start", note)
    done = fedfm("deploy", "up", folder(sites=1, address=stranger), "--local")
    assert (done.code, done.out) == (1, "")
    assert f"something listens at {stranger} already" in done.error
    assert "Traceback" not in done.err
    assert not started


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "status"])
def test_a_superlink_that_is_away(folder: Make, command: str) -> None:
    """Flower's own command says so, too, but ends as if all were well when it is asked for JSON."""
    place = folder(sites=1, address=f"127.0.0.1:{local.free_port()}")
    (place / "coordinator" / "flower" / "run").write_text("7")
    done = fedfm(command, place)
    assert (done.code, done.out) == (1, "")
    assert "SuperLink" in done.error
