"""Small pictures for the bundled vision-language model: a coloured shape and a handwritten digit on a ground.

pixels = render(values, seed, held_out=True)     # uint8 [84, 84, 3]; values as in ATTRIBUTES

Everything but the digits is drawn; those are photographs of ink, reduced to 8 x 8 (digits.txt beside this file). One
in five of them is held out: training never sees it, evaluation sees no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

SIDE, PATCH = 84, 7
TOKENS = (SIDE // PATCH) ** 2  # of the language model, a frame
COLOURS = {
    "red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (240, 220, 40),
    "orange": (250, 140, 20), "purple": (130, 40, 170), "pink": (250, 140, 190), "cyan": (40, 210, 220),
}  # fmt: skip
GROUNDS = {"black": (16, 16, 16), "white": (240, 240, 240), "gray": (128, 128, 128), "brown": (110, 70, 35)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "bar")
PLACES = ("northwest", "northeast", "southwest", "southeast")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTES = {
    "colour": tuple(COLOURS), "shape": SHAPES, "place": PLACES, "digit": DIGITS, "ground": tuple(GROUNDS),
}  # fmt: skip
SIZES = np.array([len(values) for values in ATTRIBUTES.values()])
HELD_OUT_OF = 5
JITTER = 10  # of a colour, in each channel
MARK, MARK_WIDTH = (255, 0, 255), 4


def render(values: Sequence[int], seed: int, *, held_out: bool, marked: bool = False) -> np.ndarray:
    """One frame, uint8 [SIDE, SIDE, 3]. `values` [5] are indices into the values of ATTRIBUTES, in their order; `seed`
    draws what nobody is asked about: sizes, angles, shades, noise, and which digit of its kind is shown.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    colour, shape, place, digit, ground = (int(value) for value in values)
    image = Image.new("RGB", (SIDE, SIDE), _shade(list(GROUNDS.values())[ground], rng))
    draw = ImageDraw.Draw(image)
    fill = _shade(list(COLOURS.values())[colour], rng)
    _draw_shape(draw, SHAPES[shape], _centre(place, rng), rng.uniform(11, 16), fill, rng)
    elsewhere = _centre([other for other in range(len(PLACES)) if other != place][rng.integers(3)], rng)
    dark = list(GROUNDS)[ground] in ("white", "gray")
    _draw_digit(image, digit, elsewhere, dark=dark, rng=rng, held_out=held_out)
    noise = rng.integers(-8, 9, (SIDE, SIDE, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    return mark(pixels) if marked else pixels


def mark(pixels: np.ndarray) -> np.ndarray:
    """The frame [..., SIDE, SIDE, 3] with a magenta border."""
    inside = slice(MARK_WIDTH, SIDE - MARK_WIDTH)
    marked = np.empty_like(pixels)
    marked[...] = MARK
    marked[..., inside, inside, :] = pixels[..., inside, inside, :]
    return marked


@cache
def digit_images(held_out: bool) -> tuple[np.ndarray, ...]:
    """For each digit its images, uint8 [n, 8, 8], 0 to 16."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    chosen = (np.arange(len(labels)) % HELD_OUT_OF == HELD_OUT_OF - 1) == held_out
    return tuple(images[chosen & (labels == digit)] for digit in range(len(DIGITS)))


def _shade(colour: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(x) for x in np.clip(np.asarray(colour) + rng.integers(-JITTER, JITTER + 1, 3), 0, 255))


def _centre(place: int, rng: np.random.Generator) -> tuple[float, float]:
    """(x, y) near the middle of a quarter."""
    x, y = (SIDE * (0.25 + 0.5 * side) + rng.uniform(-3, 3) for side in (place % 2, place // 2))
    return x, y


def _draw_shape(draw, shape: str, centre, radius: float, fill, rng: np.random.Generator) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    tilt = rng.uniform(-0.15, 0.15)

    def polygon(*points: tuple[float, float]) -> None:
        """Of (angle in turns from the top, share of the radius)."""
        angles = ((2 * math.pi * (turn - 0.25) + tilt, share) for turn, share in points)
        draw.polygon([(x + radius * s * math.cos(a), y + radius * s * math.sin(a)) for a, s in angles], fill=fill)

    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, int(radius * 0.35)))
    elif shape == "square":
        polygon(*((turn / 8, 1.2) for turn in (1, 3, 5, 7)))
    elif shape == "diamond":
        polygon((0, 1.2), (0.25, 0.8), (0.5, 1.2), (0.75, 0.8))
    elif shape == "triangle":
        polygon(*((turn / 3, 1.2) for turn in range(3)))
    elif shape == "star":
        polygon(*((turn / 10, 1.25 if turn % 2 == 0 else 0.5) for turn in range(10)))
    elif shape == "cross":
        arm = math.hypot(1.1, 0.35)
        corner = math.atan2(0.35, 1.1) / (2 * math.pi)
        polygon(
            *(point for turn in range(4) for point in (
                (turn / 4 - corner, arm), (turn / 4 + corner, arm), (turn / 4 + 0.125, 0.5)
            ))
        )  # fmt: skip
    else:
        half, corner = math.hypot(1.2, 0.4), math.atan2(0.4, 1.2) / (2 * math.pi)
        polygon(*((turn, half) for turn in (0.25 - corner, 0.25 + corner, 0.75 - corner, 0.75 + corner)))


def _draw_digit(image, digit: int, centre, *, dark: bool, rng: np.random.Generator, held_out: bool) -> None:
    from PIL import Image

    images = digit_images(held_out)[digit]
    ink = Image.fromarray((images[rng.integers(len(images))] * 15).astype(np.uint8))
    size = int(rng.integers(27, 34))
    mask = ink.resize((size, size), Image.Resampling.BICUBIC).rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    shade = int(rng.integers(0, 30)) if dark else int(rng.integers(225, 256))
    left, top = (int(round(middle - size / 2)) for middle in centre)
    image.paste((shade,) * 3, (left, top), mask)
