"""The study written down: numbers as text, the files for programs, and the page in a real browser."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import csv
import html.parser
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for module in ("torch", "sklearn", "joblib", "plotly", "jinja2", "rich"):
    pytest.importorskip(module)

from browser import Opened, in_browser
from test_study_claims import setup, tiny, world

from batchnorm.study import report, summary
from batchnorm.study.claims import Finding, final_accuracy, judge
from batchnorm.study.experiments import CLAIMS, EXPERIMENTS
from batchnorm.study.tasks import Records, Setup

SEEDS = 6
Findings = tuple[Records, list[Finding]]


@pytest.fixture(scope="module")
def mixed() -> Findings:
    """Records of everything, with every verdict among the findings, and a run that diverged at once."""
    of = setup()
    tasks = [task for experiment in EXPERIMENTS for task in of.seeded(experiment.tasks(of))]
    runs = {task: world("faster-at-same-rate", true=True)(task) for task in dict.fromkeys(tasks)}
    dead = next(task for task in runs if task.measure == "training" and task.rate == 2.0)
    runs[dead] = runs[dead]._replace(finite=False, values={"loss": [], "validation": [], "test": [], "train": 0.0})
    records = Records(of, runs)
    found = [judge(claim, records) for claim in CLAIMS]
    found[1] = replace(found[1], effect=None, interval=None, effects=[], verdict="undecided")
    found[2] = replace(found[2], verdict="contradicted")
    found[3] = replace(found[3], verdict="not supported")
    return records, found


def page(mixed: Findings) -> str:
    return report.page(mixed[0], list(EXPERIMENTS), mixed[1])


class Page(html.parser.HTMLParser):
    """The parts of a page that could make a browser ask for something, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.styles = ""
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.inside = ""
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.links.append(value or "")
            if name == "style":
                self.styles += value or ""
            if name == "id":
                self.ids.append(value or "")
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.styles += data
        elif self.inside != "script":
            self.words += data


# --- The page, read ---------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(mixed: Findings) -> None:
    text = page(mixed)
    read = Page(text)
    assert [link for link in read.links if not link.startswith("#")] == ["data:,"]
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)
    assert "url(" not in read.styles
    assert "@import" not in read.styles
    assert not {"iframe", "img", "object", "embed", "audio", "video", "base", "form"} & set(read.tags)
    assert read.policy.startswith("default-src 'none'")
    assert "http" not in read.policy
    assert len(text.encode()) < 6e6


def test_the_page_says_every_claim_and_verdict(mixed: Findings) -> None:
    _, found = mixed
    assert [finding.verdict for finding in found[:4]] == ["supported", "undecided", "contradicted", "not supported"]
    read = Page(page(mixed))
    words = " ".join(read.words.split())
    for finding in found:
        assert words.count(finding.claim.statement) >= 2, "in the table and in its section"
        assert report.effect(finding) in words
        assert report.meaning(finding) in words
        assert finding.claim.published in words
        assert finding.claim.id in read.ids
    for mark, word in zip("✓?✗○", ("supported", "undecided", "contradicted", "not supported"), strict=True):
        assert f"{mark} {word}" in words
    assert len(read.ids) == len(set(read.ids))


def test_the_page_and_the_markdown_escape_names(mixed: Findings) -> None:
    records, found = mixed
    name = "</script><script>alert(1)</script> | `x`"
    changed = Records(Setup(records.settings, tiny(name)), records.runs)
    text = report.page(changed, list(EXPERIMENTS), found)
    assert name not in text
    assert "alert(1)" in text
    text = report.markdown(changed, list(EXPERIMENTS), found)
    assert "<script>" not in text.replace("\\<", "")


def test_markdown_has_a_row_and_a_meaning_for_every_claim(mixed: Findings) -> None:
    lines = report.markdown(mixed[0], list(EXPERIMENTS), mixed[1]).splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(CLAIMS)
    assert all(row.replace("\\|", "").count("|") == 7 for row in rows)
    for finding in mixed[1]:
        assert any(finding.claim.statement in row and finding.verdict in row for row in rows)
        assert any(line.startswith(f"**{finding.claim.statement}** {report.meaning(finding)}") for line in lines)


