"""The playground in a real Chromium: against canned streams, and against the server."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from specrt.serve.page_routes import FOLDER
from tests.serve.canned import Canned, Drop, canned, end, event, opening, round_of
from tests.serve.support import QUESTION, load_small, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ANSWER = [
    opening(),
    round_of([" four", " apples"], ","),
    round_of([], " so\n", refused=2),
    round_of([" that"], " is all"),
    end(6, 3),
]
TEXT = " four apples, so\n that is all"


@pytest.fixture(scope="module")
def server() -> Iterator[Canned]:
    with canned() as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Tab:
    """The page as somebody sees it; what it should never do is collected."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self._url = page, url
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', "
            "(event) => console.error('policy: ' + event.violatedDirective))"
        )

    def _heard(self, message: Any) -> None:
        # Chromium says so of calls that were refused, which the page cannot prevent.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            self.complaints.append(message.text)

    def ask(self, prompt: str) -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.keyboard.press("Enter")

    def wait(self, text: str, selector: str = ".numbers") -> Any:
        found = self.page.locator(selector, has_text=text).last
        found.wait_for()
        return found

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()

    def open(self) -> None:
        """Begin anew, as if nobody had been here."""
        self.page.context.set_offline(False)
        self.page.set_viewport_size({"width": 1280, "height": 800})
        self.page.goto(self._url)
        if self.page.evaluate(
            "() => { const n = sessionStorage.length; sessionStorage.clear(); return n; }"
        ):
            self.page.reload()

    def check(self) -> None:
        """Nothing was complained of, and nobody else was asked."""
        assert self.complaints == []
        assert self.hosts <= {self._url.split("/")[2]}


@pytest.fixture(scope="module")
def only_tab(browser: Any, server: Canned) -> Iterator[Tab]:
    with browser.new_context() as context:
        context.set_default_timeout(20_000)
        yield Tab(context.new_page(), server.url)


@pytest.fixture
def tab(only_tab: Tab, server: Canned) -> Iterator[Tab]:
    server.reset()
    only_tab.complaints.clear()
    only_tab.open()
    yield only_tab
    only_tab.check()


# --- answers --------------------------------------------------------------------------------------


def test_an_answer_shows_who_proposed_its_tokens(tab: Tab, server: Canned) -> None:
    server.stream(*ANSWER)
    tab.ask("How many?")
    tab.wait("6 tokens")
    assert tab.page.locator(".text").text_content() == TEXT
    assert tab.texts(".text .d") == [" four apples", " that"]
    assert tab.texts(".text .t") == [",", " so\n", " is all"]
    line = tab.page.locator(".numbers").text_content()
    assert "tau 2.00" in line and "8 % of drafted" in line and "12 ms" in line
    assert tab.texts("#tau, #count, #share") == ["2.00", "8 %", "6"]
    # Colour is not the only sign.
    drafted = tab.page.locator(".text .d").first
    assert "underline" in drafted.evaluate("(one) => getComputedStyle(one).textDecorationLine")


def test_a_request_says_what_the_settings_say(tab: Tab, server: Canned) -> None:
    server.stream(*ANSWER)
    page = tab.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("9007199254740991")
    page.get_by_label("Max tokens").fill("")
    page.get_by_label("Draft length").fill("5")
    page.get_by_label("API key").fill("secret")
    tab.ask("Hello")
    tab.wait("6 tokens")
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions" and asked.key == "Bearer secret"
    assert asked.body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "x_specrt": {"trees": True},
        "speculative": {"enabled": True, "max_tokens": 5},
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 2**53 - 1,
    }
    # The key is this tab's: kept over a reload, and by nothing that lasts.
    page.reload()
    assert page.get_by_label("API key").input_value() == "secret"
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]


def test_what_cannot_be_is_not_asked(tab: Tab, server: Canned) -> None:
    tab.page.get_by_label("Top p").fill("2")
    tab.ask("Hello")
    assert tab.page.get_by_label("Prompt", exact=True).input_value() == "Hello"
    assert tab.page.evaluate("() => document.activeElement.id") == "top-p"
    assert server.asked == []


