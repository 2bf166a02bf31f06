"""The page in a browser, from file://: slider, filters, keys, theme, small screens."""

import re
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from playwright.sync_api import expect

from tests.helpers.browser import browsing
from tests.helpers.made_run import ATTACK, write_lines, write_run
from vlmrlaif_jax.report.compare import write_comparison
from vlmrlaif_jax.report.page import write_report

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """The report of a run with alarms, and its comparison with another."""
  folder = tmp_path_factory.mktemp("pages")
  first, second = (write_run(folder / name) for name in ("first", "second"))
  alarm = {"step": 18, "name": "drift", "message": "It grows.", "remedy": "Stop it."}
  write_lines(first / "ppo/alarms.jsonl", [alarm])
  both = write_comparison([first, second], folder / "both.html")
  return {"report": write_report(first).as_uri(), "comparison": both.as_uri()}


@pytest.fixture(scope="module")
def browser():
  with browsing() as made:
    yield made


@pytest.fixture
def opened(browser, pages):
  """Opens a page in a window of its own; what it complains of fails the test."""
  contexts, complaints = [], []

  def open_page(name="report", **settings):
    contexts.append(browser.new_context(**{"viewport": DESKTOP, **settings}))
    page = contexts[-1].new_page()
    said = lambda message: complaints.append(message.text)
    page.on("console", lambda m: said(m) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked(request.url))
    page.goto(pages[name])
    return page

  def asked(url):
    if url not in pages.values() and not url.startswith("data:"):
      complaints.append(f"the page asks for {url}")

  yield open_page
  for context in contexts:
    context.close()
  assert complaints == []


@pytest.fixture
def page(opened):
  return opened()


def choose(page, name):
  page.locator(f'[data-name="{name}"]').click()


def slide(page, place):
  page.locator("#slide").fill(str(place))


def cards(page):
  return page.locator(".card")


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_opens_from_a_file_and_asks_for_nothing(opened, name):
  page = opened(name)
  expect(cards(page).first).to_be_visible()
  expect(page.locator(".chart svg").first).to_be_visible()


def test_slider_moves_and_shows_its_step(page):
  expect(page.locator("#step")).to_have_text("step 40")
  page.get_by_label("differences").uncheck()
  slide(page, 4)
  expect(page.locator("#step")).to_have_text("step 20")
  expect(cards(page).first).to_contain_text("At step 20")
  expect(page.locator("#cards")).not_to_contain_text("At step 40")


def test_answers_to_followed_prompts_are_marked_where_they_changed(page):
  first = cards(page).first
  expect(first).to_contain_text("followed through the steps")
  expect(first.locator("ins").first).to_have_text(" 40")
  expect(first.locator("del").first).to_have_text(" 0")
  page.get_by_label("differences").uncheck()
  expect(page.locator("#cards ins")).to_have_count(0)


def test_answers_stand_by_score_with_what_it_is_made_of(page):
  scores = cards(page).first.locator(".answer h4").all_inner_texts()
  found = [re.search(r"score (−?)([\d.]+)", text) for text in scores]
  values = [float(m[2]) * (-1 if m[1] else 1) for m in found]
  assert len(values) == 3 and values == sorted(values, reverse=True)
  slide(page, 0)
  # A term of weight 1 has one value.
  expect(page.locator("#cards")).to_contain_text(
    re.compile(r"= reward model −?[\d.]+, no end −1 \(raw 0.5\)")
  )


def test_what_an_answer_says_is_text(page):
  expect(cards(page).first).to_contain_text(ATTACK)
  assert page.locator("#cards script").count() == 0


def test_filter_by_text(page):
  everything = cards(page).count()
  page.get_by_label("text").fill("square 1")
  expect(cards(page)).to_have_count(1)
  expect(page.locator("#count")).to_contain_text(f"1 of {everything} prompts shown")
  page.get_by_role("button", name="reset").click()
  expect(cards(page)).to_have_count(everything)


def test_filter_by_kind(page):
  page.get_by_label("kind").select_option("colour")
  expect(page.locator(".tag").first).to_contain_text("colour")
  assert all("colour" in text for text in page.locator(".tag").all_inner_texts())


