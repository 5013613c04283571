"""The description for package indexes: the README without what leads into the repository, which is not there."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n\n.*?\n\n", re.DOTALL | re.MULTILINE)
"""A picture and the paragraph about it."""
LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:)[^)]*\)")
"""A link that is relative."""


class Description(MetadataHookInterface):
    """Called by hatchling for `[tool.hatch.metadata.hooks.custom]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": LINK.sub(r"\1", PICTURE.sub("", text)),
        }
