"""Markdown tables, and putting them between a page's markers."""

import re


def table(header: list[str], lines: list[list]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def fill(page: str, tables: dict[str, str], partly: bool = False) -> str:
    """Replace what stands between each `<!-- table: NAME -->` and its `<!-- end -->`.

    Args:
        page: Markdown.
        tables: by name.
        partly: leave those that are not in `tables` as they are.

    Raises:
        ValueError: the page asks for a table that is not there.
    """

    def replace(match: re.Match) -> str:
        if match[1] not in tables and partly:
            return match[0]
        if match[1] not in tables:
            raise ValueError(f"no rows of {match[1]}; wanted some, for the page's table of it")
        return f"<!-- table: {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)
