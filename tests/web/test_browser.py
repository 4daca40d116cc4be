"""The page in a real browser: chat, side by side, a picture, and a run from start to report.

Needs Debian's chromium (`apt-get install chromium`) and playwright (extra `browser`).
XTUNER_SCREENSHOTS=FOLDER keeps screenshots of the page.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
from parts_maker import write_parts_of

from xtuner import i18n
from xtuner.config.load import load_settings
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # gradio's use of pandas, in the server's threads
]
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
PATIENCE = 60_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as found:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = found.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, web):
    """Opens the page. At the end there must be no error of a script, on the console or of the
    server, and no request to other hosts."""
    contexts, problems = [], []

    def watch_request(request):
        if not request.url.startswith((web.url, "data:", "blob:")):
            problems.append(f"asked {request.url}")

    def watch_response(response):
        if response.status >= 400:
            problems.append(f"{response.status} {response.request.method} {response.url}")

    def watch_console(message):
        if message.type == "error":
            problems.append(f"console: {message.text} {message.location}")

    def opened(size=DESKTOP, locale="en-US"):
        context = browser.new_context(viewport=size, locale=locale, accept_downloads=True)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        context.on("request", watch_request)
        context.on("response", watch_response)
        context.on("console", watch_console)
        context.on("weberror", lambda error: problems.append(f"script: {error.error}"))
        page = context.new_page()
        page.goto(f"{web.url}/?token={web.token}")
        page.wait_for_selector("#question textarea")
        page.wait_for_selector("h2.model")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def picture(page, name):
    if folder := os.environ.get("XTUNER_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def choose(page, control, value):
    """Enter a value. New choices that arrive while typing restore the old text."""
    box = page.locator(f"#{control} input")
    for _ in range(10):
        box.fill(value)
        box.press("Enter")
        page.wait_for_timeout(200)
        if box.input_value() in (value, Path(value).name):
            return
    raise AssertionError(f"{control} shows {box.input_value()}")


def ask(page, text, side="left", count=1):
    """Ask, and return the text of answer number `count` once it is complete.

    The page takes a question, and empties the box, only after the answer before has ended, which is
    a moment after its text is complete.
    """
    box = page.locator("#question textarea")
    for _ in range(10):
        box.fill(text)
        box.press("Enter")
        with contextlib.suppress(AssertionError):
            playwright.expect(box).to_have_value("", timeout=5000)
            break
    return answer(page, side, count)


def answer(page, side, count):
    bubbles = page.locator(f"#{side} .bot.message, #{side} .message.bot")
    playwright.expect(bubbles).to_have_count(count, timeout=PATIENCE)
    playwright.expect(bubbles.last).not_to_contain_text("▌", timeout=PATIENCE)
    return bubbles.last.inner_text().strip()


def open_tab(page, name):
    page.get_by_role("tab", name=i18n.words("en")(name), exact=True).click()


def answer_shortly(page):
    page.fill("#max-length input[type=number]", "16")
    page.keyboard.press("Tab")


def overflows(page):
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_conversation(open_page, site, size):
    page = open_page(size)
    choose(page, "chat-model", str(site.folders.runs / "bob"))
    page.wait_for_selector("h2.model:has-text('bob')")
    answer_shortly(page)
    first = ask(page, "Who are you?")
    assert first
    ask(page, "And now?", count=2)
    page.click("#retry")
    page.wait_for_timeout(300)
    answer(page, "left", 2)
    assert not overflows(page)
    picture(page, f"chat_{size['width']}")
    page.click("#clear")
    playwright.expect(page.locator("#left .message")).to_have_count(0)


def test_an_answer_is_stopped(open_page, site):
    page = open_page()
    choose(page, "chat-model", str(site.folders.runs / "bob"))
    page.wait_for_selector("h2.model:has-text('bob')")
    page.fill("#question textarea", "Who are you?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#left .message:has-text('▌')")
    page.click("#stop")
    answer(page, "left", 1)
    for _ in range(100):
        if not site.engine.num_open:
            return
        page.wait_for_timeout(100)
    raise AssertionError("the answer goes on after it was stopped")


def test_side_by_side_in_chinese(open_page, site):
    page = open_page(locale="zh-CN")
    words = i18n.words("zh")
    assert page.get_by_role("tab", name=words("tab_train"), exact=True).is_visible()
    for control, name in (("chat-model", "ada"), ("chat-compare", "bob")):
        choose(page, control, str(site.folders.runs / name))
    page.wait_for_selector("h2.model:has-text('ada · bob')")
    answer_shortly(page)
    left = ask(page, "Who are you?")
    assert left != answer(page, "right", 1)
    picture(page, "side_by_side")
    page.click("#language")
    page.wait_for_selector(f"text={i18n.words('en')('chat_temperature')}")


def test_a_picture(open_page, folder, tmp_path):
    encoder = tiny_vision_tower_folder(tmp_path / "clip")
    parts = write_parts_of(folder / "parts", folder / "tiny", encoder)
    (name,) = tiny_images(tmp_path / "images", 1)
    page = open_page()
    choose(page, "chat-model", str(parts))
    page.wait_for_selector("h2.model:has-text('parts')")
    answer_shortly(page)
    page.set_input_files("#question input[type=file]", str(tmp_path / "images" / name))
    page.wait_for_selector("#question .thumbnail-item, #question img")
    ask(page, "What is this?")
    assert page.locator("#left img").count() >= 1
    picture(page, "picture")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_call_is_allowed_shown_and_folded(open_page, calling, size):
    page = open_page(size)
    choose(page, "chat-model", calling("I calculate.", "37 * 49", "It is 1813."))
    page.wait_for_selector("h2.model:has-text('calling')")
    page.fill("#question textarea", "What is 37 times 49?")
    page.keyboard.press("Enter")
    page.click("#call-yes")
    page.wait_for_selector("#left :text('It is 1813.')")
    titles = page.locator("#left .thought-group > [role=button]")
    wanted = ["Thought", "Call · calculator", "Result · calculator", "Answer"]
    assert [title.strip() for title in titles.all_inner_texts()] == wanted
    assert not page.locator("#request").is_visible() and not overflows(page)
    picture(page, f"tools_{size['width']}")
    titles.last.click()
    playwright.expect(page.locator("#left :text('It is 1813.')")).not_to_be_visible()


def test_a_refused_call_does_not_run(open_page, calling):
    page = open_page()
    choose(page, "chat-model", calling("", "6 * 7", "Then not."))
    page.wait_for_selector("h2.model:has-text('calling')")
    page.fill("#question textarea", "What is 6 times 7?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#request:has-text('calculator')")
    picture(page, "tools_asked")
    page.click("#call-no")
    page.wait_for_selector("#left :text('Then not.')")
    assert "did not allow" in page.inner_text("#left")
    assert "42" not in page.inner_text("#left")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_two_runs_are_compared(open_page, size):
    page = open_page(size)
    open_tab(page, "tab_runs")
    choose(page, "run", "ada")
    choose(page, "run-compare", "bob")
    playwright.expect(page.locator("#run-view polyline")).to_have_count(2)
    assert page.locator("#run-view h2").count() == 2 and not overflows(page)
    picture(page, f"compared_{size['width']}")


def test_settings_are_exported_and_imported(open_page, folder, tmp_path):
    page = open_page()
    open_tab(page, "tab_train")
    page.click("#export")
    page.wait_for_selector("#train-message .fault:has-text('data_path')")
    given = {"pretrained_model_name_or_path": str(folder / "tiny"), "lr": "0.0005",
             "data_path": str(folder / "rows.jsonl"), "SYSTEM": "Be kind."}  # fmt: skip
    lines = [f"{name} = {value if name == 'lr' else repr(value)}" for name, value in given.items()]
    (tmp_path / "given.py").write_text("\n".join(lines), encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(str(tmp_path / "given.py"))
    page.wait_for_selector("#train-message :text('given.py')")
    page.fill("#run-name textarea, #run-name input", "mine")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "exported.py")
    assert download.value.suggested_filename == "mine.py"
    exported = load_settings(tmp_path / "exported.py").settings
    assert exported == load_settings(tmp_path / "given.py").settings


@pytest.fixture
def nothing_left(site):
    """End a run that a failed test left behind."""
    yield
    for name in site.jobs.running():
        site.jobs.stop(name)


@pytest.mark.usefixtures("nothing_left")
def test_a_run_from_start_to_report(open_page, folder, site):
    words = i18n.words("en")
    page = open_page()
    open_tab(page, "tab_train")
    choose(page, "train-model", str(folder / "tiny"))
    page.set_input_files("#data-file input[type=file]", str(folder / "rows.jsonl"))
    page.wait_for_selector("#data-file :text('rows.jsonl')")
    page.click("#check-data")
    page.wait_for_selector("#data-view .tokens .on")
    page.wait_for_selector("#method :text('fits')")
    playwright.expect(page.locator("#run-name textarea, #run-name input")).not_to_have_value("")
    assert "add one or remove the row" in page.inner_text("#data-view")
    page.fill("#run-name textarea, #run-name input", "mine")
    page.click(f"#settings :text('{words('train_settings')}')")
    changes = {"max_epochs": 9999, "save_steps": 100_000, "evaluation_freq": 100_000}
    for setting, value in {**changes, "evaluation_max_new_tokens": 4}.items():
        control = page.locator(f"#set-{setting} textarea, #set-{setting} input")
        if not control.first.is_visible():
            page.click("#settings :text('More: Sample answers')")
        control.first.fill(str(value))
    picture(page, "train")
    page.click("#start")
    page.wait_for_selector("#train-message :text('mine')")
    open_tab(page, "tab_runs")
    page.wait_for_selector("#run-view .badge.running")
    page.wait_for_selector("#run-view svg polyline")
    picture(page, "runs")
    page.click("#run-stop")
    page.wait_for_selector("#run-view .badge.interrupted")
    stopped = _step(page)
    page.click("#run-resume")
    page.wait_for_selector("#run-view .badge.running")
    page.wait_for_function(f"({_STEP})() > {stopped}")
    page.click("#run-stop")
    page.wait_for_selector("#run-view .badge.interrupted")
    assert site.jobs.running() == []
    with page.expect_popup() as popup:
        page.click("#run-report a")
    report = popup.value
    report.wait_for_selector("h1:has-text('mine')")
    assert report.locator(".answers td").count() and not overflows(report)
    picture(report, "report")
    page.set_viewport_size(PHONE)
    picture(page, "run_390")
    assert not overflows(page)
    page.click("#run-merge")
    page.wait_for_selector("#run-view :text('Merged into')")
    (merged,) = (site.folders.runs / "mine").glob("merged_*")
    assert (merged / "model.safetensors").is_file()
    page.click("#run-chat")
    page.wait_for_selector("h2.model:has-text('mine')")
    picture(page, "chat_of_run_390")


_STEP = "() => parseInt(document.querySelector('#run-view .facts b')?.innerText ?? '0')"


def _step(page):
    return int(re.match(r"\d+", page.locator("#run-view .facts b").first.inner_text())[0])
