"""Fonts for captions in any script: characters that no installed font has are shown as escapes."""

from __future__ import annotations

import matplotlib
from matplotlib import font_manager

# common fonts with Chinese, Japanese and Korean characters, which matplotlib's default font lacks
CJK = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",  # Linux
    "PingFang SC", "PingFang HK", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo",  # macOS
    "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic",  # Windows
    "Arial Unicode MS",
)  # fmt: skip


def families() -> list[str]:
    """Font families for a caption: the configured ones, then the installed CJK fonts."""
    installed = set(font_manager.fontManager.get_font_names())
    return [*matplotlib.rcParams["font.family"], *(name for name in CJK if name in installed)]


def legible(text: str) -> str:
    r"""The text with every character that no font in `families` has replaced by its escape, such as \u65e5."""
    files = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in families()]
    fonts = [font_manager.get_font(file) for file in files]
    return "".join(
        c if c.isspace() or any(font.get_char_index(ord(c)) for font in fonts)
        else c.encode("unicode_escape").decode() for c in text
    )  # fmt: skip
