"""Converts formulas to MathML while the site is built, so pages need no script.

pymdownx.arithmatex finds the TeX between $ and $ or $$ and $$, and escapes it.
"""

import html
import re

from latex2mathml.converter import convert

TEX = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
  """Replaces TeX in a page with MathML; mkdocs calls it.

  Raises:
    ValueError: The converter does not support a command.
  """
  return TEX.sub(_to_mathml, content)


def _to_mathml(match: re.Match) -> str:
  display, tex = ("inline", "block")[match[1] == "div"], html.unescape(match[2]).strip()
  mathml = convert(tex, display=display)
  # The converter copies unsupported commands to the text.
  unsupported = re.findall(r"\\\w+", mathml)
  if unsupported:
    raise ValueError(f"{unsupported[0]} in {tex!r} is not supported: write it without")
  return mathml
