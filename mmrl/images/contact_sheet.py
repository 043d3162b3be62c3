"""Draw a contact sheet: a title and a grid of images, each with two short labels and a caption. Lengths are pixels."""

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
_MAX_LETTERS = 500  # of a text; nothing on the sheet has room for more
_PAGE, _CARD, _EDGE, _INK, _FAINT, _ACCENT = "#f4f5f7", "#ffffff", "#dfe2e8", "#1c2330", "#6b7484", "#1b6ca8"
_TILE_WIDTH = _SIDE + 2 * _PAD
_TILE_HEIGHT = _SIDE + 2 * _PAD + 28  # without its caption's lines


@dataclass(frozen=True)
class Tile:
    """One image of the sheet."""

    image: bytes
    """The image file's contents."""
    left: str
    """Label below the image, left-aligned, e.g. a rank or a key."""
    right: str
    """Label below the image, right-aligned."""
    caption: str


def check_path(path: Path, option: str = "picture") -> None:
    """Raises InputError, naming the CLI option, unless a sheet can be written to `path`. Call it before long work."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{option}: {path} has no extension of an image format; name it FILE.png.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option}: {path} is a folder, or its folder does not exist; name another file.")


def write(
    path: Path, title: str, note: str, tiles: Sequence[Tile], query: Path | None = None, columns: int = 5
) -> None:
    """Writes a sheet with `columns` tiles per row and, if given, the `query` image next to the title. Raises
    InputError: the file cannot be written."""
    sheet = draw(title, note, tiles, query, columns)
    try:
        sheet.save(path)
    except OSError as error:
        raise InputError(f"the contact sheet {path} cannot be written ({error}).") from None


def draw(title: str, note: str, tiles: Sequence[Tile], query: Path | None = None, columns: int = 5) -> Image.Image:
    """The sheet as an RGB image."""
    columns = min(columns, max(3, len(tiles)))  # at least three, so that the title has room
    rows = -(-len(tiles) // columns)
    width = 2 * _MARGIN + columns * _TILE_WIDTH + (columns - 1) * _GAP
    indent = 0 if query is None else _QUERY_SIDE + _GAP
    title_lines = _wrapped(title, _font(_TITLE_SIZE, bold=True), width - 2 * _MARGIN - indent, max_lines=2)
    head = max(len(title_lines) * (_TITLE_SIZE + 8) + _NOTE_SIZE + 6, 0 if query is None else _QUERY_SIDE)
    captions = [_wrapped(tile.caption, _font(_TEXT_SIZE), _SIDE, _CAPTION_LINES) for tile in tiles]
    tile_height = _TILE_HEIGHT + max(map(len, captions), default=0) * _LINE
    sheet = Image.new("RGB", (width, 2 * _MARGIN + head + rows * (tile_height + _GAP)), _PAGE)
    pen = ImageDraw.Draw(sheet)
    if query is not None:
        _paste(sheet, decode(query.read_bytes()), _MARGIN, _MARGIN, _QUERY_SIDE)
    for i, line in enumerate(title_lines):
        xy = (_MARGIN + indent, _MARGIN + i * (_TITLE_SIZE + 8))
        pen.text(xy, line, _INK, _font(_TITLE_SIZE, bold=True))
    note_top = _MARGIN + len(title_lines) * (_TITLE_SIZE + 8)
    pen.text((_MARGIN + indent, note_top), note, _FAINT, _font(_NOTE_SIZE))
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(i, columns)
        left = _MARGIN + column * (_TILE_WIDTH + _GAP)
        top = _MARGIN + head + _GAP + row * (tile_height + _GAP)
        pen.rounded_rectangle((left, top, left + _TILE_WIDTH - 1, top + tile_height - 1), 8, _CARD, _EDGE)
        _fill_tile(sheet, pen, tile, caption, left, top)
    return sheet


def _fill_tile(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, caption: list[str], left: int, top: int
) -> None:
    right = left + _TILE_WIDTH
    _paste(sheet, decode(tile.image), left + _PAD, top + _PAD, _SIDE)
    below = top + _PAD + _SIDE + 10
    bold, plain = _font(_TEXT_SIZE, bold=True), _font(_TEXT_SIZE)
    room = _SIDE - round(plain.getlength(tile.right)) - _GAP
    pen.text((left + _PAD, below), _wrapped(tile.left, bold, room, max_lines=1)[0], _ACCENT, bold)
    pen.text((right - _PAD, below), tile.right, _FAINT, plain, anchor="ra")
    for i, line in enumerate(caption):
        pen.text((left + _PAD, below + 22 + i * _LINE), line, _INK, _font(_TEXT_SIZE))


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, side: int) -> None:
    """Pastes the image, scaled to fit a square and centred in it."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(scaled, (left + (side - width) // 2, top + (side - height) // 2))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Wraps the text to at most `max_lines` lines of this width; … marks where it was cut."""
    lines, line = [], ""
    for word in text[:_MAX_LETTERS].split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        # A word that is too long, or a text in a language without spaces, is broken between letters.
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "…"]


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib, which covers far more letters than Pillow's default font."""
    import matplotlib as mpl

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", name), size)