def test_a_conversation_goes_on_and_is_cleared(tab: Tab, server: Canned) -> None:
    for _ in range(3):
        server.stream(*ANSWER)
    for count, question in enumerate(("one", "two"), 1):
        tab.ask(question)
        tab.page.locator(".numbers", has_text="6 tokens").nth(count - 1).wait_for()
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": TEXT}]
    assert server.asked[1].body["messages"] == [*said, {"role": "user", "content": "two"}]
    seeds = {asked.body["seed"] for asked in server.asked}
    assert len(seeds) == 2, "drawn for each"
    tab.page.get_by_role("button", name="Clear").click()
    assert tab.page.locator(".turn").count() == 0
    tab.ask("three")
    tab.wait("6 tokens")
    assert server.asked[2].body["messages"] == [{"role": "user", "content": "three"}]


def test_text_goes_on_from_a_prompt(tab: Tab, server: Canned) -> None:
    tab.page.get_by_label("Text: goes on").check()
    assert tab.page.get_by_label("System prompt").is_disabled()
    server.stream(round_of([" a"], " b", raw=True), end(2, 1, raw=True))
    tab.ask("Once")
    tab.wait("2 tokens")
    (asked,) = server.asked
    assert asked.path == "/v1/completions" and asked.body["prompt"] == "Once"
    assert tab.texts(".text") == [" a b"]


def test_without_reports_nothing_is_coloured(tab: Tab, server: Canned) -> None:
    tab.page.get_by_label("Report rounds").uncheck()
    tab.page.get_by_label("A drafter proposes").uncheck()
    server.stream(event(" plain"), event(" text"), end(4, 4, finish="length"))
    tab.ask("Hello")
    assert "cut off" in tab.wait("4 tokens").text_content()
    assert "x_specrt" not in server.asked[0].body
    assert server.asked[0].body["speculative"] == {"enabled": False}
    assert tab.texts(".text") == [" plain text"] and tab.page.locator(".d, .t").count() == 2 - 1
    assert tab.page.get_by_role("slider").is_disabled()


# --- texts ----------------------------------------------------------------------------------------

ODD = {
    "html": (["<img src=x onerror=alert(1)>", "</script>"], "<script>alert(1)</script>", None),
    "right to left": (
        ["\u05e9\u05dc\u05d5\u05dd", " \u202eabc"],
        "\u0645\u0631\u062d\u0628\u0627",
        None,
    ),
    "parts of characters": (["\ufffd", "\ufffd", " x"], "\ufffd", "\u2603 x"),
    "one token, two characters": (["\ufffd", "\ufffd\ufffd"], "!", "\U0001f600\u20ac!"),
    "special": (["a", "<|im_end|>"], "b", "ab"),
    "a first space": ([" Hello", " you"], "", "Hello you"),
    "zeros": (["a\0b", "\x1b[31m"], "\u2028", None),
    "wide": (["\u6f22\u5b57", "\U0001f469\u200d\U0001f52c"], "\u0301", None),
}


def test_odd_texts_are_shown_as_they_are(tab: Tab, server: Canned) -> None:
    for number, (name, (drafted, own, text)) in enumerate(ODD.items()):
        server.stream(round_of(drafted, own, text=text), end(len(drafted) + 1, 1))
        tab.ask(f"<b>{name}</b>")
        tab.page.locator(".numbers", has_text=" tokens").nth(number).wait_for()
        shown = tab.page.locator(".text").nth(number).locator(".d, .t").all_text_contents()
        assert "".join(shown) == ("".join([*drafted, own]) if text is None else text), name
        assert tab.texts(".asked span:last-child")[-1] == f"<b>{name}</b>"
    assert tab.page.locator("#talk, #tree").locator("img, script, b").count() == 0


def test_characters_cut_between_chunks_come_whole(tab: Tab, server: Canned) -> None:
    whole = b"".join([event("\U0001f600"), event("\ud83d"), event("\ude00 \u00e9"), end(3, 3)])
    cuts = [whole[place : place + 3] for place in range(0, len(whole), 3)]
    server.stream(*cuts)
    tab.ask("Hello")
    tab.wait("3 tokens")
    assert tab.texts(".text") == ["\U0001f600\U0001f600 \u00e9"]