def test_intervals_of_several_rounds_say_how_confident_they_are(mixed: Findings) -> None:
    """Six rounds have intervals of 1 - 0.05/6 each."""
    records = Records(setup(SEEDS, doublings=5), mixed[0].runs)
    said = "Intervals are at 99.17%, so that those of all 6 rounds hold at 95%."
    assert said in report.markdown(records, list(EXPERIMENTS), mixed[1])
    assert "Intervals are at" not in report.markdown(mixed[0], list(EXPERIMENTS), mixed[1])
    assert report.confidence((2, 4, 8)) == "", "one of the rounds can decide"
    words = " ".join(Page(page((records, mixed[1]))).words.split())
    assert "judged 6 times has more chances to be decided by accident, so each interval has 99.17%" in words
    assert f"one in twenty may be wrong, of these {len(CLAIMS)} about 1." in words
    assert report.environment(records)["confidence"] == pytest.approx(1 - 0.05 / 6)


# --- Files for programs -----------------------------------------------------------------------------------------------


def test_results_are_strict_json(mixed: Findings) -> None:
    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    results = json.loads(report.to_json(report.results(*mixed)), parse_constant=refuse)
    assert set(results) == {"claims", "runs", "environment"}
    assert [claim["id"] for claim in results["claims"]] == [claim.id for claim in CLAIMS]
    assert len(results["runs"]) == len(mixed[0].runs)
    for claim in results["claims"]:
        assert {"statement", "verdict", "effect", "interval", "unit", "margin", "per_seed"} <= set(claim)
        assert len(claim["per_seed"]["first"]) == len(claim["per_seed"]["second"]) == SEEDS
    assert results["claims"][1]["effect"] is None


def test_not_a_number_is_never_written(mixed: Findings) -> None:
    results = report.results(*mixed)
    results["claims"][0]["effect"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        report.to_json(results)


def test_runs_are_a_table(mixed: Findings) -> None:
    rows = list(csv.DictReader(io.StringIO(report.table(mixed[0]))))
    assert len(rows) == len(mixed[0].runs)
    assert {"measure", "variant", "rate", "seed", "finite", "test_accuracy", "steps_to_target"} <= set(rows[0])
    assert None not in rows[0].values()
    by_key = {json.dumps(run.task.said()): run for run in mixed[0].runs.values()}
    for row, key in zip(rows, sorted(by_key, key=lambda key: str(json.loads(key))), strict=True):
        run = by_key[key]
        assert (row["variant"], float(row["rate"]), row["seed"]) == (
            run.task.variant, run.task.rate, str(run.task.seed)
        )  # fmt: skip
        if run.task.trains:
            assert float(row["test_accuracy"]) == final_accuracy(run)


def test_the_environment_names_versions_and_neither_paths_nor_hosts(mixed: Findings) -> None:
    environment = report.environment(mixed[0])
    assert environment["versions"]["torch"]
    assert environment["versions"]["scipy"]
    assert environment["confidence"] == pytest.approx(0.95)
    assert environment["seeds"] == list(range(SEEDS))
    text = json.dumps(environment)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text
    assert os.getcwd() not in text


# --- Numbers as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "effect", "interval", "shown"),
    [
        ("", 2.816, (2.357, 3.421), ("2.8×", "2.4 to 3.4")),
        ("", 2.816, (2.79, 2.84), ("2.82×", "2.79 to 2.84")),
        ("", 14.37, (9.3, 24.8), ("14×", "9 to 25")),
        ("at least", 3.0, (3.0, 3.0), ("at least 3.0×", "3.0 to 3.0")),
        ("", None, None, ("nothing to compare", "no interval")),
        ("", 0.5, None, ("0.50×", "no interval")),
    ],
)
def test_numbers_as_text(mixed: Findings, bound: Any, effect: Any, interval: Any, shown: tuple[str, str]) -> None:
    finding = replace(mixed[1][0], bound=bound, effect=effect, interval=interval)
    assert (report.effect(finding), report.interval(finding)) == shown


def test_differences_have_a_sign(mixed: Findings) -> None:
    finding = replace(mixed[1][3], effect=1.493, interval=(-0.5, 2.431))
    assert (report.effect(finding), report.interval(finding)) == ("+1.5 points", "-0.5 to +2.4")
    assert report.effect(replace(mixed[1][4], effect=-3.6, interval=(-3.65, -3.58))) == "-3.60 decades"
    assert report.effect(replace(mixed[1][4], effect=-0.04, interval=(-1.0, 0.9))) == "+0.0 decades"


def test_a_median_of_seeds_that_mostly_never_arrive_is_never(mixed: Findings) -> None:
    claim = mixed[1][0].claim
    assert report.compared(claim, [10, None, None, 20]) == "never"
    assert report.compared(claim, [10, None, 30, 20]) == "25"
    assert report.compared(claim, [10, 20, 30, None, None]) == "30"
    assert report.compared(claim, [None]) == "never"


