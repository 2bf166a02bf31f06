"""Parses the verdict of a judge on two answers.

The prompts of `data/prompts.py` request "Output A is better because ..." (VLM-RLAIF,
2402.03746, does not publish its rule). Other judges concede before they decide, label
the verdict, or write only a letter. A verdict is what the whole reply decides.
"""

import re
from typing import Literal, NamedTuple, TypeAlias

from vlmrlaif_jax.feedback.replies.cleaning import clean_reply

# A is the first answer in the prompt.
JudgeChoice: TypeAlias = Literal["A", "B", "tie"]
_CHOICES: dict[str, JudgeChoice] = {"@a": "A", "@b": "B"}
MAX_CHARS = 100_000  # A longer reply decides nothing; a judge writes a few hundred.


class Decision(NamedTuple):
  """A side that a clause prefers."""

  choice: JudgeChoice
  rank: float  # 2: better as a whole; 1: better in one respect; 0: within a reason.
  final: bool = False  # After "so", "overall" and the like.


# Sides. Each mention of an answer becomes "@a" or "@b".

_NOUN = (
  "(?:output|answer|response|assistant|option|model|candidate|reply|description|"
  "caption|text|version|solution|completion)s?"
)
_VALUES = {"1": "@a", "a": "@a", "one": "@a", "first": "@a", "former": "@a"} | {
  **dict.fromkeys(("2", "b", "two", "second", "latter"), "@b"),
  **{"一": "@a", "二": "@b", "前": "@a", "后": "@b"},
}
_NAMED = re.compile(
  rf"(?:\b(?:the )?{_NOUN} ?[-_#]? ?(?:no\. ?|number )?|"
  r"(?:回答|答案|输出|选项|回复|响应|模型|助手|描述) ?)"
  r"""["'(\[]{0,2}(a|b|1|2|one|two|一(?![样致般])|二)["')\]]{0,2}(?![\w-])(?! [\d(])"""
  r"|第(一|二|1|2)个?(?:回答|答案|输出|选项|回复|描述)?|(前|后)者"
  rf"|\b(?:the )?(first|second) (?:one\b|{_NOUN}\b)|\bthe (former|latter)\b"
  r"|\bthe (first|second)(?= (?:is|was|wins|has|over)\b|[.,;]|$)",
  re.IGNORECASE | re.ASCII,
)
_LETTER = re.compile(
  r"""["'(\[]([AB])["')\]]|(?<![\w'./&+-])([AB])(?![\w&/+]|[-'.]\w)""", re.ASCII
)
# Words that follow a letter, but not the article "A" at the start of a sentence.
_FOLLOWS_SIDE = re.compile(
  r" (?:is|was|has|and|or|but|over|wins?|won|does|did|beats|outperforms|gives|provides|"
  r"seems|looks|appears|because|since|as|than|for|in|by|on|due|while|though|although|"
  r"would|should|could|might|may|can|will|describes|mentions|states|says|correctly|also|"
  r"captures|identifies|contains|makes|offers|answers|fails|lacks|misses|invents|edges|"
  r"hallucinates|takes|gets|nor|then|deserves|comes|reads|matches|that|which|isn't|"
  r"wasn't|doesn't)\b|(?! [a-z])"
)


def _mark_sides(text: str) -> str:
  """Replaces each mention of an answer by "@a" or "@b"; lowers the case."""

  def mark_named(match):
    value = next(filter(None, match.groups())).lower()
    is_lower = value == "a" and match[0].endswith("a")
    if is_lower and not _FOLLOWS_SIDE.match(text, match.end()):
      return match[0]
    return f" {_VALUES[value]} "

  text = _NAMED.sub(mark_named, text.replace("@", " "))

  def mark_letter(match):
    before = text[max(match.start() - 3, 0) : match.start()].rstrip()
    begins = not before or before[-1] in ".!?\n:"
    if match[2] == "A" and begins and not _FOLLOWS_SIDE.match(text, match.end()):
      return match[0]
    return f" @{(match[1] or match[2]).lower()} "

  return re.sub(" +", " ", _LETTER.sub(mark_letter, text)).lower()


# Verdicts in a fixed place: "[[A]]", "[[A>>B]]", "Verdict: A", a line that is "A".

