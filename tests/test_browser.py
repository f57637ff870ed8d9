"""TensorBoard over two finished runs, in a real browser: what its tabs say they show is really on the page."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

from common.cli import RUNTIME_FLAGS

import pytest
from conftest import load_recipe, smoke_config, smoke_data
from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here; on Debian: apt install chromium"),
]
RUNS = ("cifar10_cnn/one", "mnist_cnn/two")
# Charts as they are: not smoothed, nothing cut off, no panels over them. TensorBoard keeps such choices in the browser.
SETTINGS = """try {
    localStorage.setItem('_tb_global_settings', JSON.stringify(
        {scalarSmoothing: 0, ignoreOutliers: false, timeSeriesSettingsPaneOpened: false, theme: 'light'}));
    localStorage.setItem('_ignoreYOutliers', 'false');
    localStorage.setItem('TF.TensorBoard.PaginatedView.limit', '100');
} catch (error) {}"""


@contextlib.contextmanager
def serve(folder: pathlib.Path) -> Iterator[str]:
    """Gives the address of a TensorBoard on loopback. It chooses its port and prints it in its first lines."""
    program = shutil.which("tensorboard", path=pathlib.Path(sys.executable).parent)
    command = [program, "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        announced = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stderr)
        found = next(filter(None, announced), None)
        # A full pipe would block the server.
        rest = threading.Thread(target=lambda: [None for _ in server.stderr])
        rest.start()
        try:
            yield found[0]
        finally:
            server.kill()
            rest.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    for name in RUNS:
        recipe = load_recipe(name.split("/")[0])
        recipe.train(smoke_config(recipe, folder / name, epochs=2))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with serve(folder) as address:
        yield address


@pytest.fixture(scope="module")
def page():
    """A page that may only talk to loopback and throws no error."""
    expect.set_options(timeout=30_000)
    trouble = []
    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=CHROMIUM)) as browser,
    ):
        context = browser.new_context(viewport={"width": 1600, "height": 1000}, color_scheme="light")
        context.add_init_script(SETTINGS)

        def only_loopback(route):
            if route.request.url.startswith("http://127.0.0.1:"):
                return route.continue_()
            trouble.append(route.request.url)
            return route.abort()

        context.route("**/*", only_loopback)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        yield page
    assert not trouble


@pytest.fixture
def screenshot(page, tmp_path):
    """Takes a picture of the page; into the folder SCREENSHOTS if that is set."""

    def take(name: str) -> None:
        page.mouse.move(5, 5)
        page.wait_for_timeout(700)
        path = pathlib.Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"tensorboard-{name}.png"
        page.screenshot(path=path, animations="disabled")
        assert path.stat().st_size > 20_000

    return take


def open_tab(page: Page, address: str, fragment: str) -> Locator:
    """Opens a tab afresh and gives the group of all tags that match its filter."""
    page.goto("about:blank")  # With a new fragment alone, the old page would stay.
    page.goto(f"{address}#{fragment}")
    return page.locator("tf-category-paginated-view").first


def exactly(text: str) -> re.Pattern:
    return re.compile(rf"^\s*{re.escape(text)}\s*$")


def chart(page: Page, address: str, tag: str) -> Locator:
    """Opens the tab with the chart of one tag and gives its lines."""
    card = open_tab(page, address, f"scalars&_smoothingWeight=0&tagFilter=^{tag}$").locator("tf-scalar-card")
    expect(card.locator(".heading-label.name").filter(has_text=exactly(tag))).to_be_visible()
    return card.locator(".line-plot:not(.ghost) .render-area path[d^=M]")


@pytest.mark.parametrize("tag", ["train/loss", "validation/accuracy", "train/learning_rate"])
def test_scalars(page, address, tag):
    expect(chart(page, address, tag)).to_have_count(2)


def test_train_and_validation_in_one_chart(page, address, screenshot):
    page.goto("about:blank")
    page.goto(f"{address}#custom_scalars&_smoothingWeight=0")
    cards = page.locator("tf-custom-scalar-card-style, tf-custom-scalar-multi-line-chart-card")
    expect(cards).to_have_count(2)  # Loss and accuracy.
    for number in range(2):
        lines = cards.nth(number).locator(".line-plot:not(.ghost) .render-area path[d^=M]")
        expect(lines).to_have_count(4)  # Train and validation of two runs.
    screenshot("scalars")


def test_thirty_trainings_are_shown_at_once(page, folder, tmp_path, screenshot):
    """TensorBoard begins with an empty page if there are more than 40 runs."""
    for number in range(30):
        shutil.copytree(folder / RUNS[number % 2] / "tensorboard", tmp_path / "many" / str(number) / "tensorboard")
    with serve(tmp_path / "many") as address:
        page.goto(address)
        expect(page.locator("runs-data-table tb-data-table-content-row")).to_have_count(30)
        expect(page.locator("card-view").first).to_be_visible()
        screenshot("thirty")
        expect(chart(page, address, "train/loss")).to_have_count(30)


def test_images(page, address, screenshot):
    cards = open_tab(page, address, "images&tagFilter=.*").locator("tf-image-loader")
    for tag in ("examples", "examples_augmented", "confusion_matrix", "learning_curves", "worst_mistakes"):
        pictures = cards.filter(has=page.locator(".heading-label.name", has_text=exactly(tag))).locator("img")
        expect(pictures).to_have_count(2)
        for picture in pictures.element_handles():
            page.wait_for_function("image => image.complete && image.naturalWidth > 200", arg=picture)
    screenshot("images")


def test_text(page, address, screenshot):
    cards = open_tab(page, address, "text&tagFilter=^run_card$").locator("tf-markdown-view:visible #markdown")
    for words in ('"name": "drawn shapes"', '"epochs": 2', '"keras": "3.', '"command": "python '):
        expect(cards.filter(has_text=words).first).to_be_visible()
    screenshot("text")


def test_graphs(page, address, screenshot):
    # Until its first answer has come, TensorBoard may still replace what is chosen.
    with page.expect_response(re.compile(r"/data/plugin/graphs/graph\?")):
        open_tab(page, address, "graphs")
    menu = page.locator("tf-graph-controls paper-dropdown-menu").first
    run = f"{RUNS[1]}/tensorboard"
    if menu.locator("input").input_value() != run:
        menu.locator("paper-item", has_text=exactly(run)).dispatch_event("click")
    expect(menu.locator("input")).to_have_value(run)
    page.locator("paper-radio-button[name=conceptual_graph]").click()
    page.locator("tf-graph-scene g.node").first.dblclick()  # The model is one node that opens.
    for layer in ("rescaling", "conv2d", "max_pooling2d", "dense"):
        expect(page.locator("tf-graph-scene text.nodelabel").filter(has_text=layer)).not_to_have_count(0)
    assert page.locator("tf-graph-scene path.edgeline").count() > 5
    screenshot("graphs")


# The grid's cells do not stand in the document in the order they are seen in.
GRID = """grid => [...grid.shadowRoot.querySelectorAll('#header tr, #items tr')]
    .filter(row => !row.hidden && row.getBoundingClientRect().height)
    .map(row => [...row.querySelectorAll('th, td')]
        .filter(cell => cell.querySelector('slot') && cell.getBoundingClientRect().width)
        .sort((one, other) => one.getBoundingClientRect().left - other.getBoundingClientRect().left)
        .map(cell => cell.querySelector('slot').assignedNodes().map(node => node.innerText).join('').trim()))"""


def test_hparams_hold_all_runs_in_one_table(page, address, screenshot):
    """All settings that differ are listed first; the table begins with five of them and test metrics."""
    configs = []
    for name in RUNS:
        module = load_recipe(name.split("/")[0])
        settings = dataclasses.asdict(smoke_config(module, ""))
        configs.append({**settings, "data": smoke_data(module.__name__).name, "recipe": module.__name__})
    one, other = configs
    differ = sorted(name for name in (one.keys() & other.keys()) - RUNTIME_FLAGS if one[name] != other[name])
    page.set_viewport_size({"width": 2400, "height": 600})
    open_tab(page, address, "hparams")
    grid = page.locator("tf-hparams-table-view vaadin-grid")
    expect(grid).to_be_visible()
    for _ in range(100):  # The grid fills itself step by step.
        header, *rows = grid.evaluate(GRID)
        table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        if set(table) >= set(RUNS) and all(table[run].get("test/accuracy") for run in RUNS):
            break
        page.wait_for_timeout(200)
    assert set(differ[:5]) <= set(header), header
    for run, config in zip(RUNS, configs, strict=True):
        assert 0 < float(table[run]["test/accuracy"]) <= 1
        for name in differ[:5]:
            shown = table[run][name]
            assert shown == str(config[name]) or float(shown) == pytest.approx(config[name]), (name, shown)
    listed = page.locator("tf-hparams-query-pane .hparam-checkbox")
    assert sorted(text.strip() for text in listed.all_inner_texts()[: len(differ)]) == differ
    screenshot("hparams")
    page.set_viewport_size({"width": 1600, "height": 1000})
