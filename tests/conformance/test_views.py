"""tests of the views: the HTML page and its pictures, the summary, the badge, JUnit."""

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from conformance.core.fault import first_killer
from conformance.core.judge import Entry, Judge, Violation
from conformance.core.kind import kind_of
from conformance.core.picture import MOST_COLUMNS, bars, distance, grid
from conformance.core.shrink import shrink
from conformance.pictures.panels import bars_html, grid_html
from conformance.router.case import RouterCase
from conformance.run.badge import BAD, GOOD, PARTIAL, badge
from conformance.run.cli import main
from conformance.run.deviations import Deviation
from conformance.run.html_page import first_failure, html
from conformance.run.kinds import load_faults
from conformance.run.report import assemble, junit, not_judged, record
from conformance.run.views import STEP_SUMMARY, short_markdown, write_folder
from conformance.run.watch import Died
from conformance.subjects.reference import Reference
from moe_ref import RouterSpec

FAULTS = load_faults()
PICTURES = {
    # fault -> a word of the title of each panel that its failure has
    "worst-groups-kept": ("ranked", "weights"),
    "bare-outputs-added": ("Rows of each expert", "output of the layer", "ranked", "weights"),
    "slot-numbers-overflow": ("Rows of each expert",),  # names a token of a batch that its check made itself
    "sizes-are-not-exchanged": ("sends", "receives", "local expert"),
    "tensor-ranks-keep-their-partial-sums": ("Distance", "sends"),
    "slices-of-other-tensor-ranks-are-left-out": ("gradient", "sends"),
    "the-bias-never-moves": ("Load", "before", "after"),
    "the-capacity-is-of-the-batch": ("chose", "keeps"),
    "only-the-first-slot-of-a-pass-is-counted": ("Counts", "Bias"),
}


def failing(name: str) -> dict:
    """The record of a fault's failure, on a small case."""
    judge, violation = Judge(FAULTS[name].kind.faulty(FAULTS[name])), first_killer(FAULTS[name])
    assert violation is not None
    found = record(judge, violation.requirement, Entry(violation=shrink(judge, violation), judged=1))
    found["failure"]["looks_like"] = {name: f"{name}: <b>wrong</b> huggingface/transformers#45440"}
    return json.loads(json.dumps(found))  # as it is read from report.json


@pytest.fixture(scope="module")
def failures() -> dict[str, dict]:
    return {name: failing(name) for name in PICTURES}


def report_of(records: list[dict], *, complete: bool = True) -> dict:
    names = sorted({r["subject"] for r in records})
    rest = [each for name in names for each in not_judged(name, [r for r in records if r["subject"] == name])]
    subjects = [{"name": name, "version": "1"} for name in names]
    return assemble(subjects, [*records, *rest], {"python": "3", "family": None}, complete=complete)


@pytest.fixture(scope="module")
def report(failures) -> dict:
    """One subject with every failure, and one that holds."""
    own = [r | {"subject": "wrong", "failure": r["failure"] | {"subject": "wrong"}} for r in failures.values()]
    holds = record(Judge(Reference()), "SEL-1", Entry(judged=3))
    declared = {"deviation": "SEL-2", "reason": "a < b", "link": "https://example.org/1", "kind": "bug", "cases": 2}
    known = record(Judge(Reference()), "SEL-2", Entry(judged=3)) | {"status": "known", "known": [declared]}
    advice = record(Judge(Reference()), "SEL-6", Entry(violation=Violation("slots", requirement="SEL-6"), judged=1))
    return report_of([*own, holds, known, advice])


# pictures


@pytest.mark.parametrize("name", PICTURES)
def test_a_failure_of_each_kind_has_its_panels(failures, name):
    panels = failures[name]["failure"]["picture"]
    assert len(panels) >= len(PICTURES[name])
    assert all(any(word in panel["title"] for panel in panels) for word in PICTURES[name])
    assert any(panel.get("wrong") or panel.get("chosen") != panel.get("chosen_found") for panel in panels)


def test_scores_stand_in_their_groups_with_what_each_side_chooses(failures):
    scores = failures["worst-groups-kept"]["failure"]["picture"][0]
    spec = failures["worst-groups-kept"]["failure"]["case"]["spec"]
    assert scores["groups"] == sorted(scores["groups"])
    assert len(scores["kept"]) == spec["num_limited_groups"]
    assert {scores["groups"][place] for place in scores["chosen"]} <= set(scores["kept"])
    assert not {scores["groups"][place] for place in scores["chosen_found"]} <= set(scores["kept"])
    others = sorted(set(scores["groups"]) - set(scores["kept"]))
    assert "kept by the reference only" in bars_html(scores | {"kept_found": others}, "wrong")