_COMPARED = re.compile(r"\[\[ ?([AB]) ?(>{1,2}|<{1,2}|=) ?([AB]) ?\]\]", re.IGNORECASE)
_BRACKETED = re.compile(
  rf"\[\[ ?[\"']?(?:{_NOUN} ?)?([abc12]|tie|draw)[\"']? ?\]\]", re.IGNORECASE
)
_LABEL = (
  r"(?<![a-z])(?:verdict|winner|choice|preference|preferred|decision|judge?ment|conclusion|"
  r"answer|result|better|best|selection|selected|pick|response|output|chosen|overall|"
  r"therefore)(?![a-z])"
  r"(?:[ _-][a-z]+){0,3}[\"']? ?(?:[:=]|-(?= )|\bis\b) ?(?:clearly |definitely )?|"
  r"(?:答案|结论|选择|结果|判断|胜者|获胜者|判定|更好的)(?:应该|应)?[是为:]{1,2} ?"
)
_LABELED = re.compile(
  rf"(?:^|(?P<label>{_LABEL}))[\"'(\[{{]{{0,3}} ?"
  r"(?P<value>@[ab]|[ab12](?!\w)|(?:(?:a )?tie|draw|tied|equal|both|neither)\b|平局)"
  # Not one of several answers, and not the subject of a clause.
  r"(?! ?(?:or|and|/|&|和|或) ?@| ?, ?@[ab] ?(?:$|[.,;]))"
  r"(?=[ \"')\]}]{0,4}"
  r"(?:$|[.,;!}(。]|>|over|because|since|as\b|due|for\b|wins|with\b))",
  re.MULTILINE,
)
_FINAL = re.compile(r"(?<![a-z])(?:final|overall|ultimate)(?:ly)?(?![a-z])|最终")
_WORSE = re.compile(r"\b(?:worse|worst|weaker|losing|rejected)\b")


def _list_labeled(text: str) -> set[JudgeChoice]:
  """Returns the verdicts in fixed places of marked text, or only the last final one."""
  choices, finals = [], []
  listed = all(re.search(rf"^ ?{side} ?[.:)]", text, re.M) for side in _CHOICES)
  for match in _LABELED.finditer(text):
    before = re.split(r"[.!?,;\n]", text[max(match.start() - 100, 0) : match.start()])
    rest = text[match.end() : match.end() + 50].partition("\n")[0]
    begins = match.start() == 0 and match["value"].startswith("@")
    is_line = not listed and (begins or not rest.strip(" .!\"')]}"))
    if not (match["label"] or is_line):
      continue
    if _DOUBT.search(before[-1]) or _WORSE.search(before[-1]):
      continue
    value = match["value"]
    choice = _CHOICES.get(_VALUES.get(value, value), "tie")
    choices.append(choice)
    if _FINAL.search(before[-1] + (match["label"] or "")):
      finals.append(choice)
  return set(finals[-1:] or choices)


# Verdicts in sentences.

