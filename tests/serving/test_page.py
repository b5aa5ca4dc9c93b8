"""The live page in a real Chromium, on a real server with a tiny backbone and hostile texts."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect

from model_store.backbone import Backbone
from model_store.store import Store
from tests.abuse.place import Place, serve_tiny
from tests.overlays import random_artifact
from tests.running import ADMIN_TOKEN, TOKEN
from tests.serving.chromium import NEEDED, Tab, chromium, tab
from tests.serving.fake_stats import BOUNDS, FakeStats
from tests.waiting import wait_until

pytestmark = NEEDED

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}'\"&amp;"
LABELS = ("<b>bold</b>", "javascript:alert(3)", "\u202eright to left")
TASKS = ("hostile", "mood", "same", "spam")
LOOK_MS = 2000
expect.set_options(timeout=30_000)

Tabs = Callable[..., AbstractContextManager[Tab]]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]
) -> Iterator[Place]:
    with serve_tiny(tmp_path_factory.mktemp("page"), tiny, replicas=1) as made:
        measured = [
            {"network": name, "split": "test", "metric": "accuracy", "value": value, "rows": 1000}
            for name, value in (("dense", 0.91), ("localized", 0.875))
        ]
        for seed, task in enumerate(TASKS):
            changes: dict[str, Any] = {"description": f"About {task}.", "metrics": measured}
            if task == "hostile":
                changes = {"description": HOSTILE, "labels": LABELS}
            if task == "same":
                changes |= {"pairs": True, "labels": ("no", "yes")}
            made.register(task, random_artifact(tiny[1], task, seed=seed, **changes))
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def stats() -> FakeStats:
    return FakeStats(*TASKS)


@pytest.fixture
def tabs(browser: Browser, place: Place) -> Tabs:
    return partial(tab, browser, place.server.address)


def open_page(opened: Tab, stats: FakeStats | None = None, key: str = TOKEN) -> Page:
    """The page with a key in its address; time stands still but for `look`."""
    if stats is not None:
        opened.page.route("**/v1/stats", stats.answer)
    opened.page.clock.install()
    opened.page.goto(f"/#token={key}")
    expect(opened.page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
    return opened.page


def look(page: Page, times: int = 1) -> None:
    """Let the page look at the server again."""
    for _ in range(times):
        with page.expect_response("**/v1/tasks"), page.expect_response("**/v1/stats"):
            page.clock.run_for(LOOK_MS)
    page.evaluate("() => new Promise((done) => queueMicrotask(done))")


# --- getting in -----------------------------------------------------------------------------------


def test_the_key_is_asked_for_once(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        page = opened.page
        opened.refused = {401}
        page.route("**/v1/stats", stats.answer)
        page.goto("/")
        key = page.get_by_label("Key", exact=True)
        expect(key).to_be_focused()
        expect(page.locator("#content")).to_be_hidden()
        key.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="not known here")).to_be_visible()
        key.fill(TOKEN)
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
        expect(page.locator("#entrance")).to_be_hidden()
        page.reload()
        expect(page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
        assert page.evaluate("localStorage.length") == 0
        page.get_by_role("button", name="Forget the key").click()
        expect(key).to_be_visible()
        assert page.evaluate("sessionStorage.length + localStorage.length") == 0
        page.reload()
        expect(key).to_be_visible()


def test_the_key_in_the_address_is_taken_out_of_it_and_never_sent_in_one(
    tabs: Tabs, stats: FakeStats, place: Place
) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        assert page.url == place.server.address + "/"
        assert all(TOKEN not in one.url for one in opened.asked)
        shown = [one for one in opened.asked if "/v1/" in one.url]
        assert {one.headers["authorization"] for one in shown} == {f"Bearer {TOKEN}"}
        statics = [one for one in opened.asked if "/v1/" not in one.url]
        assert not any("authorization" in one.headers for one in statics)


def test_a_key_is_kept_on_the_device_if_its_user_says_so(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        opened.refused = {401}
        opened.page.route("**/v1/stats", stats.answer)
        opened.page.goto("/")
        opened.page.get_by_label("Key", exact=True).fill(TOKEN)
        opened.page.get_by_label("Keep it on this device").check()
        opened.page.get_by_role("button", name="Open").click()
        expect(opened.page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
        assert opened.page.evaluate("[...Object.values(localStorage)]") == [TOKEN]
        assert opened.page.evaluate("sessionStorage.length") == 0


def test_a_server_without_keys_asks_for_none(tabs: Tabs, stats: FakeStats) -> None:
    """As `--no-auth` lets everyone in; here whoever carries the requests puts a key on them."""
    with tabs() as opened:
        headers = {"authorization": f"Bearer {TOKEN}"}
        opened.page.route("**/v1/**", lambda route: route.continue_(headers=headers))
        opened.page.route("**/v1/stats", stats.answer)
        opened.page.goto("/")
        expect(opened.page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
        expect(opened.page.locator("#entrance")).to_be_hidden()
        expect(opened.page.get_by_role("button", name="Forget the key")).to_be_hidden()


def test_a_key_without_figures_still_shows_tasks_and_the_box(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        opened.refused = {403}
        stats.status = 403
        page = open_page(opened, stats)
        expect(page.locator("#figures-missing")).to_contain_text("the scope metrics")
        expect(page.locator("#detail")).to_be_hidden()
        expect(page.locator("#tasks thead")).not_to_contain_text("p95")
        page.locator("#trial button").click()
        expect(page.locator(".answer")).to_have_count(3)
        with page.expect_response("**/v1/tasks"):
            page.clock.run_for(LOOK_MS)
        assert len([one for one in opened.asked if "stats" in one.url]) == 1, "it asks no more"


def test_the_documentation_opens_with_the_same_key(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        page.get_by_role("link", name="API documentation").click()
        page.wait_for_url("**/docs")
        expect(page.get_by_text("Show which neurons a task keeps")).to_be_visible()
        opened.said.clear()  # of the documentation's own library


# --- figures --------------------------------------------------------------------------------------


def test_the_table_shows_tasks_and_what_is_counted_of_them(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        stats.count("mood", 0.004, 1_000_000)  # before the page was opened: not of interest
        page = open_page(opened, stats)
        row = page.locator(
            "#tasks tbody tr", has=page.get_by_role("button", name="mood", exact=True)
        )
        expect(row).to_contain_text("About mood.")
        expect(row).to_contain_text("87.5")
        for _ in range(3):
            stats.count("mood", 0.004, 90)
            stats.count("mood", 0.09, 10, code="503")
            stats.count("spam", 0.004, 10, code="422")
            look(page)
        cells = dict(
            zip(
                page.locator("#tasks thead th").all_inner_texts(),
                row.locator("> *").all_inner_texts(),
                strict=True,
            )
        )
        assert "50" in cells["requests/s"]
        assert re.fullmatch(r"3\.\d+\sms", cells["p50"])
        assert re.fullmatch(r"75\.0\sms", cells["p95"])
        assert cells["errors"] == "30"
        tiles = page.locator("#tiles .tile")
        expect(tiles.filter(has_text="requests/s")).to_contain_text("55")
        expect(tiles.filter(has_text="since this page was opened").first).to_contain_text("60")
        expect(tiles.filter(has_text="memory")).to_contain_text("512")
        expect(page.locator("#state")).to_have_text("answering")
        # The charts of one task.
        page.get_by_role("button", name="mood", exact=True).first.click()
        expect(page.locator("#detail-title")).to_have_text("mood")
        expect(page.locator("#detail-facts")).to_contain_text(
            "270 without error, 30 with status 503"
        )
        expect(page.get_by_label(re.compile("^Latency, now: p50 3"))).to_be_visible()
        parts = page.get_by_label(re.compile("^Where the time goes"))
        expect(parts).to_have_attribute("aria-label", re.compile(r"tokens 1\.26.*network 6\.30"))
        assert page.locator("#detail .plot path.line").first.get_attribute("d")
        page.get_by_role("button", name="Show all tasks").click()
        expect(page.locator("#detail-title")).to_have_text("All tasks")


def test_the_figures_are_those_that_the_server_tells(tabs: Tabs, place: Place) -> None:
    with tabs() as opened:
        page = open_page(opened)
        page.get_by_role("button", name="mood", exact=True).first.click()
        for _ in range(20):
            assert place.server.predict("mood", "a").status_code == 200

        def answered() -> int:
            look(page)
            found = re.search(r"(\d+) without error", opened.text("#detail-facts"))
            return int(found[1]) if found else 0

        wait_until(lambda: answered() >= 20)
        expect(page.get_by_label(re.compile(r"^Latency, now: p50 [\d.]+\sms"))).to_be_visible()
        tiles = page.locator("#tiles .tile")
        expect(tiles.filter(has_text="memory")).to_contain_text(re.compile("[MG]B"))
        expect(tiles.filter(has_text="replicas")).to_contain_text("1 of 1")
        expect(page.locator("#backbone")).to_have_text("tiny, one frozen encoder for 4 tasks")


def test_a_replica_that_begins_anew_takes_nothing_away(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        stats.count("mood", 0.004, 500)
        page = open_page(opened, stats)
        stats.count("mood", 0.004, 100)
        look(page)
        stats.restart("mood")
        stats.replicas_ready = 1
        look(page)
        stats.count("mood", 0.004, 20)
        look(page)
        page.get_by_role("button", name="mood", exact=True).first.click()
        expect(page.locator("#detail-facts")).to_contain_text("120 without error")
        expect(page.locator("#state")).to_have_text("answering, 1 of 2 replicas")


def test_of_several_machines_the_first_is_watched(tabs: Tabs, stats: FakeStats) -> None:
    """A load balancer brings the answers of two, whose counts have nothing in common."""
    with tabs() as opened:
        page = open_page(opened, stats)
        other = FakeStats(*TASKS)
        other.node = "two"
        other.count("mood", 0.004, 5_000)
        for _ in range(3):
            stats.count("mood", 0.004, 10)
            other.at = stats.at
            stats.at += 2
            opened.page.route("**/v1/stats", other.answer)
            look(page)
            opened.page.unroute("**/v1/stats", other.answer)
            look(page)
        expect(page.locator("#detail-facts")).to_contain_text("30 without error")
        expect(page.locator("#detail-facts")).to_contain_text("machine")
        expect(page.locator("#detail-facts")).to_contain_text("one")


def test_rows_are_sorted_by_what_is_asked_for(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        names = page.locator("tbody tr th .link")
        assert names.all_inner_texts()[:4] == list(TASKS)
        stats.count("spam", 0.004, 50)
        stats.count("mood", 0.09, 20)
        look(page)
        page.get_by_role("button", name="p95").click()
        assert names.all_inner_texts()[:2] == ["mood", "spam"]
        heads = page.get_by_role("columnheader", name="p95")
        expect(heads).to_have_attribute("aria-sort", "descending")
        page.get_by_role("button", name="requests/s").click()
        assert names.all_inner_texts()[:2] == ["spam", "mood"]


def test_a_server_that_is_gone_and_comes_back(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        opened.refused = {0}
        page = open_page(opened, stats)
        page.route("**/v1/tasks", lambda route: route.abort())
        page.clock.run_for(LOOK_MS)
        alert = page.get_by_role("alert").filter(has_text="does not answer")
        expect(alert).to_contain_text("What you see is from")
        expect(page.locator("#tasks tbody tr")).to_have_count(len(TASKS))
        expect(page.locator("#state")).to_have_text("not answering")
        page.unroute("**/v1/tasks")
        look(page)
        expect(alert).to_be_hidden()
        expect(page.locator("#state")).to_have_text("answering")


def test_a_key_that_is_revoked_meanwhile(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        opened.refused = {401}
        page = open_page(opened, stats)
        error = {"type": "unauthorized", "message": "no such key", "request_id": "1"}
        page.route("**/v1/tasks", lambda route: route.fulfill(status=401, json={"error": error}))
        page.clock.run_for(LOOK_MS)
        expect(page.get_by_role("alert").filter(has_text="does not hold any more")).to_be_visible()
        expect(page.locator("#content")).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0


def test_no_task_yet(tabs: Tabs) -> None:
    with tabs() as opened:
        opened.page.route("**/v1/stats", FakeStats().answer)
        opened.page.route("**/v1/tasks", lambda route: route.fulfill(json={"tasks": []}))
        opened.page.goto(f"/#token={TOKEN}")
        expect(opened.page.get_by_text("No task is served yet")).to_be_visible()
        expect(opened.page.locator("#trial")).to_be_hidden()
        expect(opened.page.locator("#neurons")).to_be_hidden()
        expect(opened.page.locator("#registration")).to_be_visible()


# --- asking ---------------------------------------------------------------------------------------


def test_a_text_is_tried_on_one_task_and_on_all(tabs: Tabs, stats: FakeStats, place: Place) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        page.get_by_label("Ask", exact=True).select_option("mood")
        page.get_by_label("Text", exact=True).fill("the film was very good")
        page.get_by_label("Text", exact=True).press("Control+Enter")
        expected = place.server.predict("mood", "the film was very good").json()["predictions"][0]
        answers = page.locator(".answer")
        expect(answers).to_have_count(1)
        expect(answers.locator(".label")).to_have_text(expected["label"])
        expect(answers.locator(".scores li").first).to_contain_text(
            f"{100 * expected['score']:.1f}"
        )
        expect(page.locator("#trial-timings")).to_contain_text("in the network")
        page.get_by_label("Ask", exact=True).select_option("*text")
        page.locator("#trial button").click()
        expect(answers).to_have_count(3)
        assert [text.split()[0] for text in answers.locator("h3").all_inner_texts()] == [
            "hostile",
            "mood",
            "spam",
        ]


def test_pairs_are_tried_on_tasks_that_take_them(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        expect(page.get_by_label("Second text")).to_be_hidden()
        page.get_by_label("Ask", exact=True).select_option("same")
        page.get_by_label("First text").fill("a cat")
        page.get_by_label("Second text").fill("the dog")
        page.locator("#trial button").click()
        expect(page.locator(".answer")).to_have_count(1)
        expect(page.locator(".answer .label")).to_have_text(re.compile("^(yes|no)$"))
        page.get_by_label("Ask", exact=True).select_option("*pair")
        page.locator("#trial button").click()
        expect(page.locator(".answer h3")).to_contain_text("same")


def test_an_error_is_told_in_words(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        opened.refused = {503}
        page = open_page(opened, stats)
        error = {"type": "overloaded", "message": "the queue is full", "request_id": "1"}
        page.route("**/v1/predict", lambda route: route.fulfill(status=503, json={"error": error}))
        page.locator("#trial button").click()
        expect(page.locator("#trial-error")).to_have_text("the queue is full")


# --- hostile texts --------------------------------------------------------------------------------


def test_hostile_texts_stay_text(tabs: Tabs, stats: FakeStats) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        page.get_by_label("Ask", exact=True).select_option("hostile")
        page.locator("#trial button").click()
        expect(page.locator(".answer .label")).to_be_visible()
        page.get_by_role("button", name="hostile", exact=True).first.click()
        look(page)
        assert page.get_by_text(HOSTILE, exact=False).count() >= 2
        assert page.get_by_text(LABELS[0]).count() >= 2
        assert page.locator("img[onerror], main script, main b b, a[href^=javascript]").count() == 0
        assert page.locator("main img").count() == 0


def test_a_hostile_server_stays_text_too(tabs: Tabs, stats: FakeStats) -> None:
    """As if something between had changed every name."""
    with tabs() as opened:
        stats.restart(HOSTILE)
        stats.restart("__proto__")
        stats.count(HOSTILE, 0.004, 10, code=HOSTILE)
        page = opened.page
        page.route("**/v1/stats", stats.answer)

        def rename(route: Any) -> None:
            body = route.fetch().json()
            for number, info in enumerate(body["tasks"]):
                info["task"] = (
                    HOSTILE if number == 0 else "__proto__" if number == 1 else info["task"]
                )
            route.fulfill(json=body)

        page.route("**/v1/tasks", rename)
        opened.refused = {404, 422}
        page.goto(f"/#token={TOKEN}")
        row = page.get_by_role("button", name=HOSTILE).first
        expect(row).to_be_visible()
        row.click()
        expect(page.locator("#detail-title")).to_have_text(HOSTILE)
        page.locator("#trial button").click()
        assert page.locator("main img, main script").count() == 0


# --- neurons --------------------------------------------------------------------------------------

PIXELS = """(canvas) => {
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const counts = {};
  for (let place = 0; place < data.length; place += 4) {
    const colour = data[place + 3] ? [...data.slice(place, place + 3)].join() : "none";
    counts[colour] = (counts[colour] ?? 0) + 1;
  }
  return counts;
}"""


def colours(page: Page) -> list[dict[str, int]]:
    """How many squares of each colour every layer has, the empty ends left out."""
    found: list[dict[str, int]] = [one.evaluate(PIXELS) for one in page.locator("canvas").all()]
    for one in found:
        one.pop("none", None)
    return found


def test_the_neuron_map_shows_what_is_kept_and_shared(
    tabs: Tabs, stats: FakeStats, place: Place
) -> None:
    mood = place.server.ask("GET", "/v1/tasks/mood/neurons").json()
    shared = next(one for one in mood["overlaps"] if one["task"] == "spam")
    kept = [layer["kept"] for layer in mood["layers"]]
    with tabs() as opened:
        page = open_page(opened, stats)
        section = page.locator("#neurons")
        section.get_by_label("Task").select_option("mood")
        expect(page.locator("canvas")).to_have_count(len(kept))
        label = f"Layer 1: {kept[0]} of 48 neurons kept"
        expect(section.get_by_role("img", name=label)).to_be_visible()
        found = colours(page)
        assert [sorted(one.values()) for one in found] == [sorted([n, 48 - n]) for n in kept]
        jaccards = [one["jaccard"] for one in mood["overlaps"]]
        rows = page.locator("#overlaps tbody tr")
        assert rows.count() == len(jaccards)
        top = max(mood["overlaps"], key=lambda one: one["jaccard"])
        expect(rows.first).to_contain_text(top["task"])
        # Beside another task: four colours.
        page.locator("#overlaps").get_by_role("button", name="spam").click()
        legend = page.locator("#neurons-legend")
        expect(legend).to_contain_text(f"both {shared['shared']}")
        expect(legend).to_contain_text("only mood")
        expect(legend).to_contain_text(f"only spam {shared['kept'] - shared['shared']}")
        assert {len(one) for one in colours(page)} == {4}
        assert {sum(one.values()) for one in colours(page)} == {48}


# --- registering ----------------------------------------------------------------------------------


def drop(page: Page, name: str, data: bytes) -> None:
    """Drop a file onto the page, as a file manager does."""
    transfer = page.evaluate_handle(
        """async ([name, bytes]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], name));
          return transfer;
        }""",
        [name, list(data)],
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_an_artifact_is_registered_by_dropping_it(
    tabs: Tabs, stats: FakeStats, place: Place
) -> None:
    data = random_artifact(place.backbone, "dropped", seed=9, description="Came by the page.")
    with tabs() as opened:
        opened.refused = {403}
        page = open_page(opened, stats)
        drop(page, "dropped.safetensors", data)
        expect(page.locator("#registration-file")).to_contain_text("Came by the page.")
        # The page's own key is not for changes.
        page.get_by_role("button", name="Register").click()
        refused = page.locator("#registration-error")
        expect(refused).to_contain_text("This key may not change what is served")
        page.get_by_label("Key with the scope").fill(ADMIN_TOKEN)
        page.get_by_role("button", name="Register").click()
        page.clock.resume()
        summary = page.locator("#registration-progress .summary")
        expect(summary).to_have_text("dropped, version 1, answers now.")
        assert page.locator(".steps li.done").count() == 4
        expect(refused).to_be_hidden()
        expect(page.get_by_role("button", name="dropped", exact=True).first).to_be_visible()
        page.get_by_role("button", name="Register").click()
        expect(summary).to_contain_text("there already")
        assert ADMIN_TOKEN not in page.evaluate(
            "JSON.stringify([{...sessionStorage}, {...localStorage}])"
        )
    place.change("DELETE", "/v1/tasks/dropped")


def test_bad_files_are_told_from_good_ones_in_words(
    tabs: Tabs, stats: FakeStats, place: Place
) -> None:
    data = random_artifact(place.backbone, "broken", seed=9)
    with tabs() as opened:
        page = open_page(opened, stats)
        drop(page, "picture.png", b"\x89PNG and so on, for a while")
        error = page.locator("#registration-error")
        expect(error).to_contain_text("picture.png: This is no artifact")
        expect(page.get_by_role("button", name="Register")).to_be_hidden()
        # A good beginning, and a bad end: the server finds it.
        drop(page, "broken.safetensors", data[:-40])
        page.get_by_label("Key with the scope").fill(ADMIN_TOKEN)
        page.get_by_role("button", name="Register").click()
        page.clock.resume()
        expect(error).to_contain_text("It was not taken in.")
        expect(page.locator(".steps li.failed")).to_contain_text("checked")
        assert page.locator(".steps li.done").count() == 0
    assert place.server.ask("GET", "/v1/tasks/broken").status_code == 404


# --- looks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_screen(tabs: Tabs, stats: FakeStats, width: int) -> None:
    with tabs(width=width, height=800, light="dark") as opened:
        stats.count("mood", 0.09, 10, code="500")
        page = open_page(opened, stats)
        stats.count("mood", 0.09, 123_456, code="500")
        look(page)
        page.locator("#trial button").click()
        expect(page.locator(".answer")).to_have_count(3)
        page.locator("#neurons").get_by_label("Compare with").select_option("spam")
        expect(page.locator("#neurons-legend")).to_contain_text("both")
        for details in page.locator("details").all():
            details.evaluate("(one) => { one.open = true; }")
        for place in ("html", "#tasks-table", "#overlaps"):
            seen, whole = page.locator(place).evaluate(
                "(one) => [one.clientWidth, one.scrollWidth]"
            )
            assert whole <= seen, place


def test_light_and_dark_are_different(tabs: Tabs, stats: FakeStats) -> None:
    backgrounds = []
    for light in ("light", "dark"):
        with tabs(light=light) as opened:
            page = open_page(opened, stats)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(backgrounds)) == 2


def test_everything_that_is_used_has_a_name_and_is_reached_by_keys(
    tabs: Tabs, stats: FakeStats
) -> None:
    with tabs() as opened:
        page = open_page(opened, stats)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, a, input, select, textarea, canvas")]
              .filter((one) => one.checkVisibility())
              .filter((one) => !one.labels?.length && !one.textContent.trim())
              .filter((one) => !one.getAttribute("aria-label"))
              .map((one) => one.outerHTML)"""
        )
        assert unnamed == []
        reached = set()
        for _ in range(80):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "document.activeElement?.id || document.activeElement?.textContent.trim()"
                )
            )
        assert {
            "trial-task",
            "trial-first",
            "neurons-task",
            "neurons-other",
            "file",
            "mood",
        } <= reached


