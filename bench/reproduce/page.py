"""The report as Markdown, and as one HTML file with its pictures inside that a phone shows as well as a desktop."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 1px solid #d0d7de; padding-bottom: .3rem; margin-top: 2.5rem; }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto 0; }
img + em, p > em:only-child { display: block; text-align: center; color: #57606a; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #d0d7de; text-align: left; vertical-align: top; }
th { background: #f6f8fa; }
td[style*="right"] { white-space: nowrap; }
td code { display: block; min-width: 20rem; }
code { background: #f6f8fa; padding: .1rem .25rem; border-radius: 3px; font-size: .85em; }
"""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Markdown; columns after the first `words` are numbers and stand at the right.

    Raises ValueError for a row of another length, and for an empty cell: what is unknown says so.
    """
    lines = [_row(headers), _row(["---"] * words + ["---:"] * (len(headers) - words))]
    for row in rows:
        if len(row) != len(headers) or not all(row):
            raise ValueError(f"a row of {len(headers)} filled cells was expected, got {list(row)}")
        lines.append(_row([text.replace("|", "\\|").replace("\n", " ") for text in row]))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_html(markdown: str, title: str, folder: Path) -> str:
    """One page; pictures are read from `folder`."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer: RendererHTML, tokens: Sequence[Token], i: int, options: object, env: object) -> str:
        picture = (folder / str(tokens[i].attrs["src"])).read_bytes()
        alt = html.escape(tokens[i].content)
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n'
        f"<body>\n{parser.render(markdown)}</body>\n</html>\n"
    )
