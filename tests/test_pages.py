"""What all pages share: text stays text, pictures fit their budget, and a comparison says what its numbers say."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conftest import open_page
from snowmelt.comparing.page import comparison_markdown, comparison_page, comparison_png, reasons_of
from snowmelt.comparing.rows import firsts, rows_of
from snowmelt.comparing.verdict import RETRAINED
from snowmelt.pages.charts import LIGHT, Line, lines_chart, svg
from snowmelt.pages.markup import details, fill, number, plain
from snowmelt.pages.measures import (
    Measure,
    bar,
    common_reason,
    drawing_words,
    learned_from,
    share_words,
    time_words,
    twins_share,
)
from snowmelt.pages.reading import embedded, finite, opened, or_reason, read_json
from snowmelt.pages.shell import Page, document, is_made_by

HOSTILE = '<script>alert("x")</script>{{name}} \\( x \\) $\\frac{ "onload=\'y\''


class Attributes(HTMLParser):
    """Collects the names of all attributes, as a browser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {name for name, _ in attrs}


def handlers(text: str) -> list[str]:
    """Attributes that would run something."""
    parser = Attributes()
    parser.feed(text)
    return [name for name in parser.names if name.startswith("on")]


def measure(metric="frechet", space="trained", value=4.5, **more) -> dict:
    fields = {"metric": metric, "title": f"The {metric}", "space": space, "better": "lower", "value": value}
    fields |= {"low": value - 0.25, "high": value + 0.25, "floor": 1.0, "floor_low": 0.9, "floor_high": 1.1}
    return {**fields, "samples": 500, "real": 400, "reason": "", **more}


def without_number(metric: str, space: str, reason: str) -> dict:
    nothing = dict.fromkeys(("value", "low", "high", "floor", "floor_low", "floor_high"))
    return {**measure(metric, space), **nothing, "reason": reason}


def run_of(name: str, value: float, **more) -> dict:
    figures = [
        measure(value=value),
        measure("recall", value=0.4, low=0.35, high=0.45, better="higher"),
        measure("patches", "pixels", value=0.031, low=0.03, high=0.032),
        without_number("frechet", "inception", "The weights are not here."),
    ]
    copies = {"share": 0.013, "low": 0.004, "high": 0.031, "count": 13, "false_alarms": 0.002}
    memorization = {"samples": 1000, "training": 5000, "copies": copies, "closer": {"share": 0.51}, "pairs": []}
    memorization |= {"duplicates": 8, "held_out": 392}
    spaces = {"trained": {"about": "An encoder.", "dimension": 64}}
    quality = {"samples": 500, "real": 400, "reference": "held-out pictures", "figures": figures, "spaces": spaces}
    moments = [{"share": s, "seconds": 60 * s, "figures": [measure(value=value / s)]} for s in (0.5, 1.0)]
    return {
        "name": name,
        "model": "vae",
        "path": "nowhere",
        "command": f"snowmelt train x --model {name}",
        "parameters": 1234567,
        "seconds": 600.0,
        "steps": 77,
        "images": 4928,
        "images_per_second": 41.5,
        "memory": 2**30,
        "seconds_per_picture": 0.0123,
        "drawing": {},
        "bits_per_dim": {"mean": 3.21, "standard_error": 0.01, "what": "bound"},
        "quality": quality | {"memorization": memorization},
        "over_time": moments,
        "sheet": f"sheets/{name}.png",
        **more,
    }


def comparison_of(*runs: dict, order: list[list[str]]) -> dict:
    table = [{"metric": "frechet", "space": "trained", "title": "The frechet", "order": order}]
    return {
        "source": "pictures.zip",
        "seconds": 1800.0,
        "seed": 3,
        "data": {"size": 8, "train": 5000, "held_out": 400, "classes": ["a", "b"], "fingerprint": "abcdef0123456789ff"},
        "runs": list(runs),
        "verdict": {"headline": "The best is one.", "sentences": ["It is best by far."], "table": table},
        "not_measured": ["Nobody looked at smells."],
    }


