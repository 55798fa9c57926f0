"""A report as a document of sections, and its three forms: one HTML file that needs nothing else, Markdown, JSON.

Texts from files are escaped by jinja2; pictures are SVG of :mod:`moeplan.reports.run_figures`, whose label says in
words what they show, and stands for them in Markdown and JSON. The same document gives the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from typing import Any

__all__ = ["Block", "Cards", "Document", "Picture", "Section", "Table", "Text", "to_html", "to_json", "to_markdown"]


@dataclass(frozen=True, slots=True)
class Cards:
    """Key figures: (label, value, detail)."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under column names; ``text_columns`` (numbers of columns) are left-aligned and may wrap. A line
    break in a cell shows on the page, and is a space elsewhere."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = (0,)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG; ``wide`` ones scroll on a phone, others stand in pairs."""

    svg: str
    wide: bool = False

    @property
    def label(self) -> str:
        """What it shows, in words."""
        found = re.search(r'aria-label="([^"]*)"', self.svg)
        return unescape(found[1]) if found else ""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, or with ``missing`` what is not there and why."""

    text: str
    missing: bool = False


Block = Cards | Table | Picture | Text


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: tuple[Block, ...]
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Title, facts under it, sections."""

    kind: str
    title: str
    facts: tuple[str, ...]
    sections: tuple[Section, ...]


def _groups(blocks: tuple[Block, ...]) -> list[tuple[str, Any]]:
    """Blocks with their template's name; pictures that are not wide stand together."""
    answer: list[tuple[str, Any]] = []
    for block in blocks:
        if isinstance(block, Picture) and not block.wide:
            if answer and answer[-1][0] == "pair":
                answer[-1][1].append(block)
            else:
                answer.append(("pair", [block]))
        else:
            answer.append((type(block).__name__.lower(), block))
    return answer


def to_html(document: Document) -> str:
    """One self-contained page."""
    from moeplan.reports.templating import page_environment

    page = page_environment().get_template("report.html.j2")
    return page.render(document=document, sections=[(s, _groups(s.blocks)) for s in document.sections])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_markdown(document: Document) -> str:
    """GitHub-flavoured Markdown; pictures as the sentence that describes them."""
    lines = [f"# {document.title}", "", " · ".join(document.facts), ""]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        lines += [section.lead, ""] if section.lead else []
        for block in section.blocks:
            if isinstance(block, Cards):
                for label, value, detail in block.items:
                    lines += [f"- **{label}**: {value}" + (f" ({detail})" if detail else "")]
            elif isinstance(block, Table):
                lines += ["| " + " | ".join(map(_cell, block.columns)) + " |"]
                sides = [":--" if i in block.text_columns else "--:" for i in range(len(block.columns))]
                lines += ["|" + "|".join(sides) + "|"]
                lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in block.rows]
                lines += ["", block.note] if block.note else []
            elif isinstance(block, Picture):
                lines += [f"*Picture:* {block.label}"]
            else:
                lines += [block.text]
            lines += [""]
    return "\n".join(lines)


def to_json(document: Document) -> dict[str, Any]:
    """The document as JSON values; pictures by their description."""

    def plain(block: Block) -> dict[str, Any]:
        if isinstance(block, Cards):
            items = [{"label": label, "value": value, "detail": detail} for label, value, detail in block.items]
            return {"figures": items}
        if isinstance(block, Table):
            rows = [[cell.replace("\n", " ") for cell in row] for row in block.rows]
            return {"columns": list(block.columns), "rows": rows, "note": block.note}
        if isinstance(block, Picture):
            return {"picture": block.label}
        return {"missing" if block.missing else "text": block.text}

    return {
        "schema_version": 1,
        "kind": document.kind,
        "title": document.title,
        "facts": list(document.facts),
        "sections": [
            {"title": s.title, "lead": s.lead, "blocks": [plain(b) for b in s.blocks]} for s in document.sections
        ],
    }