def test_a_subject_that_died_is_not_called_again():
    class Dying(Reference):
        def route(self, *arguments, **inputs):
            raise AssertionError("it is called again")

    case = RouterCase(spec=RouterSpec(num_experts=4, top_k=2), logits_TE=np.arange(8.0).reshape(2, 4))
    died = Died("ended the process", expected="a result", requirement="RUN-1", case=case)
    scores, weights = record(Judge(Dying()), "RUN-1", Entry(violation=died))["failure"]["picture"]
    assert scores["chosen"] == [3, 2]
    assert "chosen_found" not in scores
    assert "found" not in weights


def test_a_known_difference_has_the_page_and_the_picture_of_its_witness():
    fault, violation = FAULTS["worst-groups-kept"], first_killer(FAULTS["worst-groups-kept"])
    assert violation is not None
    declared = Deviation(
        requirement="GRP-1", when=frozenset(), kind="bug", reason="r", link="https://x.org", witness=violation.case
    )
    judge = Judge(fault.kind.faulty(fault), [declared])
    (known,) = record(judge, "GRP-1", Entry(judged=3, known=Counter({declared: 3})))["known"]
    assert known["cases"] == 3
    assert known["failure"]["page"].startswith("GRP-1 MUST")
    assert known["failure"]["picture"][0]["chosen"] != known["failure"]["picture"][0]["chosen_found"]
    gone = record(Judge(Reference(), [declared]), "GRP-1", Entry(judged=3, known=Counter({declared: 3})))
    assert "failure" not in gone["known"][0]


def test_of_very_many_experts_the_best_and_the_chosen_are_shown():
    rng = np.random.default_rng(0)
    case = RouterCase(spec=RouterSpec(num_experts=512, top_k=4), logits_TE=rng.normal(size=(1, 512)))
    scores, _ = kind_of("SEL-1").picture(Judge(Reference()), Violation("", case=case, requirement="SEL-1"), case)
    data = scores.to_json()
    assert len(data["columns"]) == MOST_COLUMNS
    assert [data["columns"][place] for place in data["chosen"]] == [str(e) for e in case.reference.expert_ids_TK[0]]
    assert f"{512 - MOST_COLUMNS} experts" in data["note"]


def test_numbers_that_are_none_and_huge_ones_leave_the_others_visible():
    panel = bars("x", "abc", np.array([1.0, -np.inf, 2.0]), np.array([1.0, np.nan, 1e30])).to_json()
    drawn = bars_html(panel, "mine")
    assert panel["wrong"] == [1, 2]
    assert "-∞" in drawn
    assert "NaN" in drawn
    assert "↑" in drawn
    heights = [float(h) for h in re.findall(r'<rect class="wanted[^>]*height="([\d.]+)"', drawn)]
    assert heights[1] > heights[0] > 10


def test_a_distance_is_a_part_of_the_largest_number_and_infinite_where_one_alone_is_a_number():
    wanted = np.array([0.0, -4.0])
    assert distance(wanted, np.array([1.0, -4.0])) == 0.25
    assert distance(wanted, wanted + 1e-5) == 0
    assert distance(wanted, np.array([np.nan, -4.0])) == np.inf
    assert distance(np.array([np.nan, 1]), np.array([np.nan, 1])) == 0
    assert distance(np.zeros(0), np.zeros(0)) == 0


def test_a_wrong_cell_says_what_the_reference_has_there():
    panel = grid("x", ["a", "b"], ["0", "1"], np.array([[1.0, 2], [3, 4]]), np.array([[1.0, 2], [3, 5]])).to_json()
    (cell,) = re.findall(r'<td class="wrong"[^>]*>(.*?)</td>', grid_html(panel, "mine"))
    assert cell == "5 <small>≠ 4</small>"


# the page


