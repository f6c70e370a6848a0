"""The report: what is wrong stands where one looks, whatever a row of the user's data holds."""

import io
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from planted import report as planted_report
from rich.cells import cell_len
from rich.console import Console

from llmkit.check import formats
from llmkit.check.console import LONGEST, evidence_line, print_report, visible
from llmkit.check.page import page, verdict
from llmkit.check.report import CheckFailed, CheckResult, Report
from llmkit.verbs import CheckConfig

SECRET = "the patient's name is Ada"
NASTY = '<script>alert("x")</script>\n\tif x:  return\r\n\x1b[31mred\x07 [bold]b[/bold] '
NASTY += "\u202eevil مرحبا 👩\u200d👧 \ud83d ::error::"


def result(id: str, status: str, measured: str = "3 of 8 rows", **options) -> CheckResult:
    given = dict(limit="1%", fix="mend `it`." if status in ("fail", "warn") else "", title=f"What {id} is about.")
    return CheckResult(id, "rows", 1, status, measured, **given | options)


def sample() -> Report:
    evidence = [{"row": 3, "position": 7, "ids": [5, 6, 7], "text": text, "note": "ends"} for text in (SECRET, NASTY)]
    return Report(
        "runs/<b>x</b>",
        [
            result("first-fail", "fail", evidence=evidence),
            result("fine", "pass", "0 of 8 rows"),
            result("other", "pass", "0 of 8 rows " * 20),
            result("odd", "warn"),
            result("crashed", "not_run", f"the check crashed: KeyError: '{SECRET}' (rows.py:12)", limit=""),
            result("absent", "not_applicable", "no trainer given", limit=""),
            result("absent-too", "not_applicable", "no trainer given", limit=""),
            result("last-fail", "fail", evidence=[{"note": "tensor x"}] * 9),
        ],
    )


def printed(report: Report, width: int, **options) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, **options))
    return out.getvalue()


# the object


def test_exit_code_is_that_of_the_worst():
    def code(*statuses: str) -> int:
        return Report("x", [result(s, s) for s in statuses]).exit_code

    assert code("pass", "warn", "not_applicable") == 0
    assert code("pass", "not_run", "fail") == 1
    assert code("pass", "not_run") == 3


def test_raise_on_fail_names_what_failed():
    with pytest.raises(CheckFailed, match="first-fail: 3 of 8 rows; last-fail"):
        sample().raise_on_fail()
    clean = Report("x", [result("fine", "pass")])
    assert clean.raise_on_fail() is clean


def test_a_report_comes_back_from_its_file(tmp_path):
    """Half a surrogate pair in a row must not cost the file."""
    sample().write_json(tmp_path / "x.json")
    value = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert value["version"] == 1 and value["summary"]["fail"] == 2 and value["summary"]["exit_code"] == 1
    assert Report.from_dict(value) == sample()
    value["checks"][0]["of a later version"] = 1
    assert Report.from_dict(value)["first-fail"].status == "fail"
    with pytest.raises(KeyError):
        sample()["nosuch"]


def test_redaction_keeps_ids_and_drops_text_from_every_output(tmp_path):
    report = sample().redacted()
    report.write_json(tmp_path / "x.json")
    outputs = [
        printed(report, 120), page(report), formats.github(report), formats.junit(report), str(report),
        report._repr_html_(), (tmp_path / "x.json").read_text(),
    ]  # fmt: skip
    for text in outputs:
        assert "Ada" not in text and "alert" not in text and "KeyError" in text
    assert "ids [5, 6, 7]" in outputs[0] and "5, 6, 7" in outputs[1]
    assert "Ada" in printed(sample(), 120)  # control


