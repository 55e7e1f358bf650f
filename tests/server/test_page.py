"""The page in a real browser: send, stream, stop, look at tokens and at the engine."""

import asyncio
import pathlib
import re
import shutil
import threading

import pytest

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from server.routes.status import MAP_LETTERS
from tests.server.fakes import MODEL

WEB = pathlib.Path(__file__).parents[2] / "server" / "web"
SECONDS = 20
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.set_window_size(1280, 800)
        browser.get(url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(url)
        self.wait_for(lambda: self.text("#model") == MODEL)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text

    def wait_for(self, condition):
        WebDriverWait(self.browser, SECONDS, 0.05).until(lambda _: condition())

    def send(self, text):
        self.find("#message").send_keys(text, Keys.ENTER)

    def wait_for_end(self):
        self.wait_for(lambda: self.text(".turn:last-child .note") != "")

    def errors(self):
        severe = [e for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]
        return [entry["message"] for entry in severe]


@pytest.fixture
def visit(serve, browser):
    """Runs `steps(page, running)` in a thread beside the server."""

    def visit(steps, *arguments, **keywords):
        async def body(running):
            def go():
                steps(Page(browser, running.url), running)

            await asyncio.to_thread(go)

        serve(body, *arguments, **keywords)

    return visit


def test_answer_streams_and_the_next_turn_knows_it(visit):
    def steps(page, running):
        page.send("hi")
        page.wait_for_end()
        assert page.text(".turn.assistant .text") == "hello world"
        assert page.text(".turn:last-child .note") == "stop · 12 tokens"
        page.send("again")
        page.wait_for(lambda: len(page.all(".turn.assistant")) == 2)
        page.wait_for_end()
        prompt = bytes(t for t in running.engine.added[-1].prompt_token_ids if t < 256)
        assert b"user: hi\nassistant: hello world\nuser: again" in prompt
        assert not page.errors()

    visit(steps)


def test_hovering_a_token_shows_its_rivals(visit):
    def steps(page, _):
        page.send("hi")
        page.wait_for_end()
        tokens = page.all(".token")
        assert [token.text for token in tokens[:3]] == ["h", "e", "l"]
        ActionChains(page.browser).move_to_element(tokens[1]).perform()
        page.wait_for(lambda: page.find("#tip").is_displayed())
        rows = page.text("#tip").splitlines()
        assert rows[0].split() == ["e", "-0.50", "60.7", "%"]
        assert len(rows) == 6
        page.find("#log").send_keys(Keys.ARROW_RIGHT)
        page.wait_for(lambda: page.text("#tip").startswith("h "))

    visit(steps)


def test_model_output_is_never_html(visit):
    attack = "<img src=x onerror=document.title=1><b>x</b>"

    def steps(page, _):
        page.send("hi")
        page.wait_for_end()
        assert page.text(".turn.assistant .text") == attack
        assert not page.all(".turn img, .turn b")
        assert page.browser.title == "jllm"

    visit(steps, attack)


def test_escape_stops_and_the_request_ends(visit):
    gate = threading.Event()

    def hold(engine):
        if engine.num_steps > 3:
            gate.wait(SECONDS)

    def steps(page, running):
        running.engine.on_step = hold
        page.send("hi")
        page.wait_for(lambda: page.text(".turn.assistant .text") != "")
        assert page.find("#stop").is_enabled()
        page.find("#message").send_keys(Keys.ESCAPE)
        page.wait_for_end()
        gate.set()
        assert page.text(".turn:last-child .note") == "stopped"
        page.wait_for(lambda: running.engine.aborted)
        assert page.find("#send").is_enabled()

    visit(steps)


def test_settings_reach_the_request_and_survive_a_reload(visit):
    def steps(page, running):
        page.find("[name=temperature]").send_keys("0.3")
        page.find("[name=max_tokens]").send_keys("5")
        page.find("[name=seed]").send_keys("7")
        page.find("[name=stop]").send_keys("zz")
        page.find("[name=mode][value=completion]").click()
        page.send("tell")
        page.wait_for_end()
        assert page.text(".turn.assistant .text") == "hello"
        params = running.engine.added[-1].params
        assert (params.temperature, params.max_tokens, params.seed) == (0.3, 5, 7)
        assert params.stop == ("zz",)
        page.browser.refresh()
        page.wait_for(lambda: page.text("#model") == MODEL)
        field = page.find("[name=temperature]")
        assert field.get_property("value") == "0.3"

    visit(steps)


def test_an_error_of_the_server_is_shown(visit):
    def steps(page, running):
        page.send("too long " * 20)
        page.wait_for_end()
        assert "128" in page.text(".turn:last-child .note")
        assert not running.engine.added

    visit(steps)


def test_a_key_is_asked_for_and_used(serve, browser):
    async def body(running):
        def go():
            browser.get(running.url)
            browser.execute_script("localStorage.clear(); sessionStorage.clear()")
            browser.get(running.url)
            wait = WebDriverWait(browser, SECONDS, 0.05)
            label = browser.find_element(By.ID, "model")
            wait.until(lambda _: "key" in label.text.lower())
            field = browser.find_element(By.CSS_SELECTOR, "[name=key]")
            field.send_keys("secret", Keys.TAB)
            wait.until(lambda _: label.text == MODEL)

        await asyncio.to_thread(go)

    serve(body, api_key=("secret",))


def test_the_engine_view_moves(visit):
    def steps(page, _):
        page.wait_for(lambda: page.text("#engine-status") == "ready")
        page.send("hi")
        page.wait_for_end()
        page.wait_for(lambda: page.text("#figure-ttft").endswith("ms"))
        page.wait_for(lambda: float(page.text("#figure-rate")) > 0)

    visit(steps)


def test_the_map_knows_every_kind_of_block():
    text = (WEB / "engine.js").read_text()
    kinds = re.search(r"const KINDS = {(.*?)}", text)[1]
    assert set(re.findall(r'(\w): "', kinds)) == set(MAP_LETTERS.values())


def test_small_screens_show_one_view_at_a_time(visit):
    def steps(page, _):
        page.browser.set_window_size(500, 800)
        for view in ("engine", "settings", "chat"):
            page.find(f"[data-view={view}]").click()
            shown = [
                s.get_attribute("id")
                for s in page.all("main > section")
                if s.is_displayed()
            ]
            assert shown == [view]
        width = page.browser.execute_script("return document.body.scrollWidth")
        assert width <= page.browser.execute_script("return innerWidth")

    visit(steps)


def test_nothing_comes_from_outside():
    for file in WEB.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text
