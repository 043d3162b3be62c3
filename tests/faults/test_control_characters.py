"""Names and captions of the data reach neither a terminal nor a page as control characters."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mmrl import cli
from mmrl.data.check.report import print_lines
from mmrl.output.console import print_line, visible, without_secrets
from mmrl.search.items import Item
from mmrl.search.query import Hit, _table

HOSTILE = "a\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egpj.exe\x00é 👩‍💻 靴"
ESCAPED = "a\\x1b]0;title\\x07\\x1b[2J\\r\\x9b31m\\u202egpj.exe\\x00é 👩‍💻 靴"


def test_control_characters_are_escaped_and_text_is_not() -> None:
    assert visible(HOSTILE) == ESCAPED
    assert visible("two\nlines\tand \udc80") == "two\nlines\tand \\udc80"


def test_a_published_spec_has_no_secrets() -> None:
    for spec, public in (
        ("https://me:a@b@host:80/x/{0..3}.tar?sig=1/2&x#f", "https://host:80/x/{0..3}.tar"),
        ("s3://bucket/x.tar", "s3://bucket/x.tar"),
        ("pipe:aws s3 cp --token x y -", "pipe:…"),
        ("shards/a?@b.tar", "shards/a?@b.tar"),
    ):
        assert without_secrets(spec) == public


def test_lines_tables_and_errors_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=300, force_terminal=True, color_system=None)
    print_line(console, HOSTILE)
    print_lines(console, f"{HOSTILE}\nb")
    item = Item(HOSTILE, [HOSTILE], -1, None, b"")
    console.print(_table(HOSTILE, [0], 8, [Hit(1, 0, 0.5, item)]))  # pyright: ignore[reportArgumentType]
    assert shown.getvalue().count(ESCAPED) == 5
    monkeypatch.setattr(sys, "argv", ["mmrl", "check", str(tmp_path / "\x1b[31mnone")])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "\\x1b[31mnone" in error
    for text in (shown.getvalue(), error):
        assert not {"\x1b", "\x07", "\r", "\x9b", "\x00", "\u202e"} & set(text)
