"""What the documents show is what there is."""

from __future__ import annotations

from pathlib import Path

import fedfm

HERE = Path(__file__).parents[1]


def test_the_method_in_the_guide_is_its_file() -> None:
    text = (HERE / "docs/how-to-add-a-method.md").read_text()
    shown = text.split("```python\n")[1].split("```")[0]
    assert shown == (Path(fedfm.__file__).parent / "methods/lora/ffa_lora.py").read_text()


def test_links_in_documents_lead_somewhere() -> None:
    for page in [HERE / "README.md", *(HERE / "docs").glob("*.md"), HERE / "benchmarks/fidelity/README.md"]:
        for link in page.read_text().split("](")[1:]:
            target = link.split(")")[0].split("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