class Page(HTMLParser):
    """Reads a page, and holds that every tag is closed where it was opened."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(html(report))


def test_a_page_loads_nothing_and_runs_nothing(page):
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "use"}
    assert {key for _, attrs in page.tags for key in attrs} & {"src", "srcset", "action", "data"} == set()
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "url(" not in "".join(page.words)
    assert "default-src 'none'" in page.of("meta")[1]["content"]


def test_every_link_inside_a_page_has_its_place_and_no_place_is_there_twice(page):
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1
    inside = {attrs["href"][1:] for attrs in page.of("a") if attrs["href"].startswith("#")}
    assert inside <= ids.keys()
    assert {attrs["href"].partition("://")[0] for attrs in page.of("a") if not attrs["href"].startswith("#")} == {
        "https"
    }


def test_what_a_page_tells_can_be_reached_by_keyboard_and_read_aloud(page):
    assert all(attrs.get("scope") for attrs in page.of("th"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.of("svg"))
    scrolling = [attrs for attrs in page.of("div") if attrs.get("class") == "scroll"]
    assert scrolling
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    assert len(page.of("summary")) == len(page.of("details"))
    assert page.of("html")[0]["lang"] == "en"


def test_a_page_has_each_failure_as_text_and_what_a_person_wrote_is_no_markup(page, report, failures):
    text = "".join(page.words)
    assert all(r["failure"]["page"] in text for r in report["requirements"] if "failure" in r)
    assert "<b>wrong</b>" in text
    assert "a < b" in text
    assert page.of("b") == [{} for _ in page.of("b")]
    assert "https://github.com/huggingface/transformers/issues/45440" in {attrs["href"] for attrs in page.of("a")}
    details = [attrs for attrs in page.of("details") if attrs.get("class") == "failure"]
    assert len(details) == len(failures) + 2
    assert [attrs["id"] for attrs in details if "open" in attrs] == ["f-wrong-GRP-1"]
    assert {"failures", "advice", "known", "matrix"} <= {attrs.get("id") for attrs in page.of("section")}


def test_a_page_says_in_which_stage_the_first_failure_is(page):
    (first,) = [attrs for attrs in page.of("li") if "first" in attrs.get("class", "").split()]
    assert first["class"] == "bad first"
    words = [word for word in page.words if word.strip()]
    at = words.index("first failure")
    assert "groups" in words[at - 4 : at]


def test_the_first_failure_is_the_first_that_has_a_page_of_its_own(failures):
    groups, layer = failures["worst-groups-kept"], failures["bare-outputs-added"]
    assert first_failure([layer, groups]) is groups
    told = groups | {"failure": groups["failure"] | {"first": {"requirement": layer["id"], "why": "the same fault"}}}
    assert first_failure([told, layer]) is layer
    assert first_failure([told]) is told
    assert first_failure([]) is None


# the others


def test_junit_has_a_case_for_each_requirement_by_its_id(report):
    root = ET.fromstring(junit(report).partition("\n")[2])
    wrong = root.find("testsuite[@name='wrong']")
    assert wrong is not None
    names = [case.attrib["name"] for case in wrong]
    assert len(set(names)) == len(names)
    assert set(names) == {r["id"] for r in report["requirements"]}
    assert wrong.find("testcase[@name='GRP-1']/failure") is not None


def test_a_summary_names_the_first_failing_stage_and_folds_each_page(report):
    text = short_markdown(report)
    assert "- ❌ **wrong** 1: " in text
    assert "the first failure is in stage **groups**" in text
    assert "- ✅ **reference** 1: " in text
    assert text.count("<details>") == text.count("</details>") == 2 + len(PICTURES)
    assert "a < b <https://example.org/1>" in text


def test_a_badge_is_green_grey_or_red():
    holds = [record(Judge(Reference()), "SEL-1", Entry(judged=3))]
    whole = {"requirements": holds, "complete": True}
    assert "moe-conformance: 1/1<" in badge(whole)
    assert GOOD in badge(whole)
    assert PARTIAL in badge(whole | {"complete": False})
    assert "1/1 partial" in badge(whole | {"complete": False})
    fails = record(Judge(Reference()), "SEL-2", Entry(violation=Violation("x", requirement="SEL-2"), judged=1))
    assert BAD in badge({"requirements": [*holds, fails], "complete": False})
    ET.fromstring(badge(whole))


def test_views_are_made_of_a_stored_report(report, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(STEP_SUMMARY, str(tmp_path / "step.md"))
    write_folder(report, tmp_path / "out")
    files = {name: tmp_path / "views" / name for name in ("html", "summary", "junit", "badge")}
    chosen = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert main(["report", str(tmp_path / "out"), *chosen]) == 1
    assert capsys.readouterr().out.count("wrote ") == 4
    assert files["html"].read_text() == (tmp_path / "out" / "report.html").read_text() == html(report)
    assert files["summary"].read_text() == short_markdown(report)
    assert not (tmp_path / "step.md").exists()
    assert main(["report", str(tmp_path / "out")]) == 1
    assert (tmp_path / "step.md").read_text() == short_markdown(report)


def test_a_report_of_another_specification_is_a_usage_error(report, tmp_path, capsys):
    rows = [r | {"id": "SEL-" + "999"} for r in report["requirements"][:1]]
    (tmp_path / "report.json").write_text(json.dumps(report | {"requirements": rows}))
    assert main(["report", str(tmp_path)]) == 4
    assert "SEL-" + "999" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 4
