"""report.html: numbers are those of results.json, what comes from run folders stays text, nothing is loaded."""

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kwta_exp.cli import main
from kwta_exp.draw.pages import figures_of
from kwta_exp.errors import UserError
from kwta_exp.report.pages import grid_page, run_page, threat_text, write_grid_page, write_run_page
from kwta_exp.report.runs import Run, find
from kwta_exp.storage import read_json, write_json
from tests import stored

N = 20
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def made(outputs: Path, activation: str, seed: int, fooled: int, **values: object) -> Path:
    run = outputs / f"d-m-{activation}-natural" / f"s{seed}-0123456789"
    stored.described(run, activation, seed, **values)
    stored.evaluation(run, "quick-x", [True] * N, {"pgd": range(fooled), "bpda": range(2 * fooled)}, seed=seed)
    return run


class Text(HTMLParser):
    """The tags of a page, and the text of its table cells, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data.strip()


def test_a_page_shows_the_numbers_of_the_results(tmp_path: Path) -> None:
    run = Run.read(made(tmp_path, "kwta", 0, 4))
    page = run_page(run)
    rows = {row[0]: row for row in Text(page).rows}
    assert rows["none (clean)"][1] == "100.0%"
    assert rows["pgd"][1] == "80.0%"
    assert rows["pgd"][5:7] == ["80.0%", "20.0%"]
    assert rows["bpda"][5:7] == ["60.0%", "20.0%"]
    assert rows["worst case"][1] == "60.0%"
    assert run.latest is not None
    low, high = run.latest["worst_case"]["ci95"]
    assert rows["worst case"][2] == f"{100 * low:.1f} to {100 * high:.1f}%"
    verdict = run.latest["masking"]
    assert page.index("60.0%") < page.index(verdict["verdict"] + "</span>") < page.index("<table>")


def test_text_of_a_run_folder_stays_text(tmp_path: Path) -> None:
    folder = made(tmp_path, "kwta", 0, 4)
    for path in (folder / "results.json", folder / "evaluation" / "quick-x" / "results.json"):
        results = read_json(path)
        results["run"] |= {"name": HOSTILE, "command": HOSTILE, "suite": HOSTILE}
        results["masking"]["explanation"] = HOSTILE
        results["inapplicable"] = {HOSTILE: HOSTILE}
        write_json(path, results)
    environment = read_json(folder / "environment.json")
    write_json(folder / "environment.json", environment | {"processor": HOSTILE, "commit": HOSTILE})
    run = Run.read(folder)
    for page in (run_page(run), grid_page([run], HOSTILE, tmp_path, HOSTILE)):
        assert "alert(1)" in page
        found = Text(page)
        assert [tag for tag, _ in found.tags].count("script") == 1
        assert all(tag != "img" for tag, _ in found.tags)
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_a_page_loads_nothing_and_may_run_its_one_script_only(tmp_path: Path) -> None:
    run = Run.read(made(tmp_path, "kwta", 0, 4))
    for page in (run_page(run), grid_page([run], "runs", tmp_path)):
        (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
            in (page.replace("&#39;", "'"))
        )
        loading = {"src", "srcset", "data", "poster", "background"}
        assert not [attributes for _, attributes in Text(page).tags if loading & attributes.keys()]
        assert "url(" not in page
        assert "@import" not in page


def test_the_page_of_many_runs_links_their_pages_and_sorts_by_numbers(tmp_path: Path) -> None:
    folders = [made(tmp_path, "kwta", seed, 4 + seed) for seed in (0, 1)] + [made(tmp_path, "relu", 0, 2)]
    to = tmp_path / "sweeps" / "x" / "report.html"
    write_grid_page([Run.read(folder) for folder in folders], "runs", to)
    page = to.read_text()
    links = [attributes["href"] or "" for tag, attributes in Text(page).tags if tag == "a"]
    assert [(to.parent / link).resolve() for link in links] == [folder / "report.html" for folder in folders]
    assert all(folder.joinpath("report.html").exists() for folder in folders)
    rows = Text(page).rows
    assert rows[0] == ["activation", "seeds", "verdict", "worst case", "clean", "pgd", "bpda"]
    assert [row[:2] for row in rows[1:3]] == [["kwta", "2"], ["relu", "1"]]
    assert rows[2][3].startswith("80.0 [")
    assert 'data-value="0.8"' in page


def test_the_page_of_many_runs_shows_unfinished_ones(tmp_path: Path) -> None:
    made(tmp_path, "kwta", 0, 4)
    shutil.rmtree(made(tmp_path, "relu", 0, 4) / "evaluation")
    page = grid_page([Run.read(folder) for folder in find([tmp_path])], "runs", tmp_path)
    assert "2 runs: 1 finished, 1 interrupted" in page


def test_an_outdated_page_is_written_again(tmp_path: Path) -> None:
    run = Run.read(made(tmp_path, "kwta", 0, 4))
    page = write_run_page(run)
    page.write_text("old")
    write_grid_page([run], "runs", tmp_path / "report.html")
    assert page.read_text() == "old"
    shutil.copy2(run.folder / "results.json", tmp_path / "copy")
    shutil.copy(tmp_path / "copy", run.folder / "results.json")  # newer
    write_grid_page([run], "runs", tmp_path / "report.html")
    assert page.read_text() == run_page(run)


def test_a_threat_is_written_as_the_field_writes_it() -> None:
    assert threat_text({"norm": "linf", "eps": 8 / 255}) == "L-inf, eps 8/255"
    assert threat_text({"norm": "l2", "eps": 0.5}) == "L2, eps 0.5"
    assert threat_text({"norm": "linf", "eps": 0.1}) == "L-inf, eps 0.1"


def test_the_command_writes_a_page_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path, "kwta", 0, 4)
    main(["report", str(folder)])
    main(["report", str(folder / "evaluation" / "quick-x"), "-o", str(tmp_path / "one.html")])
    main(["report", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    pages = [folder / "report.html", tmp_path / "one.html", tmp_path / "report.html"]
    assert said == [f"{page} is written" for page in pages]
    assert pages[0].read_text() == pages[1].read_text()
    assert "1 runs: 1 finished" in pages[2].read_text()


def test_a_run_without_results_is_one_message(tmp_path: Path) -> None:
    folder = made(tmp_path, "kwta", 0, 4)
    shutil.rmtree(folder / "evaluation")
    with pytest.raises(UserError, match="no finished evaluation"):
        run_page(Run.read(folder))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nowhere")])


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_pages_open_offline_without_a_finding(tmp_path: Path, browser: Any, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for fooled, seed in ((4, 0), (5, 1)):
        made(tmp_path, "kwta", seed, fooled)
    made(tmp_path, "relu", 0, 2)
    runs = [Run.read(folder) for folder in find([tmp_path])]
    page_of_all = write_grid_page(runs, "runs", tmp_path / "report.html", figures_of=figures_of)
    pages = [page_of_all, runs[0].folder / "report.html"]
    assert "<svg xmlns" in pages[1].read_text()  # a figure
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    for path in pages:
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        violations = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
        assert said == []
        assert asked == [path.as_uri()]


@pytest.mark.browser
def test_a_table_sorts_by_click_and_by_key(tmp_path: Path, browser: Any) -> None:
    for activation, fooled in (("a", 10), ("b", 1), ("c", 4)):  # as text, 0 < 60 < 90
        made(tmp_path, activation, 0, fooled)
    runs = [Run.read(folder) for folder in find([tmp_path])]
    page = browser.new_page()
    page.goto(write_grid_page(runs, "runs", tmp_path / "report.html").as_uri())

    def first_column() -> list[str]:
        return list(page.locator("section:has(#table-1) tbody tr td:first-child").all_inner_texts())

    button = page.locator("section:has(#table-1) th button", has_text="worst case")
    assert first_column() == ["a", "b", "c"]
    button.click()
    assert first_column() == ["a", "c", "b"]
    assert button.locator("..").get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert first_column() == ["b", "c", "a"]
    assert button.locator("..").get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    assert first_column() == ["a", "c", "b"]
