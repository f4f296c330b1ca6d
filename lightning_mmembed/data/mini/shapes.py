"""The 24 kinds as simple shapes on a 100 x 100 canvas: data for ``draw.py``."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Part(NamedTuple):
    """One primitive of a shape.

    Args:
        form: The primitive.
        role: ``body`` takes the colour and the pattern; ``dark`` and ``light`` are drawn on top of it.
        points: Flat coordinates: corners of a polygon, or left, top, right and bottom of a box.
    """

    form: Literal["polygon", "ellipse", "box"]
    role: Literal["body", "dark", "light"]
    points: tuple[int, ...]


def _poly(*points: int) -> Part:
    return Part("polygon", "body", points)


def _disc(*points: int) -> Part:
    return Part("ellipse", "body", points)


def _box(*points: int) -> Part:
    return Part("box", "body", points)


def _dark(form: Literal["polygon", "ellipse", "box"], *points: int) -> Part:
    return Part(form, "dark", points)


def _light(form: Literal["polygon", "ellipse", "box"], *points: int) -> Part:
    return Part(form, "light", points)


_PETALS = tuple(_disc(x - 17, y - 17, x + 17, y + 17) for x, y in ((50, 22), (77, 41), (67, 73), (33, 73), (23, 41)))

SHAPES: dict[str, tuple[Part, ...]] = {
    "bus": (
        _box(6, 24, 94, 74),
        *(_light("box", x, 31, x + 14, 45) for x in (12, 32, 52, 72)),
        *(_dark("ellipse", x, 64, x + 22, 86) for x in (14, 64)),
    ),
    "ship": (
        _poly(4, 62, 96, 62, 80, 90, 20, 90),
        _poly(46, 8, 46, 58, 12, 58),
        _poly(54, 16, 54, 58, 84, 58),
        _dark("box", 48, 6, 52, 62),
    ),
    "rocket": (
        _poly(50, 4, 66, 30, 66, 80, 34, 80, 34, 30),
        _poly(34, 56, 14, 88, 34, 80),
        _poly(66, 56, 86, 88, 66, 80),
        _light("ellipse", 42, 28, 58, 44),
        _dark("polygon", 42, 82, 58, 82, 50, 97),
    ),
    "bridge": (
        _box(3, 48, 97, 62),
        _box(18, 14, 30, 90),
        _box(70, 14, 82, 90),
        _dark("polygon", 24, 16, 50, 46, 76, 16, 76, 20, 50, 51, 24, 20),
    ),
    "plane": (
        _disc(38, 4, 62, 96),
        _poly(42, 34, 2, 62, 2, 72, 50, 58, 98, 72, 98, 62, 58, 34),
        _poly(46, 78, 26, 92, 26, 97, 50, 92, 74, 97, 74, 92, 54, 78),
        _dark("ellipse", 44, 8, 56, 22),
    ),
    "balloon": (
        _disc(14, 3, 86, 70),
        _poly(22, 52, 78, 52, 60, 78, 40, 78),
        _dark("box", 40, 82, 60, 97),
    ),
    "dress": (
        _poly(34, 6, 42, 14, 58, 14, 66, 6, 70, 30, 62, 44, 90, 94, 10, 94, 38, 44, 30, 30),
        _dark("box", 37, 42, 63, 48),
    ),
    "shirt": (
        _poly(30, 12, 40, 18, 60, 18, 70, 12, 97, 34, 84, 52, 74, 44, 74, 90, 26, 90, 26, 44, 16, 52, 3, 34),
        _light("polygon", 40, 17, 60, 17, 50, 32),
    ),
    "hat": (
        _disc(3, 62, 97, 86),
        _poly(26, 70, 30, 20, 70, 20, 74, 70),
        _dark("polygon", 26, 66, 27, 55, 73, 55, 74, 66),
    ),
    "boot": (
        _poly(28, 6, 62, 6, 62, 52, 92, 66, 94, 84, 28, 84),
        _dark("box", 26, 84, 95, 94),
        _dark("box", 26, 6, 64, 14),
    ),
    "bag": (
        _poly(14, 40, 86, 40, 94, 92, 6, 92),
        _dark("polygon", 30, 40, 30, 12, 70, 12, 70, 40, 62, 40, 62, 20, 38, 20, 38, 40),
        _light("box", 44, 44, 56, 54),
    ),
    "tie": (
        _poly(38, 4, 62, 4, 58, 22, 72, 74, 50, 97, 28, 74, 42, 22),
        _dark("polygon", 40, 20, 60, 20, 62, 26, 38, 26),
    ),
    "tower": (
        _box(34, 30, 66, 94),
        _poly(26, 34, 50, 3, 74, 34),
        _light("box", 45, 42, 55, 54),
        _dark("box", 43, 76, 57, 94),
    ),
    "castle": (
        _box(4, 44, 96, 94),
        *(_box(x, 20, x + 10, 50) for x in (4, 20, 70, 86)),
        _box(4, 30, 30, 50),
        _box(70, 30, 96, 50),
        _box(44, 34, 56, 50),
        _dark("polygon", 40, 94, 40, 72, 50, 62, 60, 72, 60, 94),
    ),
    "mill": (
        _poly(38, 36, 62, 36, 74, 96, 26, 96),
        _poly(50, 36, 6, 8, 16, 0),
        _poly(50, 36, 94, 8, 84, 0),
        _poly(50, 36, 4, 62, 14, 72),
        _poly(50, 36, 96, 62, 86, 72),
        _dark("ellipse", 43, 29, 57, 43),
    ),
    "fish": (
        _disc(4, 24, 76, 78),
        _poly(66, 50, 97, 22, 97, 80),
        _light("ellipse", 14, 38, 28, 52),
        _dark("ellipse", 18, 42, 25, 49),
    ),
    "bird": (
        _disc(22, 36, 80, 84),
        _disc(12, 14, 48, 50),
        _poly(66, 52, 98, 30, 94, 66),
        _dark("polygon", 14, 26, 14, 38, 0, 34),
        _dark("ellipse", 23, 24, 31, 32),
        _dark("box", 42, 82, 46, 97),
        _dark("box", 56, 82, 60, 97),
    ),
    "tree": (
        _poly(50, 2, 76, 34, 24, 34),
        _poly(50, 20, 86, 58, 14, 58),
        _poly(50, 42, 96, 82, 4, 82),
        _dark("box", 43, 82, 57, 98),
    ),
    "star": (_poly(50, 2, 62, 36, 98, 37, 69, 59, 80, 95, 50, 74, 20, 95, 31, 59, 2, 37, 38, 36),),
    "heart": (_disc(4, 10, 54, 60), _disc(46, 10, 96, 60), _poly(8, 46, 92, 46, 50, 95)),
    "cup": (
        _box(12, 22, 68, 88),
        _dark("polygon", 68, 32, 94, 32, 94, 74, 68, 74, 68, 66, 85, 66, 85, 41, 68, 41),
        _light("ellipse", 12, 14, 68, 30),
    ),
    "ball": (_disc(5, 5, 95, 95), _light("ellipse", 24, 18, 40, 32)),
    "house": (
        _box(16, 46, 84, 94),
        _poly(4, 48, 50, 6, 96, 48),
        _dark("box", 42, 66, 58, 94),
        _light("box", 22, 56, 36, 70),
        _light("box", 64, 56, 78, 70),
    ),
    "flower": (*_PETALS, _dark("ellipse", 37, 38, 63, 64)),
}