def test_the_meaning_is_two_sentences_and_follows_the_verdict(mixed: Findings) -> None:
    texts = {
        verdict: report.meaning(replace(mixed[1][0], verdict=verdict))
        for verdict in ("supported", "not supported", "contradicted", "undecided")
    }
    assert texts["supported"].endswith(CLAIMS[0].if_true)
    assert texts["not supported"].endswith(CLAIMS[0].if_false)
    assert texts["contradicted"].startswith("The opposite holds here.")
    assert len(set(texts.values())) == 4


# --- What was learned -------------------------------------------------------------------------------------------------


def test_three_sentences(mixed: Findings) -> None:
    none = [replace(finding, verdict="undecided") for finding in mixed[1][:2]]
    assert summary.sentences(none) == (
        "Of 2 claims 0 hold here, 0 do not, and 2 are left undecided.",
        "No effect is clear enough to be named.",
        "No finding disagrees with the literature.",
    )
    by_id = {finding.claim.id: finding for finding in mixed[1]}
    some = [
        replace(by_id["faster-at-same-rate"], verdict="supported", effect=3.0, interval=(2.5, 4.0)),
        replace(by_id["small-batches-hurt"], verdict="contradicted"),
        replace(by_id["reduces-covariate-shift"], verdict="supported", effect=1.3, interval=(1.2, 1.4)),
    ]
    counted, clearest, against = summary.sentences(some)
    assert counted == "Of 3 claims 2 hold here, 1 does not, and 0 are left undecided."
    statement = some[0].claim.statement
    assert clearest == f"The clearest effect: {statement[0].lower()}{statement[1:]}"
    assert against.startswith("The literature disagrees with 2 findings: “")
    assert "; “It reduces internal covariate shift” is supported." in against


@pytest.mark.parametrize(
    ("claim", "verdict", "otherwise"),
    [
        ("reduces-covariate-shift", "supported", True),
        ("reduces-covariate-shift", "contradicted", False),
        ("reduces-covariate-shift", "not supported", False),
        ("reduces-covariate-shift", "undecided", False),
        ("steadiness-is-why", "supported", True),
        ("gradient-flow-relu", "contradicted", False),
        ("gradient-flow-relu", "supported", True),
        ("faster-at-same-rate", "supported", False),
        ("faster-at-same-rate", "not supported", True),
        ("beats-weight-norm", "supported", True),
        ("beats-output-norm", "contradicted", False),
    ],
)
def test_disagreement_with_the_literature_is_marked(mixed: Findings, claim: str, verdict: Any, otherwise: bool) -> None:
    records, found = mixed
    (finding,) = (replace(each, verdict=verdict) for each in found if each.claim.id == claim)
    assert summary.disagrees(finding) == otherwise
    words = Page(report.page(records, list(EXPERIMENTS), [finding])).words
    assert words.count("≠") == (2 if otherwise else 0) + 1, "in the table, in the section, and in what explains it"
    assert ("**Not so here:**" in report.markdown(records, list(EXPERIMENTS), [finding])) == otherwise
    assert report.results(records, [finding])["claims"][0]["disagrees"] == otherwise


def test_every_claim_without_a_published_result_disagrees_with_none() -> None:
    assert all(claim.published or claim.literature is None for claim in CLAIMS)


def test_the_page_opens_with_what_was_learned_then_all_effects_then_the_contents(mixed: Findings) -> None:
    text = page(mixed)
    read = Page(text)
    words = " ".join(read.words.split())
    learned = " ".join(summary.sentences(mixed[1]))
    places = [
        words.index(learned),
        words.index("All effects"),
        words.index("Contents"),
        words.index("Claim, and what was measured"),
    ]
    assert places == sorted(places)
    ids = [experiment.id for experiment in EXPERIMENTS]
    assert [link for link in read.links if link.startswith("#")][: len(ids) + 2] == [
        "#claims", *(f"#{each}" for each in ids), "#method"
    ]  # fmt: skip
    assert " ".join(summary.sentences(mixed[1])).split(".")[0] in report.markdown(
        *mixed[:1], list(EXPERIMENTS), mixed[1]
    )


