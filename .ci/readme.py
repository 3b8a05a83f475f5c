"""README.md from nbs/index.ipynb; `--check` only says whether it is fresh."""

import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    body, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    body = re.sub(r"^#\| .*\n", "", body, flags=re.M)  # nbdev's directives are not for readers
    # links in the notebook start from nbs/, those of the README from the top
    body = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", body).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", render()
    if "--check" in sys.argv[1:]:
        if not path.exists() or path.read_text() != text:
            sys.exit("README.md is stale: run  make readme")
    else:
        path.write_text(text)
