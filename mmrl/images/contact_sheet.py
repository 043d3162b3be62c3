"""A contact sheet: a title, and below it pictures, each with two short notes and a caption.

Lengths are pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmrl.errors import InputError
from mmrl.images.decode import decode

_SIDE, _PAD, _GAP, _MARGIN = 160, 12, 14, 24
_CAPTION_LINES, _LINE = 3, 18
_TITLE_SIZE, _NOTE_SIZE, _TEXT_SIZE = 24, 14, 13
_QUERY_SIDE = 72
_LONGEST = 500  # letters of a text that are looked at; no place here has room for more
_PAGE, _CARD, _EDGE, _INK, _FAINT, _ACCENT = "#f4f5f7", "#ffffff", "#dfe2e8", "#1c2330", "#6b7484", "#1b6ca8"
_TILE_WIDTH = _SIDE + 2 * _PAD
_TILE_HEIGHT = _SIDE + 2 * _PAD + 28  # and its caption's lines


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet."""

    picture: bytes
    left: str
    """Below the picture at the left, such as its place or key."""
    right: str
    caption: str


def check(path: Path, option: str = "picture") -> None:
    """Raises InputError unless a sheet can be written to `path`: known before long work is done for it. The message
    names the command's `option`."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{option}: {path} has no ending of a picture; name it FILE.png.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option}: {path} is a folder or lies in one that does not exist; name a file elsewhere.")


def write(
    path: Path, title: str, note: str, tiles: Sequence[Tile], query: Path | None = None, columns: int = 5
) -> None:
    """Draws the sheet, so many tiles a row; with a `query` picture that one stands beside the title.

    Raises:
        InputError: the file cannot be written.
    """
    image = draw(title, note, tiles, query, columns)
    try:
        image.save(path)
    except OSError as error:
        raise InputError(f"the sheet {path} cannot be written ({error}).") from None


def draw(title: str, note: str, tiles: Sequence[Tile], query: Path | None = None, columns: int = 5) -> Image.Image:
    """The sheet as an RGB picture."""
    columns = min(columns, max(3, len(tiles)))  # three at least, so that the title has room
    rows = -(-len(tiles) // columns)
    width = 2 * _MARGIN + columns * _TILE_WIDTH + (columns - 1) * _GAP
    indent = 0 if query is None else _QUERY_SIDE + _GAP
    title_lines = _wrapped(title, _font(_TITLE_SIZE, bold=True), width - 2 * _MARGIN - indent, most=2)
    head = max(len(title_lines) * (_TITLE_SIZE + 8) + _NOTE_SIZE + 6, 0 if query is None else _QUERY_SIDE)
    captions = [_wrapped(tile.caption, _font(_TEXT_SIZE), _SIDE, _CAPTION_LINES) for tile in tiles]
    tile_height = _TILE_HEIGHT + max(len(lines) for lines in captions) * _LINE
    sheet = Image.new("RGB", (width, 2 * _MARGIN + head + rows * (tile_height + _GAP)), _PAGE)
    pen = ImageDraw.Draw(sheet)
    if query is not None:
        _paste(sheet, decode(query.read_bytes()), _MARGIN, _MARGIN, _QUERY_SIDE)
    for number, line in enumerate(title_lines):
        place = (_MARGIN + indent, _MARGIN + number * (_TITLE_SIZE + 8))
        pen.text(place, line, _INK, _font(_TITLE_SIZE, bold=True))
    note_top = _MARGIN + len(title_lines) * (_TITLE_SIZE + 8)
    pen.text((_MARGIN + indent, note_top), note, _FAINT, _font(_NOTE_SIZE))
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (_TILE_WIDTH + _GAP)
        top = _MARGIN + head + _GAP + row * (tile_height + _GAP)
        pen.rounded_rectangle((left, top, left + _TILE_WIDTH - 1, top + tile_height - 1), 8, _CARD, _EDGE)
        _fill_tile(sheet, pen, tile, caption, left, top)
    return sheet


def _fill_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, caption: list[str], left: int, top: int
) -> None:
    right = left + _TILE_WIDTH
    _paste(sheet, decode(tile.picture), left + _PAD, top + _PAD, _SIDE)
    below = top + _PAD + _SIDE + 10
    bold, plain = _font(_TEXT_SIZE, bold=True), _font(_TEXT_SIZE)
    room = _SIDE - round(plain.getlength(tile.right)) - _GAP
    pen.text((left + _PAD, below), _wrapped(tile.left, bold, room, most=1)[0], _ACCENT, bold)
    pen.text((right - _PAD, below), tile.right, _FAINT, plain, anchor="ra")
    for number, line in enumerate(caption):
        pen.text((left + _PAD, below + 22 + number * _LINE), line, _INK, _font(_TEXT_SIZE))


def _paste(sheet: Image.Image, picture: Image.Image, left: int, top: int, side: int) -> None:
    """The whole picture, made to fit a square and put in its middle."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(fitted, (left + (side - width) // 2, top + (side - height) // 2))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of this width, with … where it had to be cut."""
    lines, line = [], ""
    for word in text[:_LONGEST].split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        # A word without room is cut at letters, as those of languages without spaces are.
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + "…"]


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: it has far more letters than Pillow's own font."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", name), size)