def test_a_character_is_whose_its_last_token_is(tab: Tab, server: Canned) -> None:
    first = round_of(["a", "\ufffd"], "\ufffd", text="a\u2603")
    late = round_of([" b"], "\ufffd", text=" b")
    server.stream(first, late, round_of(["\ufffd", "c"], "d", text="\u20accd"), end(8, 3))
    tab.ask("Hello")
    tab.wait("8 tokens")
    assert tab.texts(".text .d") == ["a", " b", "\u20acc"]
    assert tab.texts(".text .t") == ["\u2603", "d"]


def test_a_long_answer_leaves_the_page_alive(tab: Tab, server: Canned) -> None:
    goes_on, count = threading.Event(), 4000
    drafted = [" one", " two", " three", " four"]
    ends = [" five" if number % 50 else "\n" for number in range(count)]
    pieces = [round_of(drafted, own) for own in ends]
    half = count // 2
    server.stream(b"".join(pieces[:half]), goes_on, b"".join(pieces[half:]), end(5 * count, count))
    tab.ask("Count")
    tab.page.locator("#count", has_text="10,000").wait_for()
    box = tab.page.get_by_label("Prompt", exact=True)
    box.fill("meanwhile")  # the stream is open
    goes_on.set()
    box.press("End")
    box.type("!")
    tab.wait("20,000 tokens")
    assert box.input_value() == "meanwhile!"
    want = "".join("".join(drafted) + own for own in ends)
    assert tab.page.locator(".text").text_content() == want
    # It stayed at the end, and of all rounds one is drawn.
    assert tab.page.evaluate("() => talk.scrollTop + talk.clientHeight >= talk.scrollHeight - 1")
    assert tab.page.locator("#tree svg").count() == 1


# --- rounds ---------------------------------------------------------------------------------------


def test_a_rounds_tree_by_pointer_keys_and_slider(tab: Tab, server: Canned) -> None:
    server.stream(*ANSWER)
    tab.ask("How many?")
    tab.wait("6 tokens")
    page, said = tab.page, tab.page.locator("#said")
    page.locator(".text .d").first.hover()
    words = "3 tokens drafted; accepted “␣four” “␣apples”; the target’s own “,”."
    assert said.text_content() == words
    assert page.get_by_role("img", name=f"Round 1 of 3: {words}").count() == 1
    kinds = page.locator("#tree circle, #tree rect").evaluate_all(
        "(all) => all.map((one) => one.getAttribute('class'))"
    )
    assert kinds == ["root", "accepted", "accepted", "refused", "own"]
    rows = page.locator("#tree text").evaluate_all(
        "(all) => all.map((one) => Number(one.getAttribute('y')))"
    )
    assert rows[0] == rows[1] == rows[2] == rows[4] < rows[3], "what was taken is the first row"
    assert tab.texts(".on") == [" four apples", ","]
    answer = page.get_by_role("group", name=re.compile("Answer"))
    answer.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").text_content() == "2 of 3"
    assert "none accepted" in page.get_by_role("status").text_content()
    page.keyboard.press("End")
    assert tab.texts(".on") == [" that", " is all"]
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").text_content() == "3 of 3"
    slider = page.get_by_role("slider", name="Round")
    slider.focus()
    page.keyboard.press("Home")
    assert said.text_content() == words and slider.get_attribute("aria-valuetext").endswith(words)


def test_a_round_without_a_tree_says_so(tab: Tab, server: Canned) -> None:
    merged = {"accepted": 1, "tokens": ["a", "b"], "tree": None}
    server.stream(event("ab", more=merged), end(2, 1))
    tab.ask("Hello")
    tab.wait("2 tokens")
    assert "not reported" in tab.page.locator("#said").text_content()
    assert tab.texts(".d")[-1:] == ["a"] and tab.page.locator("#tree svg").count() == 0