@pytest.fixture
def comparison(tmp_path) -> dict:
    (tmp_path / "sheets").mkdir()
    for name in ("one", "two"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(
            tmp_path / f"sheets/{name}.png"
        )
    return comparison_of(run_of("one", 4.5), run_of("two", 9.25, bits_per_dim=None), order=[["one"], ["two"]])


# what pages are made of


def test_text_stays_text():
    shown = plain(HOSTILE + "\x1b[31m\udcff")
    assert "<" not in shown and '"' not in shown and "\x1b" not in shown and "\\x1b" in shown
    # What is filled in is never read as the page's language again.
    assert fill("{{a}}", {"a": plain(HOSTILE)}).count("{{name}}") == 1


def test_numbers_that_are_none():
    assert [finite(value) for value in (1, 2.5, True, "3", None, math.nan, math.inf, 10**400)] == [1.0, 2.5] + [
        None
    ] * 6
    assert number(0.0004) == "4.0 · 10⁻⁴"


def test_a_part_that_cannot_be_read_is_a_sentence(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name in ("deep.json", "list.json", "bytes.json", "absent.json"):
        said = or_reason(lambda name=name: str(read_json(tmp_path / name)), "This <part>")
        assert "This &lt;part&gt; could not be read" in said and said.startswith('<p class="odd">')
    assert "it lacks" in or_reason(lambda: {}["frechet"], "This")
    with pytest.raises(NameError):
        or_reason(lambda: undefined, "A programmer's mistake")  # noqa: F821


def test_pictures_fit_their_budget(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    assert embedded(noise, 300_000).note == "" and embedded(noise, 300_000).address.startswith("data:image/png")
    small = embedded(noise, 20_000)
    assert small.bytes <= 20_000 and "JPEG" in small.note and small.size[0] < 256
    noise.save(tmp_path / "noise.jpg")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    for name in ("noise.jpg", "text.png", "absent.png"):
        with pytest.raises(OSError):
            opened(tmp_path / name)


def test_the_shell_lets_nothing_in(tmp_path):
    page = document(Page("report", "A title", "", "<p>body</p>"))
    text = page.decode()
    assert "default-src 'none'" in text and "unsafe-eval" not in text and "http:" not in text and "https:" not in text
    (tmp_path / "page.html").write_bytes(page)
    assert is_made_by(tmp_path / "page.html", "report") and not is_made_by(tmp_path / "page.html", "compare")


def test_a_chart_holds_what_it_is_given():
    chart = lines_chart("<Title>", "images", [Line("signal", [0.0, 10.0, 20.0], [100.0, 10.0, 1.0])])
    text = svg(chart, "name", chart.title)
    assert 'aria-label="&lt;Title&gt;"' in text and "var(--signal)" in text
    assert not any(colour in text for colour in LIGHT.values()), "colours are the page's"
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    chart.draw(axes, LIGHT.__getitem__)
    assert axes.get_yscale() == "log" and list(axes.lines[0].get_ydata()) == [100.0, 10.0, 1.0]


def test_a_bar_lies_where_its_numbers_are():
    one = Measure.of(measure(value=8.0, low=6.0, high=10.0, floor_low=1.0, floor_high=2.0))
    found = bar(one)
    # From 0 to 10: the band from 10 to 20 %, the interval from 60 to 100 %, the dot at 80 %.
    assert 'class="floor" style="left:10.0%;width:10.00%"' in found
    assert 'class="span" style="left:60.0%;width:40.00%"' in found and 'class="dot" style="left:80.0%"' in found
    assert "6 to 10" in found
    reason = "Too few."
    assert common_reason([Measure.of(without_number("a", "b", reason))] * 2) == reason
    assert common_reason([one, Measure.of(without_number("a", "b", reason))]) == ""
    assert Measure.of({"value": "seven", "samples": None, "title": 3}).value is None


def test_words_of_what_was_measured():
    assert drawing_words({}, None) == "in a single step" and drawing_words(None, "bf16") == ""
    assert drawing_words({"sampler": "unipc", "steps": 15, "guide": ""}, "fp32") == "with sampler unipc, steps 15"
    assert drawing_words({"guidance": 0.0, "strip": False}, None) == "with guidance 0.0", "0 is a number, too"
    assert drawing_words({"steps": 8}, "bf16") == "with steps 8, in bf16"
    assert (time_words(0.0123), time_words(0.5)) == ("12.3 ms", "0.500 s")
    # 4 of 96 held-out pictures that are no twins, and 4 that are: 4 of 100.
    assert twins_share({"duplicates": 4, "held_out": 96}) == 0.04
    assert twins_share({}) is None and twins_share({"duplicates": 0, "held_out": 0}) is None
    assert share_words({"share": 0.013, "low": 0.004, "high": 0.031}) == ("1.3 %", "0.4 to 3.1 %")


def test_it_is_said_where_the_reference_was_learned_from():
    quality = run_of("one", 4.5)["quality"]
    assert learned_from(quality) == ""
    quality["spaces"]["trained"]["reference"] = "all pictures"
    said = learned_from(quality)
    assert "all pictures (seen by an encoder trained on these pictures), most of which were learned from" in said
    assert "all pictures, most" in learned_from(quality | {"reference": "all pictures"}), "all spaces alike"


# the comparison


def test_the_comparison_says_what_its_numbers_say(tmp_path, comparison):
    text = comparison_page(tmp_path, comparison).decode()
    assert "<h1>The best is one.</h1>" in text and "It is best by far." in text
    assert text.index("The best is one.</h1>") < text.index("See for yourself") < text.index("In numbers")
    numbers = (
        "4.50|4.25 to 4.75|9.25|1.3 %|0.4 to 3.1 %|12.3 ms|41.5 / s|1,234,567|3.21|4,928|10:00|2.0 %|in a single step"
    )
    for value in (*numbers.split("|"), "not defined", "Nobody looked at smells.", "The weights are not here."):
        assert value in text, value
    assert text.count("★ best") == 1, "one is best by the one number in which the verdict tells them apart"
    assert text.count('<figure class="sheet"') == 2 and "snowmelt train x --model two" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert "No distance can honestly be below it" in text
    assert f"more than {RETRAINED:g} times what chance in drawing explains" in text and "not measured here" in text


def test_a_tie_is_no_victory(comparison):
    tied = comparison_of(*comparison["runs"], order=[["one", "two"]])
    row = rows_of(tied)[0]
    assert not any(cell.best for cell in row.cells) and row.note == "nobody is ahead beyond chance"
    lacking = {**comparison["runs"][1], "name": "three"}
    lacking["quality"] = {"figures": [without_number("frechet", "trained", "Too few.")]}
    row = rows_of(comparison_of(*comparison["runs"], lacking, order=[["one"], ["two"]]))[0]
    assert not any(cell.best for cell in row.cells) and "not every one has a number" in row.note
    three = comparison_of(*comparison["runs"], run_of("three", 20.0), order=[["one", "two"], ["three"]])
    assert [cell.best for cell in rows_of(three)[0].cells] == [True, True, False]


def test_classes_have_rows_where_they_were_recognised(comparison):
    classes = {"as_asked": [0.79, 0.776, 0.812], "held_out_right": [0.98, 0.97, 0.99], "distance": 0.056}
    comparison["runs"][0]["quality"]["classes"] = classes
    comparison["runs"][1]["quality"]["classes"] = {"as_asked": None, "distance": None, "reason": "Too blurred."}
    recognised, balance = (row for row in rows_of(comparison) if row.aspect == "classes")
    assert [cell.value for cell in recognised.cells] == ["79.0 %", "–"] and "98.0 % are" in recognised.about
    assert recognised.cells[0].interval == "77.6 to 81.2 %" and balance.cells[0].value == "5.6 %"


def test_who_is_at_the_front(comparison):
    """Of the two numbers that tell anyone apart, one is best in both, two is tied in one."""
    comparison["verdict"]["table"] += [
        {"order": [["one", "two"], ["three"]]},
        {"order": [["one", "two"]]},
        {"order": 3},
    ]
    assert firsts(comparison, "one") == "At the front in 2 of 2 numbers"
    assert firsts(comparison, "two") == "At the front in 1 of 2 numbers"
    assert firsts({}, "one") == ""


def test_markdown_and_png(tmp_path, comparison):
    text = comparison_markdown(comparison)
    assert "# The best is one." in text and "4.50 (4.25 to 4.75) ★" in text and "- Nobody looked at smells." in text
    (tmp_path / "out.png").write_bytes(comparison_png(tmp_path, comparison))
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 2 * 600 and image.height > 400
    (tmp_path / "sheets/two.png").unlink()
    assert comparison_png(tmp_path, comparison)[:4] == b"\x89PNG"


def test_a_reason_is_told_once(comparison):
    """`compare` lists the reasons of figures bare; the page tells them with what they belong to."""
    comparison["not_measured"].append("The weights are not here.")
    assert [one for one in reasons_of(comparison) if "weights" in one] == [
        "Seen by Inception-v3: The weights are not here."
    ]


def test_a_hostile_comparison_is_only_shown(tmp_path, comparison):
    hostile = json.loads(json.dumps(comparison).replace('"one"', json.dumps(HOSTILE)))
    hostile["verdict"]["headline"] = hostile["source"] = hostile["runs"][1]["command"] = HOSTILE
    hostile["runs"][1]["sheet"] = "../../secret.png"
    hostile["runs"][1]["quality"]["figures"][0] |= {"title": HOSTILE, "reason": HOSTILE, "space": HOSTILE}
    text = comparison_page(tmp_path, hostile).decode()
    assert text.count("&lt;script&gt;alert") > 5
    assert handlers(text) == [] and text.count("<script") == 1, "the page's own, which the policy names by its hash"
    assert "Its sheet of samples is not there." in text
    assert "<script" not in comparison_markdown(hostile)
    assert comparison_png(tmp_path, hostile)


@pytest.mark.parametrize("damage", [{}, {"runs": None}, {"runs": [{}]}, {"runs": [{"quality": 3, "over_time": "x"}]}])
def test_a_comparison_with_holes_is_still_a_page(tmp_path, damage):
    text = comparison_page(tmp_path, damage).decode()
    assert "There is no verdict." in text and "could not be read" not in text
    assert comparison_markdown(damage) and comparison_png(tmp_path, damage)


LEFTS = "[...document.querySelectorAll('.sheets img')].map((one) => one.getBoundingClientRect().left)"


def test_the_comparison_fits_a_phone(browser, tmp_path, comparison):
    (tmp_path / "report.html").write_bytes(comparison_page(tmp_path, comparison))
    tab, _, complaints = open_page(browser, tmp_path / "report.html", width=390)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390 and complaints == []
    assert len(set(tab.evaluate(LEFTS))) == 1, "on a phone the sheets stand one below the other"
    tab.set_viewport_size({"width": 1280, "height": 900})
    assert len(set(tab.evaluate(LEFTS))) == 2, "and on a wide screen side by side"


def test_folded_parts_open():
    assert details("More", "<p>it</p>") == "<details><summary>More</summary><p>it</p></details>"
