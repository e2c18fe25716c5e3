"""The page of image search in a real browser: nothing that it shows moves, and it asks no other host."""

import base64
import csv
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest


pytest.importorskip("playwright", reason="pip install playwright")
pytest.importorskip("pathspec")
pytest.importorskip("uvicorn")
from playwright import sync_api as playwright
from serve_utils import build_index, serving

from hfclip.search import ImageIndex
from hfclip.search.serve import create_app


playwright.expect.set_options(timeout=60_000)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync"]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt install chromium")]
NOTE_SHIFTS = """
    window.shifts = [];
    const note = (list) => {
        for (const { hadRecentInput, sources } of list.getEntries())
            if (!hadRecentInput) shifts.push(...sources.map(({ node }) => node?.id || node?.outerHTML || String(node)));
    };
    new PerformanceObserver(note).observe({ type: "layout-shift", buffered: true });
"""
FILE = """([data, type]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "image", { type }));
    return transfer;
}"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(tmp_path_factory.mktemp("page"), 150)


@pytest.fixture(scope="module")
def address(index):
    with serving(create_app(index, hosts={"127.0.0.1"})) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        flags = [f"--{flag}" for flag in FLAGS]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """Serves an index until its pages are closed."""
    with ExitStack() as stack:
        yield lambda index: stack.enter_context(serving(create_app(index)))


@pytest.fixture
def visit(browser, address, serve):
    """Opens a page; at the end, nothing was logged, no other host was asked, and nothing has moved by itself."""
    pages, problems = [], []

    def visit(path: str = "/", width: int = 1280, origin: str = address, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, base_url=origin, **options)
        context.set_default_timeout(60_000)
        context.add_init_script(NOTE_SHIFTS)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith((origin, "blob:")) or problems.append(request.url))
        page.goto(path)
        pages.append(page)
        return page

    yield visit
    problems += [f"moved: {node}" for page in pages for node in page.evaluate("window.shifts")]
    for page in pages:
        page.context.close()
    assert problems == []


IDS = "[...document.querySelectorAll('#grid a')].map((link) => Number(link.getAttribute('href').split('=')[1]))"


def shown(page) -> list[int]:
    """Ids of the images that are shown."""
    return page.evaluate(IDS)


def wait_for(page, expression: str) -> None:
    """Waits until an expression holds. Playwright's own function for it needs `eval`, which the page forbids."""
    for _ in range(1600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(expression)


def expect(page, hits) -> None:
    """Waits until the first images are `hits`."""
    first = [hit.id for hit in hits]
    wait_for(page, f"String({IDS}.slice(0, {len(first)})) === String({first})")


def test_typing_shows_what_the_index_finds_and_back_returns(visit, index):
    page = visit()
    playwright.expect(page.locator("#welcome h1")).to_have_text("Search 150 images")
    latest = shown(page)
    page.locator("#query").press_sequentially("large cat", delay=5)
    found = index.search("large cat", top_k=20)
    expect(page, found.hits)
    assert page.url.endswith("/?q=large+cat")
    strong = page.locator(".score.strong").count()
    assert strong == min(found.strong, 60)
    assert f"{found.strong} strong match" in page.locator("#head").inner_text()
    page.locator("#query").press("Enter")
    page.locator("#query").fill("small dog")
    expect(page, index.search("small dog", top_k=20).hits)
    page.go_back()
    expect(page, found.hits)
    assert page.locator("#query").input_value() == "large cat"
    page.go_back()
    page.wait_for_selector("#welcome:not([hidden])")
    assert shown(page)[: len(latest)] == latest


def test_chips_change_the_terms(visit, index):
    page = visit("/?q=red+%2B+2%3Ablue+-+dog")
    chips = page.locator(".chip")
    playwright.expect(chips).to_have_count(3)
    assert [text.split() for text in chips.all_inner_texts()] == [["red", "×1"], ["blue", "×2"], ["dog", "×1"]]
    page.get_by_role("button", name="Add dog").click()
    playwright.expect(page.locator("#query")).to_have_value("red + 2:blue + dog")
    page.get_by_role("button", name="Weight of blue").click()
    playwright.expect(page.locator("#query")).to_have_value("red + 3:blue + dog")
    page.get_by_role("button", name="Remove red").click()
    playwright.expect(page.locator("#query")).to_have_value("3:blue + dog")
    expect(page, index.search("3:blue + dog", top_k=20).hits)
    page.locator(".tile").nth(4).hover()
    page.get_by_role("button", name="Less like").click()
    playwright.expect(page.locator(".chip.minus img")).to_be_visible()
    assert "like=-0.5%3A" in page.url


def test_images_are_dropped_pasted_and_chosen(visit, index):
    page = visit()
    for number, event in ((3, "drop"), (17, "paste"), (29, "choose")):
        path = Path(index.get(number).path)
        if event == "choose":
            page.locator("#upload input").set_input_files(path)
        else:
            transfer = page.evaluate_handle(FILE, [base64.b64encode(path.read_bytes()).decode(), "image/png"])
            if event == "drop":
                page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
                playwright.expect(page.locator("#drop")).to_be_visible()
                page.dispatch_event("body", "drop", {"dataTransfer": transfer})
            else:
                paste = "(body, data) => body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))"
                page.locator("body").evaluate(paste, transfer)
        page.wait_for_selector(f"#grid li:first-child a[href='/?like={number}']")
        playwright.expect(page.locator("#drop")).to_be_hidden()
        playwright.expect(page.locator(".chip img")).to_be_visible()
    page.locator("#query").fill("red")  # added to the image
    playwright.expect(page.locator(".chip")).to_have_count(2)


def test_scrolling_brings_all_and_back_returns_to_the_place(visit):
    page = visit("/?q=red")
    page.wait_for_selector(".tile")
    for _ in range(20):
        page.mouse.wheel(0, 3000)
        if page.locator(".tile").count() == 150:
            break
        page.wait_for_timeout(100)
    assert len({*shown(page)}) == 150
    page.locator(".tile").last.scroll_into_view_if_needed()
    place = page.evaluate("scrollY")
    page.locator(".tile a").last.click()
    page.wait_for_url("**/?like=*")
    wait_for(page, "scrollY === 0")
    page.go_back()
    wait_for(page, f"Math.abs(scrollY - {place}) < 2")
    assert page.locator(".tile").count() == 150


def test_rows_fill_the_width_and_keep_their_place(visit):
    page = visit(width=1111)
    page.wait_for_selector(".tile")
    for width in (1111, 500):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(100)
        edges = page.evaluate("""() => {
            const rows = {}, {right} = document.getElementById("grid").getBoundingClientRect();
            for (const tile of document.querySelectorAll(".tile:not([hidden])")) {
                const box = tile.getBoundingClientRect();
                rows[box.top] = Math.max(rows[box.top] ?? 0, box.right);
            }
            return Object.values(rows).map((edge) => right - edge);
        }""")
        assert len(edges) > 4 and all(-0.01 < edge < 1.5 for edge in edges[1:-1])


def test_keys_reach_everything(visit, index):
    page = visit("/?q=red")
    page.wait_for_selector(".tile")
    ids = shown(page)
    press = page.keyboard.press
    focused = "document.activeElement.getAttribute('href')"
    press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    for key, expected in (("ArrowDown", ids[0]), ("ArrowRight", ids[1]), ("End", ids[-1]), ("Home", ids[0])):
        press(key)
        if key != "End":  # of those that are loaded by then
            assert page.evaluate(focused) == f"/?like={expected}"
    press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().top")
    press("ArrowUp")
    assert page.evaluate(focused) == f"/?like={ids[0]}"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") < below
    press(" ")
    playwright.expect(page.locator("#viewer img")).to_be_visible()
    press("ArrowRight")
    playwright.expect(page.locator("#viewer h2")).to_have_text(os.path.basename(index.get(ids[1]).path))
    press("Escape")
    playwright.expect(page.locator("#viewer")).to_be_hidden()
    wait_for(page, f"{focused} === '/?like={ids[1]}'")
    press("Enter")
    page.wait_for_url(f"**/?like={ids[1]}")
    page.wait_for_selector(f"#grid li:first-child a[href='/?like={ids[1]}']")
    press("Escape")
    assert page.evaluate("document.activeElement.id") == "query"


def test_viewer_shows_the_original_copies_its_path_and_ends_with_back(visit, index):
    page = visit("/?q=red", permissions=["clipboard-read", "clipboard-write"])
    first = index.search("red", top_k=1).hits[0]
    page.locator(".tile").first.hover()
    page.get_by_role("button", name="Open ").click()
    playwright.expect(page.locator("#viewer dl")).to_contain_text(first.path)
    assert page.locator("#viewer img").get_attribute("src") == f"/image/{first.id}"
    page.get_by_role("button", name="Copy path").click()
    assert page.evaluate("navigator.clipboard.readText()") == first.path
    with page.expect_download() as download:
        page.locator("#viewer").get_by_text("Download").click()
    assert Path(download.value.path()).read_bytes() == Path(first.path).read_bytes()
    page.go_back()
    playwright.expect(page.locator("#viewer")).to_be_hidden()
    assert page.url.endswith("/?q=red")


def test_list_of_what_was_found_is_downloaded(visit, index):
    page = visit("/?q=red+%2B+large")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download list").click()
    assert download.value.suggested_filename == "red-large.csv"
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    hits = index.search("red + large", top_k=len(rows)).hits
    assert [row["path"] for row in rows] == [hit.path for hit in hits] and len(rows) >= 60


def test_filters_and_what_is_said_when_nothing_is_left(visit, index):
    page = visit("/?q=red")
    page.locator("#filters summary").click()
    page.get_by_label("Folder").fill("winter")
    page.get_by_label("Folder").press("Enter")
    page.wait_for_url("**folder=winter")
    expect(page, index.search("red", top_k=20, where="folder=winter").hits)
    page.get_by_label("From").fill("2100-01-01")
    playwright.expect(page.locator("#notice")).to_contain_text("No image in this folder and time.")
    page.locator("#notice button").click()
    expect(page, index.search("red", top_k=20).hits)


def test_faults_and_an_index_in_the_making_are_told(browser, tmp_path):
    index = build_index(tmp_path, 2)
    with serving(create_app(index)) as address, browser.new_context(base_url=address) as context:
        page = context.new_page()
        with index.store.locked():
            index.store.tell_progress(3, 10)
            page.goto("/")
            playwright.expect(page.locator("#indexing")).to_have_text("Indexing 3 of 10 images")
        playwright.expect(page.locator("#indexing")).to_be_hidden()
        page.locator("#query").fill("red +")
        playwright.expect(page.locator("#notice")).to_contain_text("expected words")
        page.route("**/api/search*", lambda route: route.abort())
        page.locator("#query").fill("blue")
        playwright.expect(page.locator("#notice")).to_contain_text("The server does not answer.")
        page.unroute("**/api/search*")
        page.get_by_role("button", name="Try again").click()
        page.wait_for_selector(".tile")
        playwright.expect(page.locator("#notice")).to_be_hidden()
        transfer = page.evaluate_handle(FILE, [base64.b64encode(b"<svg/>").decode(), "image/svg+xml"])
        page.dispatch_event("body", "drop", {"dataTransfer": transfer})
        playwright.expect(page.locator("#notice")).to_contain_text("found no image")


def test_empty_index_says_what_to_do(visit, serve, tmp_path):
    index = build_index(tmp_path, 1)
    next((tmp_path / "photos").rglob("*.png")).unlink()
    index.update()
    page = visit(origin=serve(index))
    playwright.expect(page.locator("#notice")).to_contain_text("hfclip index FOLDER")


def test_phone_and_dark_mode(visit):
    page = visit("/?q=red+-+a+large+cat", width=390, color_scheme="dark", has_touch=True, is_mobile=True)
    page.wait_for_selector(".tile")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 60
    page.locator("[data-do=open]").first.tap()
    playwright.expect(page.locator("#viewer")).to_be_visible()
    for button in page.locator("#viewer .actions > *").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 800
    page.get_by_role("button", name="Similar images").tap()
    page.wait_for_url("**/?like=*")


def test_images_have_names_and_motion_can_be_turned_off(visit):
    page = visit("/?q=red", reduced_motion="reduce")
    page.wait_for_selector(".tile")
    assert page.locator("#grid img").first.get_attribute("alt").startswith("photo ")
    assert (
        page.evaluate("document.querySelectorAll('img:not([alt]), button:not([hidden] *, [aria-label]):empty').length")
        == 0
    )
    durations = page.evaluate("document.getAnimations().map((one) => one.effect.getTiming().duration)")
    assert all(duration < 1 for duration in durations)
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.skipif(
    "HFCLIP_EMOJI_MODEL" not in os.environ, reason="needs HFCLIP_EMOJI_MODEL, a model trained on emoji"
)
def test_penguin_is_found_among_emoji(visit, serve, data_dir, tmp_path):
    from hfclip.data.sources import open_source

    source = open_source(str(data_dir / "emoji" / "train"))
    (tmp_path / "emoji").mkdir()
    for number in range(len(source)):
        image, (name, *_), *_ = source[number]
        if number % 8 == 0 or name == "penguin":
            (tmp_path / "emoji" / f"{name.replace('/', ' ')} {number}.webp").write_bytes(image)
    index = ImageIndex.build(tmp_path / "emoji", os.environ["HFCLIP_EMOJI_MODEL"], store=tmp_path / "store")
    page = visit(origin=serve(index))
    page.locator("#query").press_sequentially("penguin", delay=20)
    page.wait_for_selector(".score.strong")
    assert page.locator("#grid img").first.get_attribute("alt").startswith("penguin")
