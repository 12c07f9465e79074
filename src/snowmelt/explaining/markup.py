"""Pictures of the explaining page, which are images in [-1, 1], and captions that hold formulas."""

from __future__ import annotations

from snowmelt.data.pixels import to_pixels
from snowmelt.pages import markup
from snowmelt.pages.mathml import formulas
from snowmelt.pictures import picture
from snowmelt.shapes import Images


def data_uri(images: Images) -> str:
    """The first of the images as a PNG inside an address: its pixels exactly, at its own size."""
    return markup.data_uri(markup.png(picture(to_pixels(images[:1])[0])))


def img(images: Images, alt: str, *, name: str = "") -> str:
    """An `<img>` of it; `name` is its id."""
    return markup.img(data_uri(images), (images.shape[-1], images.shape[-2]), alt, name=name)


def figure(picture_html: str, caption: str) -> str:
    """A picture with its caption, which may hold mathematics."""
    return markup.figure(picture_html, formulas(caption))
