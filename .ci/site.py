"""Hooks of MkDocs: what the pages in docs/ link to elsewhere in the repository.

Pictures are copied into the site. A link to another file becomes its text, because the site has no
such page.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]+)\)")
"""A link, or a picture, outside of docs/."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show and that are kept outside of docs/."""
    for page in files.documentation_pages():
        for picture, _, target in LINK.findall(page.content_string):
            if picture:
                source = ROOT / target.removeprefix("../")
                place = f"assets/{source.name}"
                if files.get_file_from_path(place) is None:
                    files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point pictures to their copies, and keep only the text of other links."""

    def inside(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        return f"![{text}](assets/{PurePosixPath(target).name})" if picture else text

    return LINK.sub(inside, markdown)
