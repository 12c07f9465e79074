r"""The page's own language: `{{name}}` is filled in, `\( x_t \)` and `\[ ... \]` become MathML, which browsers draw.

The mathematics is a small part of TeX: letters, numbers, `_`, `^`, braces, `\sqrt`, `\frac`, `\bar`, `\tilde`,
`\hat`, `\text`, the commands of `SYMBOLS`, and `\signal{}` and `\noise{}`, which give a term the colour that it has in
every picture.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re

from PIL import Image

from snowmelt.data.pixels import to_pixels
from snowmelt.pictures import picture
from snowmelt.shapes import Images

SYMBOLS = {
    "alpha": "α",
    "beta": "β",
    "mu": "μ",
    "sigma": "σ",
    "epsilon": "ε",
    "log": "log",
    "N": "𝒩",
    "I": "I",
    "prod": "∏",
    "approx": "≈",
    "sim": "∼",
    "cdot": "·",
    "ldots": "…",
    "mid": "|",
    "parallel": "∥",
    "to": "→",
    "le": "≤",
    "infty": "∞",
}
LETTERS = {"alpha", "beta", "mu", "sigma", "epsilon", "log", "N", "I", "infty"}
ACCENTS = {"bar": "¯", "tilde": "~", "hat": "^"}
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\\,|\d+(?:\.\d+)?|[a-zA-Z]|.)")


class _Formula:
    """A reader of one formula."""

    def __init__(self, tex: str) -> None:
        self.tex, self.place = tex, 0

    def peek(self) -> str:
        found = _TOKEN.match(self.tex, self.place)
        return found.group(1) if found else ""

    def take(self) -> str:
        found = _TOKEN.match(self.tex, self.place)
        assert found, f"the formula {self.tex!r} ends too early"
        self.place = found.end()
        return found.group(1)

    def row(self, stop: str) -> str:
        """Everything up to `stop`, which is taken too."""
        parts: list[str] = []
        while self.peek() != stop:
            parts.append(self.scripted())
        if stop:
            self.take()
        return "".join(parts)

    def group(self) -> str:
        """One argument: a braced row, or one symbol."""
        if self.peek() != "{":
            return self.atom()
        self.take()
        return f"<mrow>{self.row('}')}</mrow>"

    def scripted(self) -> str:
        """A symbol with what stands below and above it."""
        base, scripts = self.atom(), dict[str, str]()
        while self.peek() in ("_", "^"):
            mark = self.take()
            scripts[mark] = self.group()
        if not scripts:
            return base
        name = "m" + "sub" * ("_" in scripts) + "sup" * ("^" in scripts)
        return f"<{name}>{base}{''.join(scripts[key] for key in '_^' if key in scripts)}</{name}>"

    def atom(self) -> str:
        sign = self.take()
        if sign == "{":
            return f"<mrow>{self.row('}')}</mrow>"
        if sign == "\\,":
            return '<mspace width="0.2em"></mspace>'
        if sign.startswith("\\"):
            return self.command(sign[1:])
        if sign[0].isdigit():
            return f"<mn>{sign}</mn>"
        if sign.isalpha():
            return f"<mi>{sign}</mi>"
        return f"<mo{_quiet(sign)}>{html.escape('−' if sign == '-' else sign)}</mo>"

    def command(self, name: str) -> str:
        if name in ACCENTS:
            # A bar that says it is an accent is drawn into the letter by Chromium.
            kind = "" if name == "bar" else ' accent="true"'
            return f'<mover{kind}>{self.group()}<mo stretchy="false">{ACCENTS[name]}</mo></mover>'
        if name == "sqrt":
            return f"<msqrt>{self.group()}</msqrt>"
        if name == "frac":
            return f"<mfrac>{self.group()}{self.group()}</mfrac>"
        if name in ("signal", "noise"):
            return f'<mrow class="{name}">{self.group()}</mrow>'
        if name == "text":
            found = re.compile(r"\{([^}]*)\}").match(self.tex, self.place)
            assert found, "\\text wants braces"
            self.place = found.end()
            return f"<mtext>{html.escape(found.group(1))}</mtext>"
        tag = "mi" if name in LETTERS else "mo"
        upright = ' mathvariant="normal"' if name in ("I", "N") else ""
        return f"<{tag}{upright}>{SYMBOLS[name]}</{tag}>"


def _quiet(sign: str) -> str:
    """Parentheses keep the size of the letters around them."""
    return ' stretchy="false" lspace="0" rspace="0"' if sign in "()|" else ""


def mathml(tex: str, *, display: bool = False) -> str:
    """A formula as MathML, inline or on a line of its own."""
    row = _Formula(tex.strip()).row("")
    kind = ' display="block"' if display else ""
    return f"<math{kind}>{row}</math>"


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its mathematics set and every `{{name}}` replaced; both ways a missing name is a mistake."""
    text = re.sub(r"\\\[(.+?)\\\]", lambda found: mathml(found.group(1), display=True), template, flags=re.S)
    text = re.sub(r"\\\((.+?)\\\)", lambda found: mathml(found.group(1)), text, flags=re.S)
    wanted = set(re.findall(r"\{\{(\w+)\}\}", text))
    assert wanted == set(values), f"in the template or given, but not both: {wanted ^ set(values)}"
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found.group(1)], text)


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(images: Images) -> str:
    """The first of the images as a PNG inside an address: its pixels exactly, at its own size."""
    return "data:image/png;base64," + base64.b64encode(png(picture(to_pixels(images[:1])[0]))).decode()


def img(images: Images, alt: str, *, name: str = "") -> str:
    """An `<img>` of it; `name` is its id."""
    size = images.shape[-1]
    label = f' id="{name}"' if name else ""
    return f'<img{label} src="{data_uri(images)}" width="{size}" height="{size}" alt="{html.escape(alt)}">'


def figure(picture_html: str, caption: str) -> str:
    """A picture with its caption, which may hold mathematics."""
    words = re.sub(r"\\\((.+?)\\\)", lambda found: mathml(found.group(1)), caption)
    return f"<figure>{picture_html}<figcaption>{words}</figcaption></figure>"


def table(head: list[str], rows: list[list[str]], label: str) -> str:
    """A table whose first column names its rows, in a box that scrolls where the page is narrow."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in row)

    body = "".join(f'<tr><th scope="row">{row[0]}</th>{cells("td", row[1:])}</tr>' for row in rows)
    box = f'<div class="table" tabindex="0" role="group" aria-label="{html.escape(label)}">'
    return f"{box}<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table></div>"


def number(value: float, digits: int = 3) -> str:
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