# --- arithmetic -----------------------------------------------------------------------------------


def reference_quantile(q: float, counts: list[int], bounds: list[float]) -> float:
    """Prometheus' `histogram_quantile` on cumulative buckets, `le` as it sums them up."""
    cumulative, total = [], 0
    for n in counts:
        total += n
        cumulative.append(total)
    rank = q * total
    place = next(number for number, n in enumerate(cumulative) if n >= rank)
    if place == len(bounds):
        return bounds[-1]
    start = bounds[place - 1] if place else 0.0
    before = cumulative[place - 1] if place else 0
    return start + (bounds[place] - start) * (rank - before) / (cumulative[place] - before)


@pytest.fixture(scope="module")
def module(browser: Browser, place: Place) -> Iterator[Page]:
    """A tab in which the page's modules can be called."""
    with tab(browser, place.server.address, service_workers="block") as opened:
        opened.refused = {401}
        opened.page.goto("/")
        yield opened.page


@settings(max_examples=60)
@given(
    counts=st.lists(
        st.integers(0, 1000), min_size=len(BOUNDS) + 1, max_size=len(BOUNDS) + 1
    ).filter(any),
    q=st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]),
)
def test_quantiles_are_those_of_prometheus(module: Page, counts: list[int], q: float) -> None:
    found = module.evaluate(
        """async ([q, counts, bounds]) =>
          (await import("/page/quantiles.js")).quantile(q, counts, bounds)""",
        [q, counts, list(BOUNDS)],
    )
    assert found == pytest.approx(reference_quantile(q, counts, list(BOUNDS)), rel=1e-12)


def test_nothing_counted_has_no_quantile(module: Page) -> None:
    found = module.evaluate(
        """async () => {
          const { quantile } = await import("/page/quantiles.js");
          return Number.isNaN(quantile(0.5, [0, 0], [1]));
        }"""
    )
    assert found is True
