"""Captions in any script: drawn where a font has their characters, spelled out where none has."""

from __future__ import annotations

import matplotlib
from matplotlib import font_manager

# of Chinese, Japanese and Korean, as systems name them; matplotlib's own font has none of their characters
CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",  # Linux
    "PingFang SC", "PingFang HK", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo",  # macOS
    "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",  # Windows
    "Arial Unicode MS",
)  # fmt: skip


def families() -> list[str]:
    """Font families for a caption: the configured ones, then those of CJK that are installed."""
    installed = set(font_manager.fontManager.get_font_names())
    return [*matplotlib.rcParams["font.family"], *(name for name in CJK if name in installed)]


def legible(text: str) -> str:
    r"""The text as `families` can draw it: a character that none of them has reads as its escape, such as \u65e5."""
    files = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in families()]
    fonts = [font_manager.get_font(file) for file in files]
    return "".join(
        c if c.isspace() or any(font.get_char_index(ord(c)) for font in fonts)
        else c.encode("unicode_escape").decode() for c in text
    )  # fmt: skip
