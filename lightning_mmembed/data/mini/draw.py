"""Pictures of looks: 64 x 64 pixels, drawn with Pillow, every one with its own jitter."""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lightning_mmembed.data.mini.shapes import SHAPES, Part
from lightning_mmembed.data.mini.world import Look

SIDE = 64
_CANVAS = 112  # sprites are drawn larger than needed and scaled down, which smooths their edges
_MARGIN = 6

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 24, 32),
    "orange": (255, 132, 0),
    "yellow": (252, 226, 20),
    "green": (10, 140, 44),
    "blue": (20, 66, 226),
    "purple": (128, 30, 176),
    "pink": (255, 120, 196),
    "brown": (122, 70, 26),
}
_GROUND: dict[str, tuple[int, int, int]] = {
    "grass": (146, 186, 92),
    "sand": (224, 198, 144),
    "snow": (232, 238, 246),
    "sky": (142, 208, 244),
    "night": (26, 30, 70),
}
_INK = (24, 20, 28)
_LIGHT = (252, 250, 240)

Pixels = NDArray[np.float32]
_ROWS: Pixels = np.arange(SIDE, dtype=np.float32)[:, None]
_COLUMNS: Pixels = np.arange(SIDE, dtype=np.float32)[None, :]
_SLOPE: Pixels = np.linspace(-1, 1, SIDE, dtype=np.float32)


def _draw_part(draw: ImageDraw.ImageDraw, part: Part, fill: int | tuple[int, int, int]) -> None:
    scale = (_CANVAS - 2 * _MARGIN) / 100
    points = [_MARGIN + value * scale for value in part.points]
    if part.form == "polygon":
        draw.polygon(points, fill=fill)
    elif part.form == "ellipse":
        draw.ellipse(points, fill=fill)
    else:
        draw.rectangle(points, fill=fill)


def _fabric(colour: str, pattern: str) -> Image.Image:
    """A square of the colour with the pattern over it, coarse enough to be seen on the smallest shapes."""
    cloth = Image.new("RGB", (_CANVAS, _CANVAS), _RGB[colour])
    draw = ImageDraw.Draw(cloth)
    if pattern == "striped":
        for top in range(10, _CANVAS, 28):
            draw.rectangle((0, top, _CANVAS, top + 11), fill=_LIGHT)
    elif pattern == "dotted":
        for row, y in enumerate(range(6, _CANVAS, 22)):
            for x in range(6 + 13 * (row % 2), _CANVAS, 26):
                draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=_LIGHT)
    elif pattern == "checked":
        for row in range(0, _CANVAS, 16):
            for column in range(row % 32, _CANVAS, 32):
                draw.rectangle((column, row, column + 15, row + 15), fill=_INK)
    return cloth


@lru_cache(maxsize=1024)
def _sprite(kind: str, colour: str, pattern: str) -> Image.Image:
    """The shape on a transparent canvas, with a dark outline so that it stands out on every ground."""
    body = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(body)
    for part in SHAPES[kind]:
        if part.role == "body":
            _draw_part(draw, part, 255)
    picture = Image.new("RGB", (_CANVAS, _CANVAS), _INK)
    picture.paste(_fabric(colour, pattern), mask=body)
    alpha = body.filter(ImageFilter.MaxFilter(7))
    for part in SHAPES[kind]:
        if part.role != "body":
            _draw_part(ImageDraw.Draw(picture), part, _LIGHT if part.role == "light" else _INK)
            _draw_part(ImageDraw.Draw(alpha), part, 255)
    picture.putalpha(alpha)
    return picture


