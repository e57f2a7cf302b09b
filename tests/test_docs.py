"""Links of the docs to functions, [`name`](../file.py#L12). `python tests/test_docs.py` puts the numbers right."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./(\w+\.py)#L\d+\)")


def lines_of(file: str) -> dict[str, int]:
    """Name -> line of the functions, classes and methods (`Class.name`) of a file."""
    lines = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            inner = node.body if isinstance(node, ast.ClassDef) else []
            lines |= {f"{node.name}.{n.name}": n.lineno for n in inner if isinstance(n, ast.FunctionDef)}
    return lines


def corrected(text: str) -> str:
    """The text with the right line in every link. KeyError for a name that its file does not define."""

    def link(found):
        name, file = found.groups()
        return f"[`{name}`](../{file}#L{lines_of(file)[name.removeprefix(file[:-2])]})"

    return LINK.sub(link, text)


def test_links_to_functions():
    pages = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    for name in ("ra3.md", "rmt.md", "grpo_rlvr.md", "eval_code.md"):
        assert len(LINK.findall(pages[name])) > 4, name
    for name, text in pages.items():
        assert corrected(text) == text, f"docs/{name}: run `python tests/test_docs.py`"


if __name__ == "__main__":
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(corrected(page.read_text()))
