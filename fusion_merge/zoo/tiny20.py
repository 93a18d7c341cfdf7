"""The embedded tasks of `tiny20`: the eight of `tiny8`, six more scripts and six more kinds of drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion_merge.zoo import tiny8
from fusion_merge.zoo.tasks import SIZE, SPLITS, Drawn, EmbeddedTask, EmbeddedTasks, Script, named

if TYPE_CHECKING:
    from fusion_merge.zoo.tasks import Style

__all__ = ["SIZE", "SPLITS", "TABLE", "TASKS", "UNSEEN_TASKS", "classnames", "load_task", "templates"]

_COLOURS: dict[str, Style] = {
    "armenian": (((90, 40, 0), (130, 70, 30)), ((235, 235, 235), (255, 255, 255))),
    "georgian": (((255, 225, 60), (255, 255, 140)), ((70, 0, 90), (110, 40, 130))),
    "hebrew": (((0, 40, 130), (50, 90, 190)), ((205, 215, 190), (230, 240, 215))),
    "mathematics": (((230, 240, 230), (255, 255, 255)), ((20, 50, 45), (50, 85, 75))),
    "currencies": (((10, 70, 10), (50, 110, 50)), ((185, 220, 150), (215, 245, 180))),
    "zodiac": (((200, 210, 255), (235, 240, 255)), ((5, 0, 40), (30, 20, 70))),
    "polygons": (((150, 0, 0), (220, 40, 30)), ((225, 225, 245), (255, 255, 255))),
    "shades": (((230, 170, 120), (255, 210, 170)), ((30, 70, 90), (70, 110, 130))),
    "textures": (((110, 80, 50), (150, 115, 80)), ((190, 170, 130), (225, 205, 170))),
    "colours": (((0, 0, 0), (0, 0, 0)), ((120, 120, 120), (165, 165, 165))),
    "clocks": (((0, 0, 0), (50, 50, 50)), ((250, 200, 60), (255, 230, 110))),
    "places": (((0, 190, 200), (90, 255, 255)), ((50, 20, 20), (90, 50, 50))),
}
_ARMENIAN = named("ayb ben gim da ech za eh et to zhe ini lyun khe tsa ken ho", "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀ")
_GEORGIAN = named("an ban gan don en vin zen tan in kan las man nar on par zhar", "აბგდევზთიკლმნოპჟ")
_HEBREW = named(
    "alef bet gimel dalet he vav zayin het tet yod kaf lamed mem nun samekh ayin pe tsadi qof resh shin tav",
    "אבגדהוזחטיכלמנסעפצקרשת",
)
_MATHEMATICS = named(
    "for_all there_is nothing gradient member product sum root infinity intersection integral about unequal "
    "at_most and or",
    "∀∃∅∇∈∏∑√∞∩∫≈≠≤∧∨",
)
_CURRENCIES = named("cent dollar pound yen euro won shekel dong peso rouble rupee lira", "¢$£¥€₩₪₫₱₽₹₺")
_ZODIAC = named(
    "ram bull twins crab lion maiden scales scorpion archer goat water_bearer fish",
    "♈♉♊♋♌♍♎♏♐♑♒♓",
)
_POLYGONS = {"three": 3, "four": 4, "five": 5, "six": 6, "eight": 8}
_SHADES = ("across", "down", "slanting down", "slanting up", "round", "saddle", "band", "column")
_TEXTURES = ("checks", "bricks", "net", "waves", "zigzags", "lozenges", "rings", "plusses")
_HUES = {
    "red": ((190, 0, 0), (255, 50, 50)),
    "orange": ((225, 110, 0), (255, 150, 40)),
    "yellow": ((220, 210, 0), (255, 255, 70)),
    "green": ((0, 130, 0), (60, 200, 60)),
    "turquoise": ((0, 180, 170), (80, 240, 230)),
    "blue": ((0, 0, 180), (60, 60, 255)),
    "violet": ((110, 0, 160), (160, 50, 220)),
    "pink": ((235, 120, 170), (255, 175, 215)),
}
_HOURS = {
    name: hour
    for hour, name in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), start=1
    )
}
_PLACES = {
    f"{row} {column}": (x, y)
    for y, row in enumerate(("top", "middle", "bottom"))
    for x, column in enumerate(("left", "centre", "right"))
}
_TRAIN_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif-Bold")
_TEST_FONTS = ("DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSans-Oblique", "DejaVuSansMono-BoldOblique")
# for training and for test; not every font has every character
_FONTS = (_TRAIN_FONTS, _TEST_FONTS)
_SANS = (("DejaVuSans", "DejaVuSans-BoldOblique"), ("DejaVuSans-Bold", "DejaVuSans-Oblique"))
_SIGNS = (("DejaVuSans", "STIXGeneral", "DejaVuSansMono-Bold", "DejaVuSans-BoldOblique"), _TEST_FONTS)


def _written(
    task: str, characters: dict[str, str], template: str, fonts: tuple[tuple[str, ...], tuple[str, ...]] = _FONTS
) -> EmbeddedTask:
    make = Script(list(characters.values()), _COLOURS[task], (100, 12), *fonts)
    return EmbeddedTask("tiny20", tuple(characters), (template,), make)


def _drawn(
    task: str, function: str, values: Mapping[str, Any] | Sequence[str], template: str, *, by_colour: bool = False
) -> EmbeddedTask:
    drawings = list(values.values()) if isinstance(values, Mapping) else values
    make = Drawn("patterns", function, drawings, _COLOURS[task], (200, 24))
    return EmbeddedTask("tiny20", tuple(values), (template,), make, by_colour=by_colour)


TABLE: dict[str, EmbeddedTask] = {
    **{task: tiny8.TABLE[task] for task in tiny8.TASKS},
    "armenian": _written("armenian", _ARMENIAN, "the Armenian letter {}."),
    "georgian": _written("georgian", _GEORGIAN, "the Georgian letter {}."),
    "hebrew": _written("hebrew", _HEBREW, "the Hebrew letter {}.", _SANS),
    "mathematics": _written("mathematics", _MATHEMATICS, "the mathematical sign of {}.", _SIGNS),
    "currencies": _written("currencies", _CURRENCIES, "the sign of the currency {}.", _SANS),
    "zodiac": _written("zodiac", _ZODIAC, "the zodiac sign of the {}.", _SANS),
    "polygons": _drawn("polygons", "polygon", _POLYGONS, "an outline with {} corners."),
    "shades": _drawn("shades", "shade", _SHADES, "a shade of the kind {}."),
    "textures": _drawn("textures", "texture", _TEXTURES, "a texture of {}."),
    "colours": _drawn("colours", "blot", _HUES, "a {} blot.", by_colour=True),
    "clocks": _drawn("clocks", "clock", _HOURS, "a clock that shows {}."),
    "places": _drawn("places", "place", _PLACES, "a square at the {}."),
}
TASKS: tuple[str, ...] = tuple(TABLE)
UNSEEN_TASKS: tuple[str, ...] = ()

_POOL = EmbeddedTasks("tiny20", TABLE)
classnames, templates, load_task = _POOL.classnames, _POOL.templates, _POOL.load_task