# --- side by side ---------------------------------------------------------------------------------


def side_by_side(tab: Tab, server: Canned, fast: list[bytes]) -> Any:
    plain = [round_of([], token, refused=0) for token in (" a", " b", " c", " d")]
    warm = [event(" a"), end(8, 8, finish="length")]
    for steps in (warm, [*plain, end(4, 4)], warm, fast):
        server.stream(*steps)
    tab.page.get_by_label("Side by side").check()
    tab.ask("Spell")
    return tab.page.locator(".verdict", has_text=re.compile("Equal|Different"))


def test_plain_and_speculative_are_compared(tab: Tab, server: Canned) -> None:
    pause = threading.Event()
    threading.Timer(0.05, pause.set).start()
    fast = [round_of([" a"], " b"), pause, round_of([" c"], " d"), end(4, 2)]
    verdict = side_by_side(tab, server, fast)
    verdict.wait_for()
    assert verdict.text_content().startswith("Equal: all of 4 tokens.")
    assert "times as fast, tau 2.00. One ran after the other" in verdict.text_content()
    assert tab.texts(".answer .text") == [" a b c d"] * 2
    asked = [one.body for one in server.asked]
    assert [one["speculative"]["enabled"] for one in asked] == [False, False, True, True]
    assert [one["max_tokens"] for one in asked] == [8, 256, 8, 256]
    assert len({(one["seed"], one["cache_salt"]) for one in asked}) == 1
    server.stream(*ANSWER)
    tab.page.get_by_label("Side by side").uncheck()
    tab.ask("On")
    tab.wait("6 tokens")
    assert [turn["content"] for turn in server.asked[-1].body["messages"]] == [
        "Spell", " a b c d", "On",
    ]  # fmt: skip


def test_texts_that_differ_are_called_so(tab: Tab, server: Canned) -> None:
    verdict = side_by_side(tab, server, [round_of([" a"], " b"), round_of([" x"], " d"), end(4, 2)])
    verdict.wait_for()
    assert verdict.text_content() == "Different from token 3 on."


# --- what goes wrong ------------------------------------------------------------------------------


def alert(tab: Tab) -> str:
    found = tab.page.get_by_role("alert")
    found.wait_for()
    return found.text_content()


def test_a_key_is_asked_for(tab: Tab, server: Canned) -> None:
    server.refuse(401, "api key: expected one", of_models=True)
    tab.page.reload()
    tab.page.locator("#model", has_text="wants an API key (401)").wait_for()
    server.refuse(401, "api key: expected one")
    tab.ask("Hello")
    assert "This server wants an API key (401)" in alert(tab)
    tab.page.get_by_role("button", name="To the API key").click()
    tab.page.keyboard.type("secret")
    tab.page.keyboard.press("Tab")
    tab.page.locator("#model", has_text="tiny").wait_for()
    server.stream(*ANSWER)
    tab.page.get_by_role("button", name="Try again").click()
    tab.wait("6 tokens")
    assert server.asked[-1].key == "Bearer secret"
    assert tab.page.get_by_role("alert").count() == 0


def test_a_busy_server_says_when(tab: Tab, server: Canned) -> None:
    server.refuse(503, "too many requests wait", retry_after="3")
    tab.ask("Hello")
    assert "nothing now (503): too many requests wait. Try again in 3 s." in alert(tab)


BROKEN = {
    "an error in the middle": (
        [b'data: {"error": {"message": "the GPU is lost"}}\n\ndata: [DONE]\n\n'],
        "The answer broke off: the GPU is lost",
    ),
    "a connection that is lost": ([Drop()], "The connection was lost."),
    "an end too soon": ([], "The connection ended in the middle of the answer."),
    "no event": ([b"data: {\n\n"], "The server sent what is no event."),
}