# the console


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_and_nothing_but_text_is_piped(width):
    lines = printed(sample(), width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    assert "\x1b" not in "".join(lines) and "\u202e" not in "".join(lines)


def test_what_failed_stands_last_just_above_the_summary():
    lines = printed(sample(), 100).splitlines()
    assert lines[-4:] == [
        "FAIL  first-fail  What first-fail is about.",
        "FAIL  last-fail   What last-fail is about.",
        "2 failed, 1 did not run, 1 warned, 2 passed, 2 not applicable (0.0 s)",
        "more: llmkit check --explain first-fail",
    ]
    where = [next(i for i, line in enumerate(lines) if line.startswith(f"{mark}  ")) for mark in
             ("ok  ", "n/a ", "warn", "not run", "FAIL")]  # fmt: skip
    assert where == sorted(where)
    assert "n/a   2 checks: no trainer given (2)" in lines


def test_a_finding_says_what_where_and_what_to_do():
    text = printed(sample(), 200)
    assert "      found  3 of 8 rows\n      limit  1%\n      where  row 3, position 7: ends: 'the patient" in text
    assert "      do     mend `it`.\n" in text
    assert "and 6 more" in text
    assert "      why    the check crashed" in text


def test_a_settled_fail_shows_its_reason_as_a_note():
    text = printed(Report("x", [result("a", "warn", fix="ignored by check_ignore: on purpose")]), 100)
    assert "note   ignored by check_ignore: on purpose" in text


def test_on_a_terminal_a_passed_check_is_one_line():
    lines = printed(sample(), 80, force_terminal=True, color_system=None).splitlines()
    assert sum("other" in line for line in lines) == 1
    assert [line for line in lines if line.startswith("ok") and line.endswith("…")]


def test_white_space_and_control_characters_become_visible():
    assert visible("a\n\tb \\n") == r"a\n\tb \\n"
    assert visible("  x  y z ") == "··x··y z·"
    assert visible("\x1b\xa0\u200d\U000e0001\ud83d") == r"\x1b\xa0\u200d\U000e0001\ud83d"
    assert visible("مرحبا 👍 é") == "مرحبا 👍 é"
    long = visible("a" * 500 + "b" * 500)
    assert len(long) == LONGEST + 3 and long.startswith("aaa") and long.endswith("bbb")


def test_markup_in_a_text_is_no_markup():
    assert "[bold]b[/bold]" in printed(sample(), 300)


def test_evidence_says_where_first_and_prefers_text_over_ids():
    assert evidence_line({"row": 0, "position": 0, "ids": [1], "text": "x", "note": "n"}) == "row 0, position 0: n: 'x'"
    assert evidence_line({"ids": list(range(20))}).endswith("11] …")
    assert evidence_line({"note": "n"}) == "n"
    assert evidence_line({"text": ""}) == "''"


def test_an_empty_report_can_be_shown():
    report = Report("x")
    assert "no checks" in str(report) and "Nothing was checked" in page(report)
    assert ElementTree.fromstring(formats.junit(report)).get("tests") == "0"


# the page


class Tags(HTMLParser):
    """Every open element, the attributes that load something, and the text that is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loaded: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        self.scripts += tag == "script"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.seen.append(data)


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def test_the_page_is_self_contained_and_user_text_is_only_text():
    tags = parsed(page(sample()))
    assert not tags.loaded and tags.scripts == 1  # its own, which opens what is folded when it is printed
    assert "http" not in page(sample())
    seen = "".join(tags.seen)
    assert '<script>alert("x")</script>' in seen and "runs/<b>x</b>" in seen


def test_the_page_begins_with_what_is_wrong_and_what_to_do():
    text = "".join(parsed(page(sample())).seen)
    assert text.index("2 checks failed: mend them") < text.index("✗ FAIL") < text.index("→ mend it.")
    assert text.index("→ mend it.") < text.index("What is wrong") < text.index("2 checks passed")
    assert "<details><summary>2 checks passed" in page(sample())  # folded
    assert "<details open><summary>1 check passed" in page(Report("x", [result("a", "pass")]))


def test_the_page_says_every_status_in_a_word():
    text = "".join(parsed(page(sample())).seen)
    for word in ("✗ FAIL", "! warn", "? not run", "✓ ok", "2 failed", "1 did not run", "did not apply"):
        assert word in text


def test_lines_of_a_text_stay_lines_on_the_page():
    text = page(Report("x", [result("a", "fail", evidence=[{"text": "a\n\tb  c\n"}])]))
    assert "<pre>a<i>\\n</i>\n<i>\\t</i>b<i>··</i>c<i>\\n</i></pre>" in text


def test_the_verdict_is_the_reports():
    def said(*statuses: str) -> str:
        return verdict(Report("x", [result(s, s) for s in statuses]))

    assert said("fail", "pass") == "1 check failed: mend it before you start the run."
    assert said("not_run", "warn") == "Nothing failed, but 1 check could not run."
    assert said("warn") == "Nothing failed; 1 check warned: have a look."
    assert said("pass", "not_applicable") == "Nothing wrong was found."
    assert said("not_applicable") == "Nothing was checked."


def test_a_notebook_shows_the_page_in_a_frame_of_its_own():
    tags = Tags()
    tags.feed(sample()._repr_html_())
    assert tags.open == [] and not "".join(tags.seen).strip()  # the page is an attribute, escaped


# other programs


def test_github_gets_one_command_per_finding():
    """A text of the user's that looks like a command must not become one."""
    lines = formats.github(sample()).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::warning", "::error", "::notice"]
    assert lines[0].startswith("::error title=first-fail (fail)::What first-fail is about.%0A3 of 8 rows%0Alimit: 1%25")


def test_junit_can_be_read_whatever_a_row_holds():
    suite = ElementTree.fromstring(formats.junit(sample()).encode())
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8", "failures": "2", "errors": "1", "skipped": "2",
    }  # fmt: skip
    kinds = {case.get("name"): [child.tag for child in case] for case in suite}
    assert kinds["first-fail"] == ["failure"] and kinds["crashed"] == ["error"] and kinds["fine"] == []
    assert kinds["absent"] == ["skipped"] and kinds["odd"] == ["system-out"]


def test_every_format_that_is_allowed_exists():
    allowed = CheckConfig.__annotations__["format"].__args__
    assert [name for name in allowed if name != "text" and not callable(getattr(formats, name))] == []


# the table of planted bugs


def test_the_readmes_table_goes_between_its_marks():
    text = f"a\n{planted_report.BEGIN}\nold\n{planted_report.END}\nb\n"
    assert planted_report.with_table(text, "new") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="has no"):
        planted_report.with_table("a\n", "new")
