r"""The pages' own language: `{{name}}` is filled in, `\( x_t \)` and `\[ ... \]` become MathML.

Whatever comes out of a file is told by `plain` before it enters a page; all other functions take HTML and give HTML.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re

from PIL import Image

from snowmelt.files import printable
from snowmelt.pages.mathml import formulas, mathml


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its mathematics set and every `{{name}}` replaced; both ways a missing name is a mistake."""
    text = re.sub(r"\\\[(.+?)\\\]", lambda found: mathml(found.group(1), display=True), template, flags=re.S)
    text = formulas(text)
    wanted = set(re.findall(r"\{\{(\w+)\}\}", text))
    assert wanted == set(values), f"in the template or given, but not both: {wanted ^ set(values)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found.group(1)], text)


def plain(text: object) -> str:
    """Text of whatever origin as HTML that shows it and does nothing."""
    return html.escape(printable(str(text)))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG, as few as there can be."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    """The bytes of a picture inside an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def img(address: str, size: tuple[int, int], alt: str, *, name: str = "") -> str:
    """An `<img>`; `size` is its width and height in pixels, `name` its id."""
    label = f' id="{name}"' if name else ""
    return f'<img{label} src="{address}" width="{size[0]}" height="{size[1]}" alt="{plain(alt)}">'


def figure(picture_html: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{picture_html}<figcaption>{caption}</figcaption></figure>"


def table(head: list[str], rows: list[list[str]], label: str) -> str:
    """A table whose first column names its rows, in a box that scrolls where the page is narrow."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in row)

    body = "".join(f'<tr><th scope="row">{row[0]}</th>{cells("td", row[1:])}</tr>' for row in rows)
    box = f'<div class="table" tabindex="0" role="group" aria-label="{html.escape(label)}">'
    return f"{box}<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def details(summary: str, content: str) -> str:
    """What is folded until someone asks for it."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def items(entries: list[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{entry}</li>' for entry in entries)}</ul>" if entries else ""


def code(lines: list[str]) -> str:
    """Command lines, to be copied."""
    return f'<pre tabindex="0"><code>{plain_lines(lines)}</code></pre>'


def plain_lines(lines: list[str]) -> str:
    """Lines of whatever origin, as HTML that shows them."""
    return "\n".join(plain(line) for line in lines)


def number(value: float | int, digits: int = 3) -> str:
    """To so many digits: 0.135, 0.0045, 9.21, −4.30 or 4.0 · 10⁻⁵, with a true minus; whole ones without a point."""
    if value == int(value) and abs(value) < 1000:
        text = str(int(value))
    elif abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa} · 10{power}"
    else:
        before = math.floor(math.log10(abs(value))) + 1
        wanted = digits if before >= 0 else min(digits, 2)
        text = f"{value:,.{max(0, wanted - before)}f}"
    return text.replace("-", "−")