def test_filter_by_what_went_wrong(page):
  page.get_by_label("only").select_option("cut off or without a score")
  assert 0 < cards(page).count() < 6
  for card in cards(page).all():
    expect(card.locator(".note").first).to_contain_text(re.compile("cut off|no score"))


def test_filter_by_score(page):
  page.get_by_label("score from").fill("99")
  expect(cards(page)).to_have_count(0)
  expect(page.locator("#count")).to_contain_text("0 of")
  page.get_by_label("score from").fill("-99")
  assert cards(page).count() > 3


def test_arrows_change_the_step_and_go_through_prompts(page):
  page.keyboard.press("ArrowLeft")
  expect(page.locator("#step")).to_have_text("step 35")
  page.keyboard.press("j")
  expect(cards(page).nth(0)).to_be_focused()
  page.keyboard.press("ArrowDown")
  expect(cards(page).nth(1)).to_be_focused()
  outline = cards(page).nth(1).evaluate("card => getComputedStyle(card).outlineStyle")
  assert outline == "solid"
  page.keyboard.press("ArrowRight")
  expect(page.locator("#step")).to_have_text("step 40")
  expect(cards(page).nth(1)).to_be_focused()  # The same prompt, at another step.
  page.keyboard.press("ArrowUp")
  expect(cards(page).nth(0)).to_be_focused()


def test_typing_in_a_filter_moves_nothing(page):
  page.get_by_label("text").press_sequentially("jk")
  page.keyboard.press("ArrowLeft")
  expect(page.locator("#step")).to_have_text("step 40")
  expect(page.get_by_label("text")).to_be_focused()


def test_clip_plays_and_stops(page):
  screen = cards(page).first.locator(".player img")
  place = lambda: screen.evaluate("image => image.style.objectPosition")
  assert place() == "0% 0px"
  page.keyboard.press("j")
  page.keyboard.press("p")
  page.wait_for_function(
    "image => image.style.objectPosition !== '0% 0px'", arg=screen.element_handle()
  )
  page.keyboard.press("p")
  expect(cards(page).first.locator(".player")).to_contain_text("play")
  cards(page).first.get_by_label("frame 12").click()
  assert place() == "100% 0px"


def test_sources_have_what_their_stage_leaves(page):
  choose(page, "label")
  expect(page.locator("#slider")).to_be_hidden()
  expect(page.locator("#cards")).to_contain_text("Context of the judge: A red square")
  expect(page.locator("#cards")).to_contain_text(
    "Answers in the order 2, 1: Output B is better."
  )
  choose(page, "eval")
  expect(page.locator("#cards")).to_contain_text("Truth: to the right")
  expect(page.locator("#cards")).to_contain_text("not in the video: a blue disk")
  expect(page.locator("#count")).to_contain_text("16 more prompts of this stage left")


def test_an_alarm_leads_to_the_answers_of_its_step(page):
  choose(page, "eval")
  page.get_by_text("Answers of the step of the first alarm").click()
  expect(page.locator("#step")).to_have_text("step 20")  # The first from 18 on.


def background(page):
  return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.fixture
def served(browser, pages):
  """The report under an address: Chromium loses now and then what a file stores."""
  context = browser.new_context()
  path = url2pathname(urlsplit(pages["report"]).path)
  context.route("http://report.test/", lambda route: route.fulfill(path=path))
  page = context.new_page()
  page.goto("http://report.test/")
  yield page
  context.close()


def test_theme_goes_round_and_is_remembered(served):
  light = background(served)
  button = served.locator("#theme")
  button.click()
  assert background(served) == light
  button.click()
  expect(button).to_have_text("theme: dark")
  dark = background(served)
  assert dark != light
  served.reload()
  expect(button).to_have_text("theme: dark")
  assert background(served) == dark


def test_dark_where_the_system_is_dark(opened):
  light, dark = (background(opened(color_scheme=name)) for name in ("light", "dark"))
  assert light == "rgb(255, 255, 255)" and dark != light


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_is_no_wider_than_a_phone(opened, name):
  page = opened(name, viewport=PHONE)
  page.evaluate(
    "document.querySelectorAll('details').forEach(each => each.open = true)"
  )
  for source in page.locator("#sources button").all():
    source.click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_answers_of_runs_stand_beside_each_other(opened):
  page = opened("comparison")
  choose(page, "eval")
  expect(cards(page).first.locator("h4").first).to_contain_text("SFT of first, second")