_DOUBT = re.compile(
  r"\b(?:not|no|never|neither|nor|cannot|whether|doubt\w*|den(?:y|ies)|disagree|hardly|"
  r"wrong to|wrong that|incorrect to|false that|mistake to|unclear|uncertain|unsure|"
  r"unlikely|hard to|difficult to|impossible to|might|may|could|perhaps|maybe|possibly|"
  r"nobody|at first|if|unless|fails? to|far from|"
  r"some (?:may|might|would|people|readers))\b|n't\b|"
  r"不|没|未必|无法|难以|是否|可能|也许|并非"
)
# Phrases that contain a word of doubt and express none.
_NO_DOUBT = re.compile(
  r"\b(?:no doubt|without (?:a |any )?doubt|no question|not only|"
  r"if (?:i|one|we)? ?(?:had|have|must|were|was|am)?,? ?(?:to choose|forced|pressed|"
  r"to pick|to decide|choose|pick)[^,.]{0,20}|if you ask me)\b|毫无疑问|不仅"
)
_NOT_AS = re.compile(
  r"(?:\bnot|n't)\s(?:(?:quite|nearly|at all) )?(?:as|so) (\w+) as\b|"
  r"\b(?:falls short of|is no match for)\b|不如|没有(?= ?@[ab].{0,6}好)"
)
_KINDS = {
  "contrast": "but|however|nevertheless|nonetheless|yet|that said|但是?|然而|不过|可是",
  "concession": "although|(?:even )?though|while|whereas|albeit|despite|even if|"
  "admittedly|虽然|尽管",
  "reason": "because|since|given that|因为|由于",
  "result": "so(?! (?:much|far|that|well|good|as))|therefore|thus|hence|overall|"
  "in conclusion|in the end|finally|in summary|in short|ultimately|all in all|"
  "on balance|所以|因此|总的来说|总体(?:而言|来看|来说|上)?|综上(?:所述)?|最终",
  "condition": "if|unless|provided|如果|若",
}
_CONNECTOR = re.compile(
  "|".join(
    rf"(?P<{kind}>(?<![a-z])(?:{words})(?![a-z]))" for kind, words in _KINDS.items()
  )
  + r"|(?P<aside>\()|(?P<end>[,:)]| [—-] )"
)
_ADJECTIVES = (
  "accurate|correct|precise|helpful|useful|natural|concise|detailed|complete|faithful|"
  "comprehensive|informative|relevant|truthful|factual|coherent|specific|convincing|"
  "reliable|thorough|appropriate"
)
_PREDICATE = re.compile(
  rf"(?P<part>\b(?:more (?:{_ADJECTIVES})|clearer|is (?:the )?(?:right|correct|"
  r"accurate)|(?:has|have|with|uses|shows|slightly) "
  r"better(?= \w+ing| style| wording| structure)"
  r"|better (?:in(?! my| general| every| all)|at|on|regarding|\w{2,}(?:ed|ten)))\b|"
  r"更(?:准确|详细|简洁|自然|生动|正确|完整|具体|有帮助))"
  rf"|(?P<part_less>\bless (?:{_ADJECTIVES})\b)"
  r"|(?P<lose>\b(?:worse|worst|inferior|weaker|loses|lost)\b|更差|较差|最差|"
  r"比 ?@[ab] ?更?差)"
  r"|(?P<win>\b(?:better|best|superior|preferable|preferred|favou?red|wins?|won|winner|"
  r"stronger|strongest|beats|outperforms|surpasses|outshines|edges out|comes out ahead|"
  r"comes out on top|gets my vote|has the edge|takes (?:it|this|the win))\b|"
  r"更好|最好|更优|更佳|较好|胜出|获胜|优于|好于|强于|胜过|更胜一筹|"
  r"比 ?@[ab] ?[更要]?好)"
  r"|(?P<prefer>\b(?:prefer|choose|chose|pick|select|favou?r|recommend|vote for|"
  r"go(?:ing)? with|opt for|lean(?:ing)? towards?|side with|(?:edge|win|victory|nod|"
  r"point|vote|preference|prize) (?:goes |is )?(?:to|for))\b|"
  r"\b(?:i'd say|i would say|it is|it's|that is)(?= @[ab] ?$)|"
  r"选择?|喜欢|偏好|倾向于?|推荐|支持)"
)
_TIE = re.compile(
  r"(?P<tie>\bequally (?:good|bad|well|strong|matched)\b|"
  r"\b(?:a|it's|is) (?:tie|draw)\b|"
  r"\bneither\b.{0,40}\b(?:better|superior|wins|stands out)\b|平局|不相上下|"
  r"(?:同样|一样|同等)(?:好|差|出色|优秀)|不分(?:上下|高下|伯仲))"
  r"|(?P<same>\bequally \w+|\b(?:are|is) (?:\w+ ){0,2}(?:the same|identical|equal|tied|"
  r"equivalent|on par)\b|\bno (?:\w+ )?difference\b|"
  r"(?<!least )(?<!almost )(?<!nearly )\bas good as\b|相同|差不多|一样|没有区别)"
)
_OTHER = r"(?:(?:the |its )?(?:other|alternative|rival|competitor|counterpart)\b|@[ab])"
_THAN = re.compile(rf"(?: \w+){{0,2}} than (?!{_OTHER})")
_SUBJECT = re.compile(
  r"(?<!than )(?<!with )(?<!to )(?<!of )(?<!over )(?<!like )(@[ab])"
)
_BOTH = re.compile(r"@[ab] ?(?:and|or|/|,|和|与|或) ?@[ab][^@]*$")


def _read_clause(clause: str, subject: str) -> tuple[list[Decision], str]:
  """Returns the decisions of a clause, and the answer that it is about.

  Args:
    clause: Marked text without connectors.
    subject: The answer that the clause before is about, "" for none or both.
  """
  clause = re.sub(" +", " ", _NOT_AS.sub(" worse than ", clause))
  decisions, end = [], 0
  for match in _TIE.finditer(clause):
    if not _DOUBT.search(clause[: match.start()]):
      decisions.append(Decision("tie", 2 if match["tie"] else 1))
  if decisions:
    return decisions, ""
  for match in _PREDICATE.finditer(clause):
    before, stop, kind = clause[end : match.start()], match.start(), match.lastgroup
    both = _BOTH.search(before)
    sides = [side[1] for side in _SUBJECT.finditer(before)]
    subject = "" if both else sides[-1] if sides else subject
    side = subject
    if kind == "prefer":
      chosen = re.match(r"[^@]{0,30}(@[ab])", clause[match.end() :])
      side, stop = (chosen[1], match.end() + chosen.end()) if chosen else ("", stop)
    elif not side and (
      than := re.match(r".{0,20} than (@[ab])", clause[match.end() :])
    ):
      side = _swap(than[1])
    if (
      side and not _DOUBT.search(clause[:stop]) and not _THAN.match(clause, match.end())
    ):
      side = _swap(side) if kind in ("lose", "part_less") else side
      rank = 1 if kind in ("part", "part_less") else 2
      decisions.append(Decision(_CHOICES[side], rank))
    end = stop if kind == "prefer" else match.end()
  mentioned = set(re.findall("@[ab]", clause))
  return decisions, mentioned.pop() if len(
    mentioned
  ) == 1 else "" if mentioned else subject


