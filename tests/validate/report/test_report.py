"""The report: every number on the page is in the JSON beside it, and a real browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fna.cli import main
from fna.validate.budget.measure import Outputs
from fna.validate.report.document import Document
from fna.validate.report.page import look_up, render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Digits in the page's own words and in names, not measurements.
WORDS = re.compile(r"L2|fp32|fp16|bf16|int8|top-\d|recall@\d+|5th perc|1 - cosine")


class Page(HTMLParser):
    """Collects the numbers that say where they come from, other text, pictures and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.other: list[str] = []
        self.images: list[dict] = []
        self.charts: list[dict] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self._open: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.images.append(given)
        if tag == "svg":
            self.charts.append(given)
        if tag == "a":
            self.anchors.append(given["href"])
        if tag not in ("meta", "link", "img", "br", "use", "path"):
            self._open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if {"style", "svg", "title"} & set(tags):
            return
        given = self._open[-1][1] if self._open else {}
        if "data-path" in given:
            self.numbers.append((given["data-path"], given["data-format"], data))
        elif "data-text" in given:
            self.texts.append((given["data-text"], data))
        elif data.strip():
            self.other.append(data.strip())


@pytest.fixture(scope="module")
def report(tiny_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, of the tiny model in fp16."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_files.folder)
        patch.setattr("fna.validate.task.measure.DIGITS", 60)
        patch.setattr("fna.validate.bench.models.QUICK_RUNS", 1)
        path = folder / "files" / "report.html"  # in the folder that the command makes
        code = main(
            ["validate", "fp16.onnx", "--images", "images", "--bisect", "--task", "--bench", "quick", "--report", str(path),
             "--output", str(folder / "files"), "--quiet"]
        )  # fmt: skip
    assert code == 0
    return path


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(report: Path) -> dict:
    return json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))


def test_every_number_on_the_page_is_the_jsons(page: Page, data: dict) -> None:
    assert len(page.numbers) > 150
    for path, style, shown in page.numbers:
        value = look_up(data, path)
        assert shown == ("–" if value is None else format(value, style)), path


def test_every_name_on_the_page_is_the_jsons(page: Page, data: dict) -> None:
    assert len(page.texts) > 20
    for path, shown in page.texts:
        assert shown == str(look_up(data, path)), path


def test_no_other_text_has_numbers_that_the_json_lacks(page: Page, data: dict) -> None:
    strings = collect_strings(data)
    for text in page.other:
        rest = WORDS.sub("", text)
        for name in strings:
            rest = rest.replace(name, "")
        assert not re.search(r"\d", rest), text


def collect_strings(value) -> list[str]:
    if isinstance(value, dict):
        found = [item for key, entry in value.items() for item in (key, *collect_strings(entry))]
    elif isinstance(value, list):
        found = [item for entry in value for item in collect_strings(entry)]
    else:
        found = [value] if isinstance(value, str) else []
    return sorted({text for text in found if re.search(r"\d", text)}, key=len, reverse=True)


def test_the_page_has_every_section_and_its_contents_lead_there(page: Page) -> None:
    assert page.anchors == [f"#{name}" for name in ("budget", "blocks", "images", "task", "bench", "plan", "reproduce")]
    assert {anchor.lstrip("#") for anchor in page.anchors} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_pictures_and_charts_say_what_they_show(page: Page) -> None:
    assert len(page.images) >= 2 * 4
    assert all(len(image["alt"]) > 10 for image in page.images)
    assert len(page.charts) == 5
    assert all(len(chart["aria-label"]) > 10 for chart in page.charts)
    assert any("landmark tokens drawn" in image["alt"] for image in page.images)


def test_the_page_needs_no_network(page: Page, report: Path) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", report.read_text(encoding="utf-8"))


def test_the_json_holds_what_the_page_was_made_of(data: dict) -> None:
    assert [step["step"] for step in data["validation"]["steps"]] == ["approximation", "export", "precision"]
    assert data["command"].startswith("fna ")
    assert {"torch", "onnxruntime", "fna"} <= set(data["versions"])
    assert len(data["validation"]["steps"][0]["errors"][0]["tokens"]["relative_l2"]) == 65


PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  document.body.dataset.probe = JSON.stringify({
    broken: [...document.images].filter(image => !image.complete || image.naturalWidth < 20).map(image => image.alt),
    images: document.images.length,
    flat: [...document.querySelectorAll("svg.chart")].filter(chart => chart.getBoundingClientRect().height < 80).length,
    width: innerWidth, overflow: root.scrollWidth - innerWidth,
    small: [...document.querySelectorAll("svg.chart text")].filter(text => text.getBoundingClientRect().height < 8).length,
  });
});</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (tests/install_programs.sh)")
    return found


A4 = 703
"""Pixels between the margins of the narrowest paper that people print on."""


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("light", 390), ("dark", 1280), ("dark", 390), ("print", A4)]
)
def test_a_browser_shows_it(browser: str, report: Path, page: Page, tmp_path: Path, width: int, scheme: str) -> None:
    """In a frame of the width wanted: a window cannot be as narrow as a phone everywhere."""
    text = report.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    if scheme == "dark":
        text = text.replace("(prefers-color-scheme: dark)", "all")
    if scheme == "print":
        text = text.replace("@media print", "@media all")
    (tmp_path / "inner.html").write_text(text, encoding="utf-8")
    relay = 'document.body.dataset.inner = frames[0].document.body.dataset.probe || "{}"'
    outer = f"<body><iframe src=inner.html width={width} height=1000 onload='setTimeout(() => {{ {relay} }}, 300)'></iframe></body>"
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    done = run_browser(
        browser, tmp_path, "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,1200",
        "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "outer.html").as_uri(),
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    match = re.search(r'data-inner="([^"]*)"', done.stdout)
    assert match is not None, done.stdout[-2000:]
    seen = json.loads(match[1].replace("&quot;", '"'))
    assert seen["width"] in (width, width - 15)  # less a scroll bar
    assert seen["images"] == len(page.images)
    assert (seen["broken"], seen["flat"], seen["small"]) == ([], 0, 0)
    assert seen["overflow"] <= 0


def run_browser(browser: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command = [browser, *flags, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_it_prints_on_a_few_pages(browser: str, report: Path, tmp_path: Path) -> None:
    """Charts that were taken for unbreakable wholes, or images at full size, would make it many."""
    pdf = tmp_path / "report.pdf"
    run_browser(browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", report.as_uri())
    pages = re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())
    assert 3 <= len(pages) <= 6


def test_print_keeps_what_backgrounds_say(report: Path) -> None:
    """Browsers print no backgrounds unless told to, and the bars and the tolerances' lines are backgrounds."""
    style = report.read_text(encoding="utf-8").split("@media print", 1)[1]
    assert "print-color-adjust: exact" in style.split("</style>")[0]


def test_a_bench_without_counts_is_shown_without_them(report: Path, data: dict) -> None:
    changed = json.loads(json.dumps(data))
    for row in changed["bench"]["rows"]:
        row["counts"] = None  # of a model of several towers
    document = Document.model_validate_json(report.with_suffix(".json").read_text(encoding="utf-8"))
    numbers = {
        path
        for path, *_ in Page(render(document, changed, Outputs(exact={}, approximated={}, exported={}), [])).numbers
    }
    assert "bench.rows.0.speedup" in numbers
    assert not any("counts" in path for path in numbers)
