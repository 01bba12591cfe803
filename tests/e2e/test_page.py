"""The page of the simple frontend in a real Chromium, on a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright
from programs import DEADLINE_S, Program

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CAN_INSTALL = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 360, "height": 740}
API_KEY = "a-key-for-tests"

expect.set_options(timeout=60_000)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not (os.environ.get("CI") and CAN_INSTALL),
    reason="There is no chromium. On Debian, as root: .ci/chromium",
)

# Contrast as WCAG 2 has it, of every text that can be seen, against what is really behind it.
LOW_CONTRAST = """() => {
  const parse = (text) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".hidden, :disabled, .is-off, noscript")) continue;
    const style = getComputedStyle(element);
    const behind = ground(element);
    const [a, b] = [luminance(over(parse(style.color), behind)), luminance(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""

UNNAMED = """() => {
  const named = (element) =>
    element.getAttribute("aria-label") || element.labels?.length || element.textContent.trim() ||
    (element.getAttribute("aria-labelledby") ?? "").split(" ").some((id) => document.getElementById(id)?.textContent.trim());
  const controls = document.querySelectorAll("button, input, textarea, [role], [tabindex='0'], section, article");
  const isNamedByOthers = (element) => ["status", "alert", "tooltip"].includes(element.role);
  return [...controls]
    .filter((element) => element.checkVisibility() && !isNamedByOthers(element) && !named(element))
    .map((element) => element.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, long_llama: Path) -> Iterator[str]:
    yield from serve(tmp_path_factory, long_llama)


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[str]:
    yield from serve(tmp_path_factory, tiny_llama, CACHEFLOW_API_KEY=API_KEY)


def serve(factory: pytest.TempPathFactory, model: Path, **variables: str) -> Iterator[str]:
    folder = factory.mktemp("page")
    arguments = ("serve", "simple", "--model", str(model), "--port", "0", "--kv-cache-memory", "0.02", "--disable-log-stats")
    program = Program(folder / "log", folder, *arguments, **variables)
    try:
        yield "http://" + program.wait_for(" at http://")
    finally:
        program.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "There is no chromium, though it can be installed here: .ci/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: str) -> Iterator[Open]:
    """Opens the page in a context of its own; what went wrong in the browser fails the test."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def open_(url: str = server, /, viewport: dict[str, int] | None = None, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport or DESKTOP, **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    # The browser itself notes answers with an error status, which some tests ask for.
    assert [problem for problem in problems if not problem.startswith("Failed to load resource")] == []


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
        return json.load(response)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        return json.load(response)


def generate(page: Page, prompt: str = "The capital of France is", mode: str = "Greedy", **fields: Any) -> None:
    page.get_by_text(mode, exact=True).click()
    page.get_by_label("Prompt").fill(prompt)
    page.locator("#more").evaluate("details => { details.open = true }")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()


def go_on_past_the_end(page: Page) -> None:
    page.locator("#more").evaluate("details => { details.open = true }")
    page.get_by_label("Go on past the end of text").check()


def generate_for_long(page: Page) -> None:
    """Starts a request that runs for 10 s and more."""
    go_on_past_the_end(page)
    generate(page, mode="Sampling", max_tokens=15_000, n=2)


def wait_until_done(page: Page) -> None:
    expect(page.locator("#run")).to_contain_text("Done", timeout=DEADLINE_S * 1000)


def texts(page: Page) -> list[str]:
    return [text.text_content() or "" for text in page.locator(".choice .text").all()]


def test_it_loads_without_an_error_and_asks_no_other_host(open_page: Open) -> None:
    page = open_page()
    expect(page).to_have_title("cacheflow")
    expect(page.locator("#health")).to_have_text("ready")


def test_a_text_grows_and_ends_as_the_api_gives_it(open_page: Open, server: str) -> None:
    page = open_page()
    page.evaluate("""() => {
      window.lengths = new Set();
      const note = () => window.lengths.add(document.querySelector(".choice .text")?.textContent.length);
      new MutationObserver(note).observe(document.getElementById("outputs"), { subtree: true, childList: true });
    }""")
    go_on_past_the_end(page)
    generate(page, max_tokens=2000)
    wait_until_done(page)
    expected = post(server, {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 2000, "ignore_eos": True})
    assert texts(page) == expected["text"]
    assert page.evaluate("window.lengths.size") > 3
    expect(page.locator(".choice h3")).to_contain_text("tokens")


def test_nothing_moves_while_texts_grow(open_page: Open) -> None:
    page = open_page()
    generate(page, mode="Sampling", max_tokens=200, n=4)
    expect(page.locator(".choice")).to_have_count(4)
    page.evaluate("""() => {
      window.places = new Map();
      window.frames = 0;
      const note = () => {
        window.frames++;
        for (const element of document.querySelectorAll("section, section > *, .choice, .choice > *, .tile, #form > *")) {
          const { x, y, width, height } = element.getBoundingClientRect();
          window.places.set(element, (window.places.get(element) ?? new Set()).add(`${x} ${y} ${width} ${height}`));
        }
        requestAnimationFrame(note);
      };
      note();
    }""")
    wait_until_done(page)
    page.wait_for_function("window.frames > 3")
    moved = """() => [...window.places].filter(([, places]) => places.size > 1)
      .map(([element, places]) => [element.outerHTML.slice(0, 80), ...places])"""
    assert page.evaluate(moved) == []


def test_beams_stand_side_by_side_best_first(open_page: Open, server: str) -> None:
    page = open_page()
    generate(page, mode="Beams", max_tokens=8, n=4)
    wait_until_done(page)
    expected = post(
        server,
        {"prompt": "The capital of France is", "temperature": 0, "use_beam_search": True, "n": 4, "max_tokens": 8},
    )
    assert texts(page) == expected["text"]
    first, second = (page.locator(".choice").nth(index).bounding_box() for index in (0, 1))
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert second["x"] > first["x"]


def test_stop_ends_the_request_in_the_engine_and_keeps_the_text(open_page: Open, server: str) -> None:
    page = open_page()
    generate_for_long(page)
    expect(page.locator(".token").first).to_be_attached()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#run")).to_have_text("Stopped.")
    assert all(len(text) > len("The capital of France is") for text in texts(page)[:1])
    expect(page.locator("#running")).to_have_text("0")
    stats = get(f"{server}/stats")["engine"]
    assert stats["num_running"] == 0
    assert stats["num_free_blocks"] + stats["num_cached_blocks"] == stats["num_blocks"]


def test_probabilities_show_under_the_pointer_and_by_the_arrow_keys(open_page: Open, server: str) -> None:
    page = open_page()
    generate(page, max_tokens=12)
    wait_until_done(page)
    expected = post(server, {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12, "logprobs": 5})[
        "logprobs"
    ][0]
    tip = page.get_by_role("tooltip")
    page.locator(".token").first.hover()
    expect(tip).to_be_visible()
    assert page.locator(".tip .row").count() == len(expected[0]["top"])
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    page.locator(".token").first.focus()
    expect(tip).to_be_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 1
    assert "%" in (page.locator(".token").nth(1).get_attribute("aria-label") or "")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    # All tokens of a text are one stop of the tab key.
    assert page.locator(".token[tabindex='0']").count() == 1


def test_the_copied_curl_is_the_request_and_a_shell_runs_it(open_page: Open) -> None:
    prompt = 'It\'s "quoted", $HOME `date` \\ and\non two lines: é🙂'
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    generate(page, prompt, max_tokens=12, stop="zzz\\n\nqqq'q")
    wait_until_done(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert f"'{sent[0].url}'" in command
    assert (sent[0].post_data or "").replace("'", "'\\''") in command
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=DEADLINE_S, check=True)
    *events, end = [event.removeprefix("data: ") for event in done.stdout.decode().split("\n\n")[:-1]]
    assert end == "[DONE]"
    assert json.loads(events[-1])["text"] == texts(page)


def test_the_live_view_counts_as_the_server_does(open_page: Open, server: str) -> None:
    page = open_page()
    body = json.dumps({"prompt": "Hello", "max_tokens": 30_000, "ignore_eos": True, "stream": True})
    with subprocess.Popen(["curl", "-sN", f"{server}/generate", "-d", body], stdout=subprocess.DEVNULL) as other:
        # A request of another client is in the queue, and its blocks are on the map.
        expect(page.locator("#requests tr")).to_have_count(1)
        expect(page.locator("#running")).to_have_text("1")
        expect(page.locator("#usage")).not_to_have_text("0%")
        page.locator("#requests button").click()
        expect(page.locator("#requests tr")).to_have_class("is-marked")
        other.kill()
    expect(page.locator("#requests tr")).to_have_count(0)
    blocks = get(f"{server}/stats/view")["blocks"]
    expect(page.locator("#num-free")).to_have_text(f"{blocks.count(0):,}")
    expect(page.locator("#num-cached")).to_have_text(f"{blocks.count(1):,}")
    expect(page.locator("#num-shared")).to_have_text("0")
    expect(page.locator("#num-held")).to_have_text("0")
    expect(page.locator("#blocks-hint")).to_have_text(f"{len(blocks):,} blocks")


def test_the_live_view_marks_the_request_of_its_own_page_and_no_other(open_page: Open, server: str) -> None:
    page = open_page()
    body = json.dumps({"prompt": "Hello", "max_tokens": 30_000, "ignore_eos": True, "stream": True})
    with subprocess.Popen(["curl", "-sN", f"{server}/generate", "-d", body], stdout=subprocess.DEVNULL) as other:
        expect(page.locator("#requests tr:not(.is-own)")).to_have_count(1)
        other.kill()
    expect(page.locator("#requests tr")).to_have_count(0)
    generate_for_long(page)
    expect(page.locator("#requests tr.is-own")).to_contain_text("yours")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#requests tr")).to_have_count(0)


def test_a_hundred_thousand_blocks_are_drawn_each(open_page: Open, server: str) -> None:
    page = open_page()
    view = get(f"{server}/stats/view")
    blocks = [0] * 50_000 + [1] * 30_000 + [2] * 20_000
    view["stats"] |= {"num_blocks": 100_000, "num_free_blocks": 50_000, "num_cached_blocks": 30_000}
    page.route("**/stats/view", lambda route: route.fulfill(json=view | {"blocks": blocks}))
    expect(page.locator("#blocks-hint")).to_have_text("100,000 blocks")
    counts = page.evaluate("""() => {
      const canvas = document.getElementById("blocks");
      const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
      const counts = {};
      for (const pixel of pixels) counts[pixel] = (counts[pixel] ?? 0) + 1;
      return Object.values(counts).sort((a, b) => b - a);
    }""")
    assert [count for count in counts if count in (50_000, 30_000, 20_000)] == [50_000, 30_000, 20_000]


def test_a_refused_value_is_told_and_its_field_marked(open_page: Open) -> None:
    page = open_page()
    generate(page, mode="Sampling", temperature=-1)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("400 · temperature")
    expect(alert).to_contain_text("temperature must be a number from 0 to 100, got -1.")
    expect(page.locator("#temperature")).to_be_focused()
    expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "true")
    generate(page, mode="Sampling", temperature=1)
    wait_until_done(page)
    expect(alert).to_be_hidden()
    assert page.locator("[aria-invalid]").count() == 0


def test_an_overloaded_server_is_asked_again_when_it_said(open_page: Open) -> None:
    page = open_page()
    error = {"message": "Too many requests wait.", "type": "server_error", "param": None, "code": "overloaded"}

    def refuse(route: Route) -> None:
        route.fulfill(status=503, json={"error": error}, headers={"retry-after": "1"})

    page.route("**/generate", refuse)
    generate(page, max_tokens=4)
    expect(page.get_by_role("alert")).to_contain_text("503")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    page.unroute("**/generate", refuse)
    again.click()
    wait_until_done(page)


def test_a_lost_connection_keeps_what_had_come(open_page: Open) -> None:
    page = open_page()
    event = {"text": ["Hello, half a"], "finish_reasons": [None]}
    page.route(
        "**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n")
    )
    generate(page, "Hello", max_tokens=4)
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost")
    assert texts(page) == ["Hello, half a"]
    page.route("**/generate", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("can't be reached")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(open_page: Open, guarded_server: str) -> None:
    page = open_page(guarded_server)
    field = page.get_by_label("This server needs an API key")
    for key in ("a-wrong-key", API_KEY):
        field.fill(key)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#health")).to_have_text("ready" if key == API_KEY else "needs a key")
    generate(page, max_tokens=4)
    wait_until_done(page)
    command = page.locator("#curl").text_content() or ""
    assert API_KEY not in command
    assert "$CACHEFLOW_API_KEY" in command
    stored = "[Object.values({...localStorage}), Object.values({...sessionStorage}), document.cookie]"
    assert page.evaluate(stored) == [[], [API_KEY], ""]
    page.reload()
    expect(page.locator("#health")).to_have_text("ready")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_texts_can_be_read_and_everything_has_a_name(open_page: Open, theme: str, viewport: dict[str, int]) -> None:
    page = open_page(viewport=viewport, color_scheme=theme)
    generate(page, mode="Sampling", max_tokens=20, n=4)
    wait_until_done(page)
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate(UNNAMED) == []
    generate(page, mode="Sampling", temperature=-1)
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate(LOW_CONTRAST) == []


def test_the_page_has_landmarks_and_headings_in_order(open_page: Open) -> None:
    page = open_page()
    assert page.locator("html").get_attribute("lang") == "en"
    for role in ("main", "banner"):
        assert page.get_by_role(role).count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert (
        page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i)")
        == []
    )
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt")).to_be_focused()