def test_what_came_before_an_error_stays(tab: Tab, server: Canned) -> None:
    for name, (steps, words) in BROKEN.items():
        server.stream(opening(), round_of([" four"], " apples"), *steps)
        tab.ask("How many?")
        assert words in alert(tab), name
        assert tab.texts(".text") == [" four apples"], name
        assert "broke off" in tab.page.locator(".numbers").text_content(), name
        server.stream(*ANSWER)
        tab.page.get_by_role("button", name="Try again").click()
        tab.wait("6 tokens")
        assert server.asked[-1].body["messages"] == [{"role": "user", "content": "How many?"}]
        tab.page.get_by_role("button", name="Clear").click()


def test_a_server_that_is_gone(tab: Tab, server: Canned) -> None:
    tab.page.context.set_offline(True)
    tab.ask("Hello")
    assert "The server cannot be reached." in alert(tab)


def test_a_model_that_does_not_chat(tab: Tab, server: Canned) -> None:
    server.refuse(400, "messages: chat messages given, but the tokenizer has no chat template")
    tab.ask("Once")
    alert(tab)
    server.stream(round_of([" a"], " b", raw=True), end(2, 1, raw=True))
    tab.page.get_by_role("button", name="Go on as text").click()
    tab.wait("2 tokens")
    assert server.asked[-1].path == "/v1/completions"
    assert tab.page.get_by_label("Text: goes on").is_checked()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stopping_ends_the_request(tab: Tab, server: Canned, way: str) -> None:
    never = threading.Event()
    server.stream(opening(), round_of([" four"], " apples"), never)
    tab.ask("How many?")
    tab.page.locator(".text", has_text="apples").wait_for()
    if way == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.get_by_role("button", name="Stop").click()
    tab.wait("stopped")
    assert server.asked[0].is_gone.wait(10)
    assert tab.page.get_by_role("alert").count() == 0
    assert tab.page.evaluate("() => document.activeElement.id") == "prompt"
    server.stream(*ANSWER)
    tab.ask("On")
    tab.wait("6 tokens")
    assert server.asked[1].body["messages"][1]["content"] == " four apples"


# --- for everybody --------------------------------------------------------------------------------


def test_the_keyboard_is_enough(tab: Tab, server: Canned) -> None:
    server.stream(*ANSWER)
    page = tab.page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first stop leads to the prompt
    page.keyboard.type("How")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("many?")
    page.keyboard.press("Enter")
    tab.wait("6 tokens")
    assert server.asked[0].body["messages"][0]["content"] == "How\nmany?"
    page.evaluate("() => { document.activeElement.blur(); getSelection().removeAllRanges(); }")
    page.locator("h1").click()
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("() => document.activeElement.id || document.activeElement.className")
        )
        ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert ring != "none", order
    assert order == [
        "talk", "text", "pick", "tree", "prompt", "send", "clear", "compare", "",
    ]  # fmt: skip


def test_the_accessibility_tree(tab: Tab, server: Canned) -> None:
    server.stream(*ANSWER)
    tab.ask("How many?")
    tab.wait("6 tokens")
    snapshot = tab.page.locator("body").aria_snapshot()
    for part in (
        'link "To the prompt"', 'heading "specrt" [level=1]', 'region "Conversation"',
        'group "Answer; arrow keys go through its rounds"', 'heading "Round" [level=2]',
        'slider "Round"', 'img "Round 3 of 3: 2 tokens drafted', 'textbox "Prompt"',
        'button "Send"', 'button "Stop" [disabled]', 'checkbox "Side by side', 'group "Mode"',
        'complementary "Settings"', 'textbox "System prompt"', 'spinbutton "Temperature"',
        'textbox "API key"', "- status",
    ):  # fmt: skip
        assert part in snapshot, part


