r"""Formulas as MathML, which browsers draw: a small part of TeX.

Letters, numbers, `_`, `^`, braces, `\sqrt`, `\frac`, `\bar`, `\tilde`, `\hat`, `\text`, the commands of `SYMBOLS`, and
`\signal{}` and `\noise{}`, which give a term the colour that it has in every picture.
"""

from __future__ import annotations

import html
import re

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


def formulas(text: str) -> str:
    r"""Every `\( x_t \)` in a text of ours as a formula in the line."""
    return re.sub(r"\\\((.+?)\\\)", lambda found: mathml(found.group(1)), text, flags=re.S)