def test_it_can_be_used_with_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    wait_until_done(page)
    assert page.locator(".choice").count() == 1


def test_a_phone_needs_no_sideways_scrolling(open_page: Open) -> None:
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    generate(page, "word" * 60, mode="Sampling", max_tokens=60, n=4)
    expect(page.locator(".token").first).to_be_attached()
    width = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(page.evaluate(width)) <= PHONE["width"]
    wait_until_done(page)
    assert max(page.evaluate(width)) <= PHONE["width"]


def test_the_theme_is_the_systems_until_it_is_chosen(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Dark theme")).to_have_attribute("aria-pressed", "true")


def test_the_map_is_drawn_in_the_colours_of_the_theme(open_page: Open) -> None:
    page = open_page(color_scheme="dark")
    has_pixel = """(abgr) => {
      const { width, height } = document.getElementById("blocks");
      if (!width) return false;
      // Of a copy: the browser warns of canvases that are read often.
      const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
      copy.drawImage(document.getElementById("blocks"), 0, 0);
      return new Uint32Array(copy.getImageData(0, 0, width, height).data.buffer).includes(abgr);
    }"""
    dark_free, light_free = 0xFF322B26, 0xFFE1E6E6
    page.wait_for_function(has_pixel, arg=dark_free)
    page.get_by_role("button", name="Dark theme").click()
    page.wait_for_function(has_pixel, arg=light_free)
    assert not page.evaluate(has_pixel, dark_free)


def test_nothing_is_animated_for_who_wants_no_motion(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    generate(page, mode="Sampling", max_tokens=200, n=4)
    expect(page.locator(".choice")).to_have_count(4)
    assert page.evaluate("document.getAnimations().length") == 0
