"""The report page, read back with an HTML parser: whole, safe, and saying what it was given."""

import dataclasses
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization.page.charts import MARKERS, Cell, Range, Series, bars, grid, intervals, lines
from localization.page.report import (
    KeepCurve,
    KeepCurves,
    Kept,
    Mistake,
    NetworkResult,
    Report,
    Splits,
    TaskOverlap,
    TrainingCurve,
    TrialResult,
    render,
    verdict,
)
from localization.statistics import Discordant, overlap, repeated

HOSTILE = "</td></table><script>alert(\"1\")</script><img src=x onerror='a()'> & \x00 \ud800 &lt;"
VOID = {"meta", "br", "link", "img", "input", "hr", "base", "wbr"}


class Page(HTMLParser):
    """A page taken apart: every element with its attributes, and all text. Tags must balance."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def network(
    hits: int, rows: int, neurons: float = 1.0, against: Discordant | None = None
) -> NetworkResult:
    return NetworkResult(
        hits,
        rows,
        hits / rows - 0.01,
        hits / rows - 0.03,
        neurons,
        1.0,
        43_210,
        None if neurons == 1 else 1.42,
        against,
    )


def kept(seed: int, layers: int, width: int, share: float) -> Kept:
    """Neurons in clusters, later layers keeping fewer, as attribution gives them."""
    drawn = random.Random(seed)
    found = []
    for layer in range(layers):
        weights = [0.0]
        while len(weights) < width:
            weights.append(0.97 * weights[-1] + drawn.gauss(0, 1))
        count = round(width * min(1.0, share * (1.5 - layer / layers)))
        best = sorted(range(width), key=lambda index: -weights[index])[:count]
        found.append(tuple(sorted(best)))
    return Kept(width, tuple(found))


def confusion(seed: int, classes: int, rows: int) -> tuple[tuple[int, ...], ...]:
    drawn = random.Random(seed)
    counts = [[0] * classes for _ in range(classes)]
    for _ in range(rows):
        true = drawn.randrange(classes)
        wrong = drawn.choice([true ^ 1, true, drawn.randrange(classes)]) % classes
        counts[true][true if drawn.random() < 0.9 else wrong] += 1
    return tuple(tuple(row) for row in counts)


def curve(seed: int, best: float, epochs: int) -> tuple[float, ...]:
    drawn = random.Random(seed)
    return tuple(
        best - 0.35 * 0.75**epoch + drawn.gauss(0, 0.006) for epoch in range(1, epochs + 1)
    )


def question_report() -> Report:
    """A task like TREC-6 on a backbone of 6 layers, with everything that a report can hold."""
    labels = ("abbreviation", "description", "entity", "human", "location", "number")
    neurons = kept(1, 6, 1536, 0.4)
    methods = (("attribution", 0.0), ("activation", 0.02), ("magnitude", 0.05), ("random", 0.09))
    heads = Kept(12, tuple(tuple(h for h in range(12) if (h * 7 + row * 5) % 12 > row - 1)
                           for row in range(6)))  # fmt: skip
    localized = network(376, 400, neurons.share, Discordant(12, 7))
    recovered = network(379, 400, neurons.share, Discordant(9, 7))
    seeds = repeated([0.9400, 0.9375, 0.9450])
    return Report(
        task="trec6",
        description="What kind of answer does a question ask for?",
        backbone="sentence-transformers/all-MiniLM-L6-v2 (6 layers, 12 heads, 1536 neurons)",
        labels=labels,
        created="2025-11-21T14:08:00+00:00",
        command="taskbone localize examples/tasks/trec6.yaml --data data --set search.margin=0.5",
        hardware="x86_64, 2 threads",
        versions=(("taskbone", "0.2.0"), ("torch", "2.13.0"), ("tokenizers", "0.22.1")),
        splits=Splits(4906, 545, 400),
        budget="at most 0.5 points of validation accuracy",
        spent=4.3,
        dense=network(381, 400),
        localized=dataclasses.replace(localized, repeated=seeds, heads_kept=heads.share),
        recovered=dataclasses.replace(recovered, speed_up=1.38, artifact_bytes=181_000),
        keep_curves=KeepCurves(
            "validation",
            0.952,
            tuple(
                KeepCurve(
                    name,
                    tuple(
                        (keep / 10, 0.955 - worse - (0.11 + 4 * worse) * (1 - keep / 10) ** 3)
                        for keep in (1, 2, 3, 4, 5, 7, 9)
                    ),
                )
                for name, worse in methods
            ),
        ),
        neurons=neurons,
        heads=heads,
        overlaps=tuple(
            TaskOverlap(name, overlap(neurons.layers, kept(seed, 6, 1536, share).layers, 1536))
            for name, seed, share in (("agnews", 2, 0.7), ("mrpc", 3, 0.6), ("sms_spam", 4, 0.05))
        ),
        trainings=(
            TrainingCurve("dense", curve(1, 0.952, 40)),
            TrainingCurve("keep 50 %", curve(2, 0.951, 22)),
            TrainingCurve("keep 25 %", curve(3, 0.921, 22)),
            TrainingCurve("keep 40 %", curve(4, 0.948, 17)),
            TrainingCurve("recover", curve(5, 0.953, 12)),
        ),
        confusion=confusion(5, 6, 400),
        mistakes=(
            Mistake(("What is the population of the largest city on the Black Sea ?",),
                    "number", "location", 0.874),
            Mistake(("Who or what was the first to cross the strait, and how many years later did "
                     "the second follow, according to the plaque on the harbour wall? " * 5,),
                    "human", "number", 0.41),
            Mistake(("The shop opens at nine.", HOSTILE), "entity", "abbreviation", 0.998),
        ),
        trials=(
            TrialResult("keep 50 %", 0.5, 1.0, 0.951, True, 0.61),
            TrialResult("keep 25 %", 0.25, 1.0, 0.921, False, 0.58),
            TrialResult("keep 40 %", 0.4, 0.79, 0.948, True, 0.47),
        ),
    )  # fmt: skip


def intent_report() -> Report:
    """A task like Banking77: many classes, 12 layers, and little else known."""
    labels = tuple(
        f"{subject}_{matter}{number // 35 or ''}"
        for number, (subject, matter) in enumerate(
            (subject, matter)
            for _ in range(3)
            for subject in ("card", "transfer", "top_up", "cash_withdrawal", "exchange")
            for matter in ("pending", "declined_by_the_bank", "fee", "limit", "lost", "why", "how")
        )
    )[:77]
    neurons = kept(9, 12, 3072, 0.6)
    return dataclasses.replace(
        question_report(),
        task="banking77",
        description="",
        labels=labels,
        splits=Splits(9003, 1000, 0),
        dense=network(922, 1000),
        localized=network(901, 1000, neurons.share, Discordant(41, 20)),
        recovered=None,
        keep_curves=None,
        neurons=neurons,
        heads=None,
        overlaps=(),
        confusion=confusion(6, 77, 1000),
        mistakes=(),
    )


def bare_report() -> Report:
    """The least that a report can say."""
    return Report("t", "", "b", ("no", "yes"), "", "", "", (), Splits(8, 2, 5), "", None,
                  network(4, 5))  # fmt: skip


REPORTS = {"full": question_report(), "many classes": intent_report(), "bare": bare_report()}


@pytest.fixture(scope="module", params=REPORTS)
def rendered(request: pytest.FixtureRequest) -> str:
    return render(REPORTS[request.param])


class TestPage:
    def test_tags_balance_and_headings_are_there(self, rendered: str) -> None:
        page = Page(rendered)
        assert page.count("h1") == page.count("title") - _tips(page) == 1
        assert page.count("section") == page.count("h2") >= 5

    def test_every_drawing_is_well_formed_and_described(self, rendered: str) -> None:
        drawings = re.findall("<svg.*?</svg>", rendered, re.S)
        assert drawings
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)  # noqa: S314 - written by this test's own page
            assert root.get("role") == "img"
            assert len(root.get("aria-label") or "") > 10
            _, _, width, height = map(float, (root.get("viewBox") or "").split())
            for text in root.iter("text"):
                assert 0 <= float(text.get("x") or -1) <= width
                assert 0 <= float(text.get("y") or -1) <= height

    def test_nothing_is_loaded_from_anywhere(self, rendered: str) -> None:
        page = Page(rendered)
        assert "http://" not in rendered
        assert "https://" not in rendered
        assert "url(" not in rendered
        assert "@import" not in rendered
        named = {name for _, attributes in page.elements for name in attributes}
        assert not named & {"src", "href", "xlink:href", "srcset", "data", "action"}
        assert not [name for name in named if name.startswith("on")]
        assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}

    def test_it_can_be_written_as_utf8(self, rendered: str) -> None:
        assert rendered.encode().decode() == rendered

    def test_the_same_report_gives_the_same_page(self) -> None:
        assert render(question_report()) == render(question_report())


def _tips(page: Page) -> int:
    """Titles of marks inside drawings; the page's own title is the other one."""
    return page.count("title") - 1