def _swap(side: str) -> str:
  return "@b" if side == "@a" else "@a"


def _read_sentences(text: str) -> list[Decision]:
  """Returns the decisions of marked text."""
  decisions: list[Decision] = []
  subject = ""
  text = re.sub(r"(?<![.!?:;。])\n", " ", _NO_DOUBT.sub(" ", text))
  for sentence in re.split(r"(?<=[!?。;\n])|(?<=\.)(?= )", text):
    if not sentence.rstrip().endswith("?"):
      decisions, subject = _read_sentence(sentence, decisions, subject)
  return decisions


def _read_sentence(
  sentence: str, decisions: list[Decision], subject: str
) -> tuple[list[Decision], str]:
  """Adds a sentence's decisions to those before it; returns its last subject, too."""
  kind, is_final, doubtful = "", False, 0  # Number of doubtful clauses that follow.
  earlier, start, previous = len(decisions), 0, ""
  for connector in [*_CONNECTOR.finditer(sentence), None]:
    clause = sentence[start : connector.start() if connector else len(sentence)]
    if clause.startswith(" that ") and _DOUBT.search(previous):
      doubtful = 1
    added, subject = _read_clause(clause, subject)
    if connector and connector.lastgroup == "condition":  # "A is better if it is true."
      added = []
    if kind not in ("concession", "condition", "aside") and not doubtful:
      minus = 2 if kind == "reason" else 0
      decisions = decisions + [
        d._replace(rank=d.rank - minus, final=is_final) for d in added
      ]
    if connector is None:
      break
    doubtful = max(doubtful - 1, 0) if clause.strip() else doubtful
    previous, start, kind = clause, connector.end(), connector.lastgroup or ""
    is_final = is_final or kind == "result"
    if kind == "condition":
      doubtful = 2
    if kind == "contrast":  # Concedes what precedes it, earlier sentences less so.
      decisions = [
        d._replace(rank=d.rank - (1 if i >= earlier else 0.5), final=False)
        for i, d in enumerate(decisions)
      ]
  return decisions, subject


def parse_verdict(text: str) -> JudgeChoice | None:
  """Returns the answer that a reply prefers; None if it decides nothing.

  In this order: "[[A]]", with "[[C]]" for a tie; a labeled verdict, of which a final
  one outweighs others; the sentences, of which a concession, a doubt, a condition and a
  question do not count. Contradictory verdicts decide nothing.

  >>> parse_verdict("Output A is better because it is not too long.")
  'A'
  >>> parse_verdict("A is vivid, but B is right.")
  'B'
  >>> parse_verdict("It is not clear that output A is better.")
  """
  plain = clean_reply(text)
  if not plain or len(plain) > MAX_CHARS:
    return None
  plain = _COMPARED.sub(
    lambda m: f"[[{'tie' if m[2] == '=' else m[1] if '>' in m[2] else m[3]}]]", plain
  )
  values = {value.lower() for value in _BRACKETED.findall(plain)}
  bracketed = {_CHOICES.get(_VALUES.get(value, ""), "tie") for value in values}
  if len(bracketed) == 1:
    return bracketed.pop()
  marked = _mark_sides(plain).strip()
  labeled = _list_labeled(marked)
  if labeled or bracketed:
    return labeled.pop() if len(labeled) == 1 else None
  decisions = _read_sentences(marked)
  highest = max((d.rank for d in decisions), default=0)
  chosen = [d for d in decisions if d.rank == highest]
  chosen = [d for d in chosen if d.final] or chosen
  choices = {d.choice for d in chosen}
  return choices.pop() if len(choices) == 1 else None


def parse_named_verdict(text: str, name: str) -> JudgeChoice | None:
  """Returns the verdict after a name, as in "Better overall: [[A]]"; C is a tie.

  None unless the reply has exactly one such verdict.

  Args:
    text: The reply.
    name: The name in lower case.
  """
  form = (
    rf"(?<![a-z]){name.replace(' ', '[ _]')}[\"']?\W{{0,4}}"
    r"(?:(?:is|answer)\W{1,3}){0,2}"
    r"\[{0,2}[\"']?((?:a )?tie|neither|equal|[abc])\b"
    r"(?![\"']?\]{0,2},? ?(?:or |and )?(?:answer )?\[{0,2}[abc]\b)"
  )
  values = {match[1] for match in re.finditer(form, clean_reply(text).lower())}
  choices = {_CHOICES.get(_VALUES.get(value, ""), "tie") for value in values}
  return choices.pop() if len(choices) == 1 else None
