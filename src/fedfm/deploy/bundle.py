"""The folder of a federation: what ``fedfm deploy init`` and ``fedfm deploy certs`` write."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from fedfm import __version__, composition
from fedfm.deploy import keys
from fedfm.errors import DataError, RecipeError, StoreError
from fedfm.experiment import Experiment
from fedfm.models.load import CLASSIFIERS
from fedfm.recipe import Recipe
from fedfm.store.files import write_bytes, writing

SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
"""What a site may be called: it is also a folder, and the name of its client."""


def see_deployable(recipe: Recipe) -> None:
    """See that a recipe can run where rows stay at sites.

    Raises:
        RecipeError: it needs rows that the server does not have, or what sites cannot check.
    """
    if recipe.data.public:
        raise RecipeError("data.public must be 0 in a deployed federation: sites and server have no rows in common.")
    if recipe.data.without:
        raise RecipeError(
            "data.without must be empty in a deployed federation: a site that has left is not named among its sites."
        )
    built = recipe.built()
    if (method := built["method"]).simulated_only:
        raise RecipeError(f"the method {method.id} sees all clients' data: it runs only in simulation.")
    own = composition.composed(method, {name: built[name] for name in composition.NOTHING})
    for part in (*own["stages"], own["privacy"]):
        if getattr(part, "target_epsilon", 0):
            raise RecipeError(
                f"{type(part).__name__} target_epsilon cannot be used in a deployed federation: a site checks the "
                "noise before it knows how many sites and rows there are. Give noise_multiplier instead; "
                "fedfm check prints the one that a target takes."
            )


def init(
    folder: Path, recipe: Recipe, sites: Sequence[str], address: str, listen: str = "", hosts: Sequence[str] = ()
) -> None:
    """Write the folder of a federation, without keys.

    Args:
        folder: to make; must be absent or empty.
        recipe: what is run.
        sites: their names.
        address: ``host:port`` at which sites reach the coordinator.
        listen: ``host:port`` at which the SuperLink listens; by default the same port, on the loopback interface.
        hosts: further names and addresses of the coordinator's machine.

    Raises:
        RecipeError: names or address cannot be used, or the recipe needs rows that the server does not have.
        StoreError: there is something in the folder.
    """
    host, port = _parted(address, "--address")
    listen = listen or f"127.0.0.1:{port}"
    _parted(listen, "--listen")
    if bad := [site for site in sites if not SITE.fullmatch(site)]:
        raise RecipeError(f"a site's name must be letters, digits, - and _, at most 60, but one is {bad[0]!r}.")
    if len(set(sites)) < len(sites) or not sites:
        raise RecipeError(f"--sites must name at least one site, and each once, but is {', '.join(sites) or 'empty'}.")
    see_deployable(recipe)
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty. Choose another folder, or remove it.")
    title = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-") or "federation"
    title = title if title[0].isalpha() else f"f-{title}"
    coordinator = folder.resolve() / "coordinator"
    fills = {
        "name": title[:32].rstrip("-"),
        "version": __version__,
        "address": address,
        "host": host,
        "port": port,
        "folder": str(folder.resolve()),
        "coordinator": json.dumps(str(coordinator))[1:-1],
        "sites": "\n".join(f"- {site}" for site in sites),
    }
    for template, name in (
        ("pyproject.toml.txt", "app/pyproject.toml"),
        ("init.py.txt", "app/federation/__init__.py"),
        ("server.py.txt", "app/federation/server.py"),
        ("client.py.txt", "app/federation/client.py"),
        ("README.md", "README.md"),
        ("fedfm-superlink.service", "coordinator/fedfm-superlink.service"),
        ("compose.yaml", "compose.yaml"),
    ):
        _fill(template, folder / name, fills)
    # The run folder and what a person would read in the report are the coordinator's.
    write_bytes(folder / "app" / "recipe.yaml", recipe.to_yaml().encode())
    settings = {
        "name": fills["name"],
        "address": address,
        "listen": listen,
        "hosts": list(dict.fromkeys([host, *hosts, "127.0.0.1", "localhost"])),
        "least": len(sites),
        "patience_s": 300,
        "deadline_s": 86400,
        "enough": 0,
        "metrics": "",
        "labels": [],
    }
    _yaml(coordinator / "coordinator.yaml", settings)
    _flower(coordinator, listen)
    for site in sites:
        place = folder / "sites" / site
        for template in ("fedfm-site.service", "fedfm-supernode.service"):
            _fill(template, place / template, {**fills, "site": site})
        _yaml(place / "policy.yaml", _policy(site, address, recipe))


def certify(folder: Path) -> None:
    """Make the keys that are missing.

    Args:
        folder: of a federation: keys of the coordinator and of the sites whose keys it does not know yet. Or of a site:
            its own keys alone.

    Raises:
        RecipeError: the folder is neither.
    """
    from fedfm.deploy.coordinator import Settings

    if (folder / "policy.yaml").exists():
        _certify_site(folder)
        return
    coordinator = folder / "coordinator"
    settings = Settings.read(coordinator / "coordinator.yaml")
    if not (coordinator / "ca.pem").exists():
        keys.authority(coordinator, settings.name)
    if not (coordinator / "server.pem").exists():
        keys.server_certificate(coordinator, settings.hosts)
    if not (coordinator / "signing.key").exists():
        keys.signing_keys(coordinator)
    known = coordinator / "sites"
    with writing(known):
        known.mkdir(exist_ok=True)
    places = sorted(path.parent for path in (folder / "sites").glob("*/policy.yaml"))
    for place in places:
        with writing(place):
            shutil.copyfile(coordinator / "ca.pem", place / "ca.pem")
            shutil.copyfile(coordinator / "signing.pub", place / "coordinator.pub")
        if not (known / f"{place.name}.pub").exists():
            _certify_site(place)
            with writing(known):
                shutil.copyfile(place / "signing.pub", known / f"{place.name}.pub")
                shutil.copyfile(place / "node.pub", known / f"{place.name}.node.pub")
    for place in places:
        _acquaint(place, known)


def _acquaint(place: Path, known: Path) -> None:
    """Give a site the public keys of the others, with whom it may share a key that the coordinator has not."""
    with writing(place):
        (place / "peers").mkdir(exist_ok=True)
        for path in known.glob("*.pub"):
            theirs = place / "peers" / path.name
            if "." not in path.stem and path.stem != place.name and not theirs.exists():
                shutil.copyfile(path, theirs)


def _certify_site(place: Path) -> None:
    if not (place / "signing.key").exists():
        keys.signing_keys(place)
    if not (place / "node.key").exists():
        keys.node_keys(place)


def rehearsal(folder: Path, recipe: Recipe, count: int, address: str) -> list[str]:
    """The folder of a federation on this machine, with keys, whose sites are clients of the recipe with their rows.

    Args:
        folder: to make.
        recipe: whose clients.
        count: how many of them, drawn by the seed.
        address: of the coordinator.

    Returns:
        The names of the sites. A run of the recipe with ``data.max_clients`` = ``count`` has the same clients.
    """
    data = recipe.data.model_copy(update={"max_clients": count})
    recipe = recipe.model_copy(update={"data": data})
    # Sites find their duplicates themselves, so each has all of its rows.
    whole = data.model_copy(update={"deduplicate": None})
    people = Experiment(recipe.model_copy(update={"data": whole})).population
    sites = sorted(people.ids)
    if len(sites) < count:
        raise DataError(f"the recipe has only {len(sites)} clients, fewer than the {count} sites asked for.")
    init(folder, recipe, sites, address, address)
    for site in sites:
        rows = people.everything(site)
        lines = [json.dumps(_plain(row, people.label_names), ensure_ascii=False) for row in rows]
        write_bytes(folder / "sites" / site / "rows.jsonl", ("\n".join(lines) + "\n").encode())
    if people.label_names:
        place = folder / "coordinator" / "coordinator.yaml"
        _yaml(place, {**yaml.safe_load(place.read_text()), "labels": list(people.label_names)})
    certify(folder)
    return sites


def _parted(address: str, option: str) -> tuple[str, str]:
    """Host and port of ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise RecipeError(f"{option} must be HOST:PORT, such as fl.example.org:9092, but is {address!r}.")
    return host, port