class TestHostileTexts:
    def test_are_shown_as_they_are(self) -> None:
        page = Page(render(question_report()))
        shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
        assert shown in page.text

    def test_everywhere_a_text_can_stand(self) -> None:
        report = question_report()
        assert report.keep_curves is not None
        hostile = dataclasses.replace(
            report,
            task=HOSTILE,
            description=HOSTILE,
            backbone=HOSTILE,
            labels=tuple(f"{HOSTILE}{number}" for number in range(6)),
            created=HOSTILE,
            command=HOSTILE,
            hardware=HOSTILE,
            versions=((HOSTILE, HOSTILE),),
            budget=HOSTILE,
            keep_curves=KeepCurves(HOSTILE, 0.9, (KeepCurve(HOSTILE, ((0.5, 0.9),)),)),
            overlaps=(TaskOverlap(HOSTILE, report.overlaps[0].overlap),),
            trainings=(TrainingCurve(HOSTILE, (0.5, 0.6)),),
            mistakes=(Mistake((HOSTILE, HOSTILE), HOSTILE, HOSTILE, 0.5),),
            trials=(TrialResult(HOSTILE, 0.5, 0.5, 0.5, True, 1),),
        )
        page, plain = Page(render(hostile)), Page(render(report))
        assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
        named = {name for _, attributes in page.elements for name in attributes}
        assert named <= {name for _, attributes in plain.elements for name in attributes}

    @given(st.text(max_size=40))
    def test_any_text(self, text: str) -> None:
        mistakes = (Mistake((text,), text, text, 0.5),)
        page = Page(render(dataclasses.replace(bare_report(), task=text, mistakes=mistakes)))
        assert page.count("bdi") == 1


