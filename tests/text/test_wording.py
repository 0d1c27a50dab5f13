"""Bytes, times and lists as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcompile.wording import WIDTH, bands, count, fit, fit_list, format_bytes, format_us, wrap


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1024**2 - 1, "1.00 MiB"),  # never "1024.00 KiB"
        (1024**3 * 123 // 100, "1.23 GiB"),
        (1024**4, "1.00 TiB"),
        (5000 * 1024**4, "5000.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.0, "0 us"),
        (0.5, "0.50 us"),
        (12.34, "12.3 us"),
        (999.4, "999 us"),
        (999.6, "1.00 ms"),  # never "1000 us"
        (1500.0, "1.50 ms"),
        (999_400.0, "999 ms"),
        (999_600.0, "1.00 s"),
        (12_345_678.0, "12.3 s"),
        (1_234_567_890.0, "1,235 s"),
        (-1500.0, "-1.50 ms"),
    ],
)
def test_format_us(us: float, text: str) -> None:
    assert format_us(us) == text


def test_count() -> None:
    assert [count(number, "copy", "copies") for number in (0, 1, 2)] == ["0 copies", "1 copy", "2 copies"]
    assert count(3, "step") == "3 steps"


@given(st.text(max_size=60), st.integers(4, 40))
def test_fit(name: str, columns: int) -> None:
    text = fit(name, columns)
    assert len(text) <= columns
    assert text.isascii()
    assert text.isprintable()


def test_fit_shows_both_ends() -> None:
    assert fit("model.decoder.blocks.17.mlp", 14) == "mode..s.17.mlp"
    assert fit("mlp", 14) == "mlp"


def test_fit_list_says_how_many_more() -> None:
    words = [f"#{number}" for number in range(10)]
    assert fit_list(words, 40) == "#0, #1, #2, #3, #4, #5, #6, #7, #8, #9"
    assert fit_list(words, 20) == "#0, #1, #2, +7 more"
    assert fit_list(words, 0, start="reads ") == "reads +10 more"
    assert fit_list([], 0) == ""


def test_wrap() -> None:
    lines = wrap("word " * 40, "    ")
    assert [len(line) <= WIDTH for line in lines] == [True] * 3
    assert " ".join(lines).split() == ["word"] * 40
    assert all(line.startswith("    word") for line in lines)


def test_bands() -> None:
    assert list(bands(3, 10, 3)) == [range(3, 6), range(6, 9), range(9, 10)]
    assert list(bands(0, 2, 0)) == [range(0, 1), range(1, 2)]
    assert list(bands(2, 2, 5)) == []
