"""Seeded picture stories for when no images are at hand: `--data builtin:shapes`. Synthetic, and labelled so.

A story is a sequence of frames in which coloured shapes move, with a line of text beside every frame and now and then a
paragraph that tells the last ones again and a question about an earlier one with its answer: text that refers to
images, and images that resemble their neighbours, as in video. It exercises a vision-language model's attention; it is
no substitute for what the model will be shown.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from . import samples

KIND = "shapes"
SIDE = 336  # pixels; what processors make of it differs
COLOURS = {
    "red": (205, 45, 45), "green": (45, 150, 70), "blue": (50, 80, 200), "yellow": (235, 205, 60),
    "purple": (130, 60, 160), "white": (245, 245, 245),
}  # fmt: skip
FORMS = ("circle", "square", "triangle")
ROOMS = {"grey": (110, 110, 115), "brown": (95, 70, 50), "black": (15, 15, 20)}
TOLD_EVERY, TOLD_AGAIN = 6, 12  # frames


@dataclass
class _Mover:
    form: str
    colour: str
    size: float
    at: list[float]
    speed: list[float]

    def move(self) -> None:
        for axis in range(2):
            self.at[axis] += self.speed[axis]
            if not self.size <= self.at[axis] <= SIDE - self.size:
                self.speed[axis] *= -1
                self.at[axis] = min(max(self.at[axis], self.size), SIDE - self.size)

    @property
    def place(self) -> str:
        x, y = (("left", "middle", "right"), ("top", "centre", "bottom"))
        return f"{y[min(2, int(3 * self.at[1] / SIDE))]} {x[min(2, int(3 * self.at[0] / SIDE))]}"


def story(seed: int) -> Iterator[samples.MultimodalSample]:
    """The endless story of `seed`, one frame and its text a sample."""
    rng = random.Random(f"bsfa {KIND} {seed}")
    room, movers, told = "", [], []
    for number in range(1, 1 << 31):
        if not movers or rng.random() < 0.03:  # another scene
            room, movers = rng.choice(list(ROOMS)), [_mover(rng) for _ in range(rng.randint(1, 4))]
        for mover in movers:
            mover.move()
        shown = rng.choice(movers)
        said = f"the {shown.colour} {shown.form} is at the {shown.place}"
        told.append((number, said))
        lines = f"Frame {number}: {said}."
        if number % TOLD_EVERY == TOLD_EVERY // 2:
            again = "; ".join(f"in frame {earlier} {words}" for earlier, words in told[-TOLD_AGAIN:])
            asked, answer = rng.choice(told)
            lines += f" To tell it again: {again}. What was said of frame {asked}? In frame {asked} {answer}.\n"
        content = (samples.image(_draw(room, movers)), samples.text(lines))
        about = {"task": KIND, "source": f"builtin:{KIND}, story {seed}, frame {number}"}
        yield samples.MultimodalSample([samples.turn("user", *content)], f"frame-{number}", metadata=about)


def _mover(rng: random.Random) -> _Mover:
    size = rng.uniform(0.06, 0.16) * SIDE
    return _Mover(
        rng.choice(FORMS), rng.choice(list(COLOURS)), size, [rng.uniform(size, SIDE - size) for _ in range(2)],
        [rng.uniform(-0.05, 0.05) * SIDE for _ in range(2)],
    )  # fmt: skip


def _draw(room: str, movers: list[_Mover]):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), ROOMS[room])
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, SIDE * 3 // 4, SIDE, SIDE), fill=tuple(value * 2 // 3 for value in ROOMS[room]))
    for mover in movers:
        (x, y), size, colour = mover.at, mover.size, COLOURS[mover.colour]
        box = (x - size, y - size, x + size, y + size)
        if mover.form == "circle":
            canvas.ellipse(box, fill=colour)
        elif mover.form == "square":
            canvas.rectangle(box, fill=colour)
        else:
            canvas.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=colour)
    return image