class TestContents:
    def test_headline_figures(self) -> None:
        text = Page(render(question_report())).text
        for value in (
            "95.2 % 92.7 to 96.9",
            "94.0 % 91.2 to 95.9",
            "43.2 KB",
            "1.42x",
            "94.1 \u00b1 0.4 % 3 runs",
            "p = 0.36",
            "4.3 trainings",
            "4906 train, 545 validation, 400 test",
            "at most 0.5 points of validation accuracy",
            "torch 2.13.0",
        ):
            assert value in text

    def test_sections_of_a_full_report(self) -> None:
        text = Page(render(question_report())).text
        for value in (
            "By neurons kept",
            "1536 neurons",
            "layer 6, head 12",
            "sms_spam, layer 1",
            "keep 25 %",
            "rejected",
            "What is the population",
            "87.4 %",
        ):
            assert value in text

    def test_what_is_missing_is_said_or_left_out(self) -> None:
        text = Page(render(bare_report())).text
        for said in (
            "Only the dense network was measured.",
            "All feed-forward neurons are kept.",
            "All attention heads are kept.",
            "There is no other task of this backbone to compare with.",
            "No search was made.",
        ):
            assert said in text
        for absent in ("By neurons kept", "Tuning", "confuses", "gets wrong", "command"):
            assert absent not in text

    def test_without_test_rows_it_says_what_the_figures_are_of(self) -> None:
        text = Page(render(intent_report())).text
        assert "Accuracy on 1000 validation rows" in text
        assert "There are no test rows" in text

    def test_long_texts_are_shortened(self) -> None:
        report = dataclasses.replace(
            bare_report(), mistakes=(Mistake(("x" * 5000,), "no", "yes", 0.5),)
        )
        page = Page(render(report))
        assert "x" * 299 + "\u2026" in page.texts
        assert "x" * 300 not in page.text

    def test_at_most_20_mistakes(self) -> None:
        mistakes = tuple(Mistake((f"row {n}",), "no", "yes", 0.5) for n in range(30))
        page = Page(render(dataclasses.replace(bare_report(), mistakes=mistakes)))
        assert page.count("bdi") == 20


class TestVerdict:
    dense = network(381, 400)

    def say(self, hits: int, against: Discordant | None) -> str:
        return verdict("localized", network(hits, 400, 0.4, against), self.dense, "test")

    def test_may_be_chance(self) -> None:
        assert self.say(376, Discordant(12, 7)) == (
            "The localized network is 1.2 points below the dense one; with 400 test rows this may "
            "be chance (p = 0.36)."
        )

    def test_hardly_chance(self) -> None:
        assert self.say(341, Discordant(45, 5)) == (
            "The localized network is 10.0 points below the dense one; with 400 test rows this is "
            "hardly chance (p < 0.001)."
        )

    def test_above_and_without_a_comparison_of_rows(self) -> None:
        assert self.say(385, None) == (
            "The localized network is 1.0 points above the dense one on 400 test rows."
        )

    def test_equal(self) -> None:
        assert self.say(381, Discordant(3, 3)) == (
            "The localized network is as accurate as the dense one on 400 test rows."
        )

    def test_a_tiny_difference_is_not_called_zero(self) -> None:
        one = verdict("recovered", network(9_001, 40_000), network(9_002, 40_000), "test")
        assert "less than 0.1 points below" in one


