"""What users see first: public names, and that the README tells the truth."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import yaml

import fedfm
from fedfm import recipe
from fedfm.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README."""
    parts = re.split(r"^```(\w*)\n", README, flags=re.MULTILINE)[1:]
    # Fences open and close in turn: every second (word, text) pair is a block.
    return [text for word, text in list(zip(parts[::2], parts[1::2], strict=True))[::2] if word == language]


def test_public_names_are_complete_sorted_and_real() -> None:
    assert fedfm.__all__ == sorted(fedfm.__all__)
    assert set(fedfm.__all__) == set(fedfm._HOMES)
    for name in fedfm.__all__:
        assert getattr(fedfm, name).__doc__
    typed = re.findall(r"^    from \S+ import (.+)$", inspect.getsource(fedfm), flags=re.MULTILINE)
    assert {name.strip() for line in typed for name in line.split(",")} == set(fedfm.__all__)


def test_the_python_of_the_readme_uses_what_there_is() -> None:
    [code] = blocks("python")
    tree = ast.parse(code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module or ""), a.name) for a in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fedfm":
            assert node.attr in fedfm.__all__
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in fedfm.__all__:
            known = inspect.signature(getattr(fedfm, node.func.attr)).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(known)


def test_the_recipes_are_valid() -> None:
    example, more = map(yaml.safe_load, blocks("yaml"))
    assert recipe.parse(example).rounds == 10
    assert recipe.parse({**example, **more}).stages
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.read(path).folder == Path("runs") / path.stem


def test_every_command_of_the_readme_exists() -> None:
    [table] = [b for b in blocks("") if "fedfm run RECIPE" in b]
    named = set(re.findall(r"^fedfm (.+?)  ", table, flags=re.MULTILINE))
    words = {
        w
        for line in named
        for w in re.sub(r"\[.*|RECIPE.*|RUN.*|COMMAND|FOLDER|MODEL", "", line).replace("|", " ").split()
    }
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    commands |= {group.name for group in app.registered_groups}
    assert words == commands


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets


def test_files_that_the_docs_link_to_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_command_line_starts_without_extras() -> None:
    names = ("cryptography", "tenseal", "flwr", "ray", "opacus", "dp_accounting", "datasketch")
    code = f"import sys; sys.modules.update(dict.fromkeys({names!r})); import fedfm.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