def _plain(row: Mapping[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    """A row as JSON, with the names of classes."""
    return {**row, "label": labels[row["label"]]} if labels and "label" in row else dict(row)


def _policy(site: str, address: str, recipe: Recipe) -> dict[str, Any]:
    """A policy that allows what the recipe needs and no more."""
    built = recipe.built()
    return {
        "name": site,
        "coordinator": address,
        "data": {"kind": "file", "path": "rows.jsonl"},
        "models": [recipe.model.name],
        "tasks": [built["task"].id],
        "methods": [built["method"].id],
        "tensors": _names(recipe, built["task"].head),
        "min_examples": 1,
        "max_upload_bytes": 256 << 20,
        "require_stages": [stage.id for stage in built["stages"]],
        "secure": [built["secure"].id] if built["secure"] else [],
        "deduplicate": [kind.id] if (kind := recipe.deduplication()) else [],
    }


def _names(recipe: Recipe, head: str) -> list[str]:
    """Patterns of the tensors that the recipe's space tunes."""
    space = recipe.space if isinstance(recipe.space, str) else recipe.space["kind"]
    heads = ["classifier", "score"] if head in CLASSIFIERS else []
    return ["*.lora_A.*", "*.lora_B.*", *heads] if space == "lora" else ["*"]


def _flower(coordinator: Path, listen: str) -> None:
    """Flower's own settings, in a folder of their own: how its command reaches the SuperLink."""
    text = (
        '[superlink]\ndefault = "fedfm"\n\n[superlink.fedfm]\n'
        f"address = {json.dumps(listen)}\nroot-certificates = {json.dumps(str(coordinator / 'ca.pem'))}\n"
    )
    write_bytes(coordinator / "flower" / "config.toml", text.encode())


def _fill(template: str, place: Path, fills: Mapping[str, str]) -> None:
    text = (files("fedfm.deploy") / "templates" / template).read_text()
    write_bytes(place, Template(text).substitute(fills).encode())


def _yaml(place: Path, content: Mapping[str, Any]) -> None:
    write_bytes(place, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True).encode())
