"""Put the tables of studies into results.md, by ``python scripts/make_results.py``.

Each block between `<!-- NAME -->` and `<!-- end -->` becomes what ``ldlm study`` wrote into `results/NAME/table.md`.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def fill(page: str) -> str:
    """The page with each block as its study wrote it."""

    def table(block: re.Match[str]) -> str:
        content = (DOCS / "results" / block[1] / "table.md").read_text(encoding="utf-8")
        return f"<!-- {block[1]} -->\n\n{content}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.S)


if __name__ == "__main__":
    results = DOCS / "results.md"
    results.write_text(fill(results.read_text(encoding="utf-8")), encoding="utf-8")
