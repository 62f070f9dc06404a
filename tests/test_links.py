"""Relative links between the pages, and the anchors that they name, resolve."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def markdown_pages() -> list[Path]:
    """Return every page of the repository, whether or not it is committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split() if done.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md")]
    return [
        ROOT / name for name in sorted(names) if not name.startswith((".venv", "docs/api")) and (ROOT / name).exists()
    ]


def without_code(text: str) -> str:
    """Return a page without its fenced blocks, comments and inline code, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings by GitHub's rule: lower case, no punctuation, hyphens for blanks."""
    counts: dict[str, int] = {}
    slugs = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        slugs.add(slug if slug not in counts else f"{slug}-{counts[slug]}")
        counts[slug] = counts.get(slug, 0) + 1
    return slugs | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def links(text: str) -> list[str]:
    """Return the targets of a page's links and images."""
    plain = re.sub(r"`[^`\n]*`", "", without_code(text))
    return [*re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", plain), *re.findall(r'(?:src|href)="([^"]+)"', plain)]


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_dir() and anchor:
            target /= "README.md"
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def test_anchors_follow_githubs_rule() -> None:
    text = "# A `walk` of *data*: two\n\n## Same\n\n## Same\n\n```text\n# no heading\n```\n"
    assert anchors(text) == {"a-walk-of-data-two", "same", "same-1"}


def test_links_to_missing_targets_are_broken(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# There\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n[](b.md) [](b.md#there) [](#top) [](https://example.org/x) `[](code.md)`\n"
        "[](missing.md) [](b.md#nowhere) [](#bottom) ![a picture](no.svg)\n"
    )
    assert broken_links(page) == ["missing.md", "b.md#nowhere", "#bottom", "no.svg"]


@pytest.mark.parametrize("page", markdown_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_every_room_has_a_sign() -> None:
    """A room is a folder of modules at the top of the package; ``testing`` is one too."""
    rooms = {path.parent for path in (ROOT / "fx_influence").glob("*/__init__.py")}
    assert {str(folder.relative_to(ROOT)) for folder in rooms if not (folder / "README.md").exists()} == set()