def _texture(place: str, noise: np.random.Generator) -> Pixels:
    """The ground before the light falls on it: base colour and the marks of the place."""
    ground = np.broadcast_to(np.asarray(_GROUND[place], dtype=np.float32), (SIDE, SIDE, 3)).copy()
    rows, columns = _ROWS, _COLUMNS
    if place == "grass":
        blades = noise.normal(0, 20, (SIDE // 4, SIDE)).astype(np.float32)
        ground += np.repeat(blades, 4, axis=0)[:, :, None] * np.array([0.8, 1.0, 0.5], np.float32)
    elif place == "sand":
        phase = noise.uniform(0, 6.3)
        ground += (9 * np.sin(rows / 2.2 + phase + np.sin(columns / 9 + phase)))[:, :, None]
    elif place == "snow":
        ground -= (rows / SIDE * 26)[:, :, None] * np.array([1.2, 0.8, 0.2], np.float32)
    elif place == "sky":
        for _ in range(3):
            y, x = noise.uniform(4, 60, 2)
            puff = np.exp(-(((rows - y) / 5) ** 2) - ((columns - x) / 11) ** 2)
            ground += (95 * puff)[:, :, None]
    marks = {"snow": (30, 255.0), "night": (26, 235.0), "sand": (40, 150.0)}.get(place)
    if marks:
        ground[noise.integers(0, SIDE, marks[0]), noise.integers(0, SIDE, marks[0])] = marks[1]
    return ground


def _ground(place: str, rng: random.Random) -> Image.Image:
    """The place with a tint, a slope of light and grain of its own."""
    noise = np.random.default_rng(rng.getrandbits(63))
    ground = _texture(place, noise)
    tint = {"snow": 14, "sky": 16}.get(place, 28)  # strongly tinted, these two would pass for each other
    ground += noise.uniform(-tint, tint, 3).astype(np.float32)
    across, down = np.float32(noise.uniform(-26, 26)), np.float32(noise.uniform(-20, 20))
    ground += (_SLOPE[None, :] * across + _SLOPE[:, None] * down)[:, :, None]
    ground += noise.standard_normal(ground.shape, dtype=np.float32) * 6
    return Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))


def _spots(count: int, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of the shapes, far enough apart that none hides another."""
    if count == 1:
        return [(32 + rng.uniform(-6, 6), 32 + rng.uniform(-6, 6))]
    if count == 2:
        tilt = rng.uniform(-11, 11)
        return [(17 + rng.uniform(-1, 2), 32 + tilt), (47 + rng.uniform(-2, 1), 32 - tilt)]
    flip = rng.choice((-1, 1))
    corners = ((32 + rng.uniform(-9, 9), -15), (17, 14), (47, 14))
    return [(x + rng.uniform(-1, 1), 32 + flip * y + rng.uniform(-1, 1)) for x, y in corners]


_WIDTHS = {1: {"small": 27, "large": 54}, 2: {"small": 21, "large": 34}, 3: {"small": 20, "large": 32}}


def _frame(picture: Image.Image, domain: str) -> None:
    """The look of the domain: a ticker, a passe-partout, a wooden frame or nothing."""
    draw, last = ImageDraw.Draw(picture), SIDE - 1
    if domain == "news":
        draw.rectangle((0, last - 4, last, last), fill=(34, 34, 40))
        draw.rectangle((0, last - 4, 9, last), fill=(214, 30, 40))
        draw.line((13, last - 2, last - 6, last - 2), fill=(226, 226, 226))
    elif domain == "fashion":
        draw.rounded_rectangle((0, 0, last, last), radius=6, outline=(250, 250, 250), width=2)
    elif domain == "wiki":
        draw.rectangle((0, 0, last, last), outline=(104, 76, 44), width=2)
        draw.rectangle((2, 2, last - 2, last - 2), outline=(232, 220, 190))


def draw_look(domain: str, look: Look, rng: random.Random) -> Image.Image:
    """Draw ``look`` in the style of ``domain``; ``rng`` decides the jitter."""
    picture = _ground(look.place, rng)
    for x, y in _spots(look.count, rng):
        width = max(8, math.floor(_WIDTHS[look.count][look.size] * rng.uniform(0.92, 1.08)))
        sprite = _sprite(look.kind, look.colour, look.pattern)
        sprite = sprite.resize((width, width), Image.Resampling.BOX)
        sprite = sprite.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC)
        picture.paste(sprite, (round(x - width / 2), round(y - width / 2)), sprite)
    light = rng.uniform(0.8, 1.12) * np.array([rng.uniform(0.93, 1.07) for _ in range(3)], np.float32)
    picture = Image.fromarray(np.minimum(np.asarray(picture) * light, 255).astype(np.uint8))
    _frame(picture, domain)
    return picture


def encode(picture: Image.Image) -> bytes:
    """The bytes of the picture file; fixed settings, so that equal pictures give equal files."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()