def test_a_screen_reader_hears_an_answer_once(tab: Tab, server: Canned) -> None:
    tab.page.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => heard.push(document.getElementById("status").textContent))
                .observe(document.getElementById("status"), { childList: true });
        }"""
    )
    server.stream(*(round_of([" a"], " b") for _ in range(200)), end(400, 200))
    tab.ask("Go")
    tab.wait("400 tokens")
    tab.page.locator("#status", has_text="400 tokens").wait_for(state="attached")
    first, *more = tab.page.evaluate("() => heard")
    assert first == "Answering." and len(more) == 1 and more[0].startswith("a b a b")
    # Nothing else is read out as it changes.
    assert tab.page.get_by_role("status").count() == 1
    assert tab.page.locator("[aria-live], [role=log], [role=timer], output").count() == 0


@pytest.mark.parametrize("size", [(640, 400), (320, 640)])
def test_zoom_and_small_windows_lose_nothing(
    tab: Tab, server: Canned, size: tuple[int, int]
) -> None:
    """At 200 % a window of 1280 x 800 has 640 x 400."""
    tab.page.set_viewport_size({"width": size[0], "height": size[1]})
    fast = [round_of([" a"], " b"), round_of([" c"], " d" + "w" * 300), end(4, 2)]
    side_by_side(tab, server, fast).wait_for()
    wide = tab.page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    tab.page.get_by_label("API key").scroll_into_view_if_needed()
    assert tab.page.get_by_label("API key").is_visible()


def test_less_motion_draws_one_tree(tab: Tab, server: Canned) -> None:
    tab.page.emulate_media(reduced_motion="reduce", color_scheme="dark")
    soon, rounds = threading.Event(), [round_of([" a"], " b") for _ in range(25)]
    server.stream(*rounds, soon, *rounds, threading.Event())
    tab.ask("Go")
    tab.page.locator(".text", has_text="b").wait_for()
    soon.set()  # the stream falls silent soon after figures were shown
    tab.page.locator("#count", has_text="100").wait_for()
    assert tab.page.locator("#tree svg").count() == 0
    tab.page.keyboard.press("Escape")
    tab.page.locator("#tree svg").wait_for()
    tab.page.emulate_media(reduced_motion="no-preference", color_scheme="light")


def luminance(colour: str) -> float:
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for signs and rings."""
    blocks = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))
    texts = [
        ("ink", "paper"), ("ink", "panel"), ("ink", "tint"), ("muted", "paper"),
        ("muted", "panel"), ("muted", "tint"), ("paper", "drafted"), ("bad", "bad-tint"),
    ]  # fmt: skip
    signs = [
        (sign, ground)
        for sign in ("drafted", "own", "refused", "focus")
        for ground in ("paper", "panel")
    ] + [("drafted", "tint")]
    for least, pairs in ((4.5, texts), (3.0, signs)):
        for one, other in pairs:
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)


def test_nothing_parses_text_as_html() -> None:
    """The policy forbids it to browsers that know trusted types; the sources to the others."""
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
    )
    for file in FOLDER.glob("*.js"):
        assert not re.search(banned, file.read_text()), file.name
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


# --- the server itself ----------------------------------------------------------------------------


def test_the_server_has_the_page_and_both_sides_agree(browser: Any) -> None:
    with (
        load_small(max_batch=2) as engine,
        running(engine, api_key=["secret"]) as real,
        browser.new_context() as context,
    ):
        context.set_default_timeout(60_000)
        tab = Tab(context.new_page(), real.url)
        tab.open()
        tab.page.locator("#model", has_text="wants an API key").wait_for()
        tab.page.get_by_label("API key").fill("secret")
        tab.page.keyboard.press("Tab")
        tab.page.locator("#model", has_text="tiny · FspadDrafter").wait_for()
        tab.page.get_by_label("Max tokens").fill("40")
        tab.page.get_by_label("Side by side").check()
        tab.ask(QUESTION[0]["content"])
        verdict = tab.page.locator(".verdict", has_text="times as fast")
        verdict.wait_for()
        want = engine.generate(QUESTION, max_new_tokens=40)
        assert f"Equal: all of {len(want.token_ids)} tokens." in verdict.text_content()
        assert tab.page.locator(".answer .text").first.locator(".d, .t").count() > 0
        for side in tab.page.locator(".answer .text").all():
            assert "".join(side.locator(".d, .t").all_text_contents()) == want.text
        tab.page.locator(".answer .text").last.locator(".d").first.hover()
        assert tab.page.locator("#tree circle.accepted").count() > 0
        assert "accepted" in tab.page.locator("#said").text_content()
        tab.check()
