"""The page in a real browser: sorting, filtering, shipping, the picture, and no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.report.report import Report
from benchmarks.report.shipping import best_to_ship, by_memory
from benchmarks.settings import ShipSettings
from tests.benchmarks.made import made_comparison
from tests.benchmarks.report.chromium import Page, chromium, find_chromium
from tests.benchmarks.report.test_budget import nearly_as_close

HOSTILE = '<img src=x onerror="document.title=1">'
ROWS = "[...document.querySelectorAll('#table tbody tr')]"
NAMES = f"{ROWS}.filter((row) => !row.hidden).map((row) => row.dataset.model)"


@pytest.fixture(scope="module")
def comparison() -> Report:
    made = nearly_as_close(made_comparison())
    return replace(made, samples={HOSTILE: {HOSTILE: HOSTILE}})


@pytest.fixture(scope="module")
def page(comparison: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed; apt-get install chromium brings one")
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(comparison.to_html(ShipSettings(ship_mb=300)), "utf-8")
    with chromium(program, folder / "profile") as opened:
        opened.open(folder / "report.html")
        yield opened


def head(title: str) -> str:
    return (
        "[...document.querySelectorAll('#table thead th')]"
        f".find((head) => head.innerText.startsWith({title!r}))"
    )


def type_in(page: Page, selector: str, value: str) -> None:
    """Put a value where a reader would type it."""
    page.run(
        f"(() => {{ const input = document.querySelector({selector!r}); input.value = {value!r};"
        "input.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_a_click_sorts_the_table_and_another_turns_it_round(page: Page, comparison: Report):
    speeds = {m.name: m.latency.decode_tokens_per_second for m in comparison.models}
    assert page.run(NAMES) == list(speeds)

    page.run(f"{head('Writing')}.querySelector('button').click()")
    slowest_first = page.run(NAMES)
    assert page.run(f"{head('Writing')}.getAttribute('aria-sort')") == "ascending"
    page.run(f"{head('Writing')}.querySelector('button').click()")
    fastest_first = page.run(NAMES)

    assert slowest_first == sorted(speeds, key=speeds.__getitem__)
    assert [speeds[n] for n in fastest_first] == sorted(speeds.values(), reverse=True)
    assert page.run(f"{head('Writing')}.getAttribute('aria-sort')") == "descending"
    assert page.run(f"{head('Size')}.getAttribute('aria-sort')") == "none"


def test_the_keyboard_sorts_too_and_what_is_not_known_comes_last(page: Page, comparison: Report):
    page.run(f"{head('KL')}.querySelector('button').focus()")
    page.press("Enter", 13, "\r")
    names = page.run(NAMES)
    assert page.run(f"{head('KL')}.getAttribute('aria-sort')") == "ascending"
    page.press("Enter", 13, "\r")
    turned = page.run(NAMES)

    expected = sorted((m for m in comparison.models if m.fidelity), key=lambda m: m.mean_kl)
    assert names == [*(model.name for model in expected), "teacher"]
    assert turned == [*(model.name for model in expected[::-1]), "teacher"]


def test_a_size_budget_hides_rows_and_discs_and_moves_the_stairs(page: Page):
    stairs = "document.querySelector('.picture.wide .frontier').getAttribute('points')"
    whole = page.run(stairs)
    type_in(page, "#size-most", "120")

    assert sorted(page.run(NAMES)) == ["chatbot-4", "chatbot-8", "student-nf4"]
    assert page.run("document.querySelector('#shown').textContent") == "3 of 7 models"
    assert page.run("document.querySelector('#size-slider').value") == "120"
    out = page.run(
        "[...document.querySelectorAll('.picture.wide circle.out')]"
        ".map((disc) => [disc.dataset.model, disc.getAttribute('tabindex')])"
    )
    assert sorted(out) == [[n, "-1"] for n in ("chatbot-float", "pruned", "student", "teacher")]
    # From chatbot-4, the fastest, along its level to chatbot-8, which is closer.
    assert len(page.run(stairs).split()) == 3
    page.run(
        "(() => { const slider = document.querySelector('#size-slider'); slider.value = 100;"
        "slider.dispatchEvent(new Event('input')); })()"
    )
    assert sorted(page.run(NAMES)) == ["chatbot-4", "student-nf4"]
    assert page.run("document.querySelector('#size-most').value") == "100"
    assert page.run(stairs) == ""
    type_in(page, "#size-most", "")
    assert len(page.run(NAMES)) == 7
    assert page.run(stairs) == whole
    assert page.run("document.querySelector('#size-slider').value") == "538"


def test_what_another_beats_can_be_hidden(page: Page):
    page.run("document.querySelector('#frontier-only').click()")
    assert sorted(page.run(NAMES)) == ["chatbot-4", "chatbot-8", "teacher"]
    page.run("document.querySelector('#frontier-only').click()")
    assert len(page.run(NAMES)) == 7


@pytest.mark.parametrize("speed", [None, 40.0, 500.0])
@pytest.mark.parametrize("memory", [None, 100.0, 154.0, 600.0, 2000.0])
def test_the_page_ships_what_python_ships(
    page: Page, comparison: Report, memory: float | None, speed: float | None
):
    type_in(page, "#ship-memory", "" if memory is None else f"{memory:g}")
    type_in(page, "#ship-speed", "" if speed is None else f"{speed:g}")

    best = best_to_ship(comparison, ship_mb=memory, ship_tps=speed)
    assert page.run("document.querySelector('#ship-answer').dataset.model") == (
        best.name if best else ""
    )
    words = page.run("document.querySelector('#ship-answer').innerText")
    assert words.startswith(f"Ship {best.name}: the closest" if best else "None of them fits")
    chips = page.run(
        "[...document.querySelectorAll('#ship-chips button')].map((chip) => chip.innerText)"
    )
    answers = by_memory(comparison, speed)
    assert chips == [f"from {amount:,.0f} MB {model.name}" for amount, model in answers]


def test_a_chip_answers_for_its_memory(page: Page):
    type_in(page, "#ship-memory", "")
    type_in(page, "#ship-speed", "")
    page.run("document.querySelector('#ship-chips button').click()")

    assert page.run("document.querySelector('#ship-memory').value") == "154"
    assert page.run("document.querySelector('#ship-answer').dataset.model") == "chatbot-4"
    lit = (
        "[...document.querySelectorAll('.picture.wide .disc.shipped')].map((d) => d.dataset.model)"
    )
    assert page.run(lit) == ["chatbot-4"]


def place_of(page: Page, name: str) -> dict[str, float]:
    found: dict[str, float] = page.run(
        f"(() => {{ const disc = document.querySelector('.picture.wide .disc[data-model={name}]');"
        "disc.scrollIntoView({block: 'center'}); const box = disc.getBoundingClientRect();"
        "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
    )
    return found


def test_pointing_at_a_disc_says_what_it_is_and_how_it_is_made(page: Page):
    place = place_of(page, "teacher")
    page.move(1, 1)
    page.move(place["x"], place["y"])

    assert page.run("document.querySelector('#about').dataset.shown") == "teacher"
    assert "538 MB" in page.run("document.querySelector('#about').innerText")
    assert page.run("document.querySelector('#about pre').innerText") == (
        "mistill teacher @smollm2 teacher"
    )
    lit = f"{ROWS}.filter((row) => row.classList.contains('lit')).map((row) => row.dataset.model)"
    assert page.run(lit) == ["teacher"]
    page.move(1, 1)
    assert page.run(lit) == []


def test_the_keyboard_reaches_every_disc(page: Page, comparison: Report):
    page.run("document.querySelector('#frontier-only').focus()")
    seen = []
    for _ in comparison.models:
        page.press("Tab", 9)
        seen.append(page.run("document.querySelector('#about').dataset.shown"))
        label = page.run("document.activeElement.getAttribute('aria-label')")
        assert label.startswith(f"{seen[-1]}: ")

    assert sorted(seen) == sorted(model.name for model in comparison.models)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "layout"), [(1280, "wide"), (390, "tall")])
def test_the_page_fits_its_reader(page: Page, theme: str, width: int, layout: str):
    page.size(width, 900)
    page.theme(theme)
    try:
        assert page.run("document.documentElement.scrollWidth") <= width
        shown = page.run(
            "[...document.querySelectorAll('.picture')]"
            ".filter((part) => part.getBoundingClientRect().height > 100)"
            ".map((part) => part.classList.contains('tall') ? 'tall' : 'wide')"
        )
        assert shown == [layout]
        colours = page.run("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, colours.removeprefix("rgb(").removesuffix(")").split(", "))) < 150
        assert dark == (theme == "dark")
    finally:
        page.size(1280, 900)
        page.theme("light")


def test_no_request_leaves_the_page_and_none_could(page: Page):
    """After all that was done above: nothing but the file itself was ever asked for."""
    (own,) = page.requests.values()
    assert own.startswith("file://")
    assert page.complaints == []

    outside: dict[str, Any] = page.run(
        "(async () => { let said = 'sent'; try { await fetch('http://127.0.0.1:9/'); }"
        "catch (error) { said = String(error); }"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"
        "const code = document.createElement('script'); code.textContent = 'document.title = 7';"
        "document.body.append(image, code);"
        "return {said, title: document.title}; })()"
    )

    # The page's own policy refuses what a page without one would have asked for.
    assert "Failed to fetch" in outside["said"]
    assert outside["title"] == "mistill: 7 models compared"

    def unsaid() -> list[str]:
        """What the browser has not told of yet: it tells of each refusal when it gets to it."""
        asked = {number for number, url in page.requests.items() if url != own}
        refusals = [c for c in page.complaints if "Content Security Policy" in c]
        words = ("Connecting to", "img-src", "script-src")
        missing = [what for what in words if not any(what in c for c in refusals)]
        return [*missing, *(page.requests[number] for number in asked - page.refused)]

    for _ in range(500):
        if not unsaid():
            break
        page.run("new Promise((done) => setTimeout(done, 20))")
    assert unsaid() == []
