"""Formulas as MathML while the site is built: browsers draw it, without a script.

pymdownx.arithmatex has found the TeX, between $ and $ or $$ and $$, and escaped it.
"""

import html
import re

from latex2mathml.converter import convert

TEX = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
  """The page with MathML for TeX; called by mkdocs.

  Raises:
    ValueError: a command that is not known.
  """
  return TEX.sub(_mathml, content)


def _mathml(found: re.Match) -> str:
  display, tex = ("inline", "block")[found[1] == "div"], html.unescape(found[2]).strip()
  made = convert(tex, display=display)
  unknown = re.findall(r"\\\w+", made)  # It passes them on as text.
  if unknown:
    raise ValueError(f"{unknown[0]} of {tex!r} is not known: write it in other words")
  return made