class TestConfusion:
    def test_few_classes_show_their_counts(self) -> None:
        report = question_report()
        text = Page(render(report)).text
        assert "entity, answered entity" in text
        assert "Numbers of the classes" not in text

    def test_many_classes_show_the_most_confused_pairs_and_numbers(self) -> None:
        report = intent_report()
        confused = [
            count
            for true, row in enumerate(report.confusion)
            for guess, count in enumerate(row)
            if true != guess and count
        ]
        source = render(report)
        page = Page(source)
        assert "Numbers of the classes" in page.text
        assert page.count("li") == 77
        listed = re.findall(r'<td class="n">(\d+)</td>', source.partition("of the class")[2])
        assert list(map(int, listed)) == sorted(confused, reverse=True)[:15]
        assert f"The 15 most frequent of {len(confused)} confused pairs." in page.text

    def test_no_confusions(self) -> None:
        report = dataclasses.replace(bare_report(), confusion=((3, 0), (0, 2)))
        assert "confuses no classes" in Page(render(report)).text

    def test_a_class_without_rows(self) -> None:
        report = dataclasses.replace(bare_report(), confusion=((3, 2), (0, 0)))
        assert "no, answered yes: 2 of 5" in Page(render(report)).text


class TestNeuronMap:
    def test_cells_cover_all_neurons_once(self) -> None:
        neurons = kept(3, 2, 1000, 0.5)
        text = Page(render(dataclasses.replace(bare_report(), neurons=neurons))).text
        cells = re.findall(r"layer (\d), neurons (\d+) to (\d+): (\d+) of (\d+)", text)
        for layer, indices in enumerate(neurons.layers, 1):
            mine = [tuple(map(int, cell[1:])) for cell in cells if cell[0] == str(layer)]
            assert sum(cell[2] for cell in mine) == len(indices)
            for start, end, count, size in mine:
                assert size == end - start + 1
                assert count == sum(start <= index <= end for index in indices)

    def test_fewer_neurons_than_cells(self) -> None:
        report = dataclasses.replace(bare_report(), neurons=Kept(8, ((0, 7), ())))
        text = Page(render(report)).text
        assert "layer 1, neurons 7 to 7: 1 of 1" in text
        assert "layer 2, neurons" not in text


class TestCharts:
    @given(
        st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=40),
        st.booleans(),
    )
    def test_points_stay_within_the_axes(
        self, points: list[tuple[float, float]], whole: bool
    ) -> None:
        drawing = lines("some chart", [Series("one", tuple(points))], "x", "y", None, whole)
        root = ElementTree.fromstring(drawing)  # noqa: S314 - written by the line above
        corners = next(iter(root.iter("polyline"))).get("points") or ""
        for corner in corners.split():
            x, y = map(float, corner.split(","))
            assert 44 <= x <= 466
            assert 54 <= y <= 254

    def test_epochs_have_whole_ticks(self) -> None:
        drawing = lines("some chart", [Series("one", ((1, 10), (2, 20)))], "x", "y", None, True)
        ticks = re.findall(r'text-anchor="middle" class="quiet" >([^<]*)<', drawing)
        assert ticks == ["1", "2", "x"]

    def test_series_differ_in_shape_and_colour(self) -> None:
        series = [Series(str(number), ((0, 0), (1, number))) for number in range(4)]
        drawing = lines("some chart", series, "x", "y")
        marks = set(re.findall(r'<path class="(c\d)" d="M\S+ [\d.]+(m[^"]+)"', drawing))
        assert len(marks) == 4
        assert {shape for _, shape in marks} == set(MARKERS)

    def test_an_interval_lies_around_its_value(self) -> None:
        drawing = intervals("some chart", [Range("dense", 80, 90, 95)], "accuracy (%)")
        whisker = re.search(r'class="whisker c0" x1="(\S+)" y1="\S+" x2="(\S+)"', drawing)
        mark = re.search(r'<path class="c0" d="M(\S+) ', drawing)
        assert whisker is not None
        assert mark is not None
        assert float(whisker[1]) < float(mark[1]) < float(whisker[2])

    def test_a_bar_is_as_long_as_its_share(self) -> None:
        drawing = bars("some chart", [("a", 0.25, "25 %")], "share")
        track, bar = map(float, re.findall(r'<rect [^>]*width="(\S+)"', drawing))
        assert bar == pytest.approx(track / 4, abs=0.01)

    def test_a_faint_cell_still_shows_and_an_empty_one_does_not(self) -> None:
        cells = [Cell(0, 0, 0.001, "faint"), Cell(0, 1, 0.0, "empty"), Cell(0, 2, 1.0, "full")]
        drawing = grid("some chart", ["r"], ["a", "b", "c"], cells, "x", "y", [])
        faint, empty, full = re.findall(
            r'<rect class="cell (\w+)"[^>]*height="\S+"([^>]*)>', drawing
        )
        assert faint == ("right", ' fill-opacity="0.15"')
        assert empty == ("none", "")
        assert full == ("right", "")
