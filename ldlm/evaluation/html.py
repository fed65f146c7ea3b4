"""Pages of HTML from the templates in `templates/`: self-contained, and with all text escaped.

In: a template's name and its values. Out: a file that stands alone, without script or style from elsewhere.
No section of the paper.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ldlm._files import write_atomically


def write_page(path: str | Path, template: str, values: dict[str, Any]) -> None:
    """Write a page whole or not at all.

    Args:
        path: Of the file.
        template: A file in `templates/`. What it shows is escaped: texts may hold anything, and do nothing.
        values: By the names that the template uses; one that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader("ldlm", "evaluation/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    with write_atomically(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # a file's name may be no UTF-8