def test_the_forest_has_a_row_for_every_effect(mixed: Findings) -> None:
    figures = json.loads(page(mixed).split('id="figures">')[1].split("</script>")[0])
    rows = {
        name: (trace["name"], x)
        for trace in figures["effects"]["data"]
        for name, x in zip(trace["y"], trace["x"], strict=True)
    }
    shown = [finding for finding in mixed[1] if finding.interval is not None]
    assert len(rows) == len(shown)
    for finding in shown:
        name = finding.claim.id.replace("-", " ") + " ≠" * summary.disagrees(finding)
        group, x = rows[name]
        assert group == finding.verdict
        assert finding.effect is not None
        in_margins = finding.effect / finding.claim.margin
        if finding.claim.unit == "ratio":
            in_margins = math.log(finding.effect) / math.log(finding.claim.margin)
        assert math.sinh(x) == pytest.approx(in_margins, rel=0.02, abs=0.01)


def test_an_undecided_finding_says_how_many_seeds_it_would_take(mixed: Findings) -> None:
    finding = replace(mixed[1][0], verdict="undecided", more_seeds=9)
    assert report.meaning(finding).endswith(
        "About 15 seeds would decide it, in a study that starts with so many, if the effect is what it seems."
    )
    assert "may never decide it" in report.meaning(replace(finding, more_seeds=None))
    assert report.more(replace(finding, effects=[])) == "Too few seeds have an effect to compare."
    one = replace(finding, effects=[1.0], without=[1.0], with_=[1.0])
    assert report.more(one) == "Fewer than 5 seeds decide nothing."
    assert report.more(replace(finding, verdict="supported")) == ""


# --- The page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(mixed: Findings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Opens the report."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(mixed))
    with in_browser(path, ready="html[data-drawn]") as open_at:
        yield open_at


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_every_plot_is_drawn_without_a_word_or_a_request(opened: Any, mixed: Findings, width: int, height: int) -> None:
    tab, said = opened(width, height)
    assert said == []
    plots = sum(len(experiment.plots(mixed[0])) for experiment in EXPERIMENTS)
    plots += sum(bool(finding.effects) for finding in mixed[1]) + 1
    drawn = tab.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.main-svg .trace').length)"
    )
    assert len(drawn) == plots
    assert all(traces > 0 for traces in drawn)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    tab.context.close()


def test_the_table_can_be_sorted_with_mouse_and_keyboard(opened: Any, mixed: Findings) -> None:
    tab, said = opened(1200, 900)

    def verdicts() -> list[str]:
        return tab.eval_on_selector_all(
            "#verdicts tbody .verdict", "cells => cells.map(c => c.textContent.trim().slice(2))"
        )

    original = [finding.verdict for finding in mixed[1]]
    order = list(report.MARKS)
    assert verdicts() == original
    tab.click("#verdicts th:nth-child(3) button")
    assert verdicts() == sorted(original, key=order.index)
    assert tab.get_attribute("#verdicts th:nth-child(3)", "aria-sort") == "ascending"
    tab.focus("#verdicts th:nth-child(3) button")
    tab.keyboard.press("Enter")
    assert verdicts() == sorted(original, key=order.index, reverse=True)
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Space")
    figures = tab.eval_on_selector_all(
        "#verdicts tbody tr", "rows => rows.map(r => Number(r.dataset.keys.split(' ')[1]))"
    )
    assert figures == sorted(figures, reverse=True)
    tab.click("#verdicts th:nth-child(1) button")
    assert verdicts() == original
    assert said == []
    tab.context.close()


def test_a_slider_changes_its_plot(opened: Any) -> None:
    tab, said = opened(1200, 900)
    line = "document.querySelector('#same-rate').data.at(-1).y.at(-1)"
    before = tab.evaluate(line)
    tab.focus("input[data-plot=same-rate]")
    tab.keyboard.press("End")
    assert tab.text_content(".rate output") == "2"
    assert tab.evaluate(line) != before
    assert said == []
    tab.context.close()


def test_it_is_dark_where_the_reader_is(opened: Any) -> None:
    tab, _ = opened(1200, 900, color_scheme="dark")
    red, green, blue = eval(tab.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb"))
    assert max(red, green, blue) < 60
    assert tab.evaluate("getComputedStyle(document.querySelector('.plot text')).fill") == "rgb(231, 234, 238)"
    tab.context.close()


def test_print_shows_every_plot_and_all_that_is_folded_away(opened: Any) -> None:
    tab, said = opened(1200, 900)
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
    assert (
        tab.evaluate(
            "Math.max(...[...document.querySelectorAll('.main-svg')].map(s => s.getBoundingClientRect().width))"
        )
        <= 640
    )
    assert len(tab.pdf()) > 100_000
    assert said == []
    tab.context.close()
