"""What the documentation's site has beside the pages in docs/: hooks of mkdocs.

The first page is the README. The pages of options and of Python are made from the YAML files and the
docstrings. Links to files outside docs/ become plain text, since the site does not hold these files.
"""

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]

PARTS = {
    "kwta_exp.activations": "Activations",
    "kwta_exp.models": "Networks",
    "kwta_exp.attacks": "Attacks",
    "kwta_exp.training.objectives": "Training",
    "kwta_exp.evaluation": "Evaluation",
}
"""Packages of which everything public is documented, and their headings."""


def on_files(files: "Files", *, config: "MkDocsConfig") -> "Files":
    """Add the pages that are made at build time."""
    from mkdocs.structure.files import File

    pages = {"index.md": home(), "options.md": options(), "python.md": python()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/, and to folders in it, as plain text."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./[^)]*|\w+/?)\)", r"\1", markdown)


def home() -> str:
    """The README, with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:CONTRIBUTING|CHANGELOG)\.md\)", r"\1", text)


def options() -> str:
    """Every option of every group: its YAML file, comments included."""
    lines = ["# Options", "", "`GROUP=OPTION` chooses one; `GROUP.key=value` changes a value of it.", ""]
    groups: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        groups.setdefault(path.parent.relative_to(ROOT / "conf").as_posix(), []).append(path)
    for group, paths in groups.items():
        lines += [f"## {'config' if group == '.' else group}", ""]
        for path in paths:
            lines += [f"**`{path.stem}`**", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def python() -> str:
    """The public classes and functions, by their docstrings."""
    lines = ["# Python", "", "## Audit", "", "::: kwta_exp.audit.audit", ""]
    for package, heading in PARTS.items():
        lines += [f"## {heading}", "", f"Import these from `{package}`.", ""]
        lines += [line for path in exported(package) for line in (f"::: {path}", "")]
    return "\n".join(lines)


def exported(package: str) -> list[str]:
    """The dotted paths of what a package imports and lists in its ``__all__``, where each is defined."""
    tree = ast.parse((ROOT / "src" / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8"))
    origins: dict[str, str] = {}
    listed: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origins |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            listed = ast.literal_eval(node.value)
    if not listed:
        raise ValueError(f"{package}: has no __all__")
    return [origins[name] for name in listed]
