"""JUnit XML: a case for each gate."""

from pathlib import Path
from xml.etree import ElementTree as Xml

from hypothesis import given
from hypothesis import strategies as st

from lora_domains.report.card import AdapterEntry, BaseRecord, Report
from lora_domains.report.junit import junit
from lora_domains.report.report import combine


def test_junit_has_a_case_for_each_gate(three: list[Path]) -> None:
    report = combine(three)
    root = Xml.fromstring(junit(report).encode())
    suites = {suite.attrib["name"]: suite for suite in root}
    for entry in report.adapters:
        suite = suites[f"lora_domains.{entry.path}"]
        cases = suite.findall("testcase")
        assert [case.attrib["name"] for case in cases] == [g["name"] for g in entry.gates]
        for case, gate in zip(cases, entry.gates, strict=True):
            wanted = {"fail": "failure", "inconclusive": "error"}
            assert [part.tag for part in case] == [wanted.get(gate["verdict"], "system-out")]
            assert gate["why"] in (case[0].text or "") + case[0].attrib.get("message", "")
    verdicts = [g["verdict"] for e in report.adapters for g in e.gates]
    counts = [str(len(verdicts)), str(verdicts.count("fail")), str(verdicts.count("inconclusive"))]
    assert [root.attrib[k] for k in ("tests", "failures", "errors")] == counts


@given(st.text(max_size=30), st.text(max_size=30))
def test_junit_is_valid_xml_for_any_text(name: str, why: str) -> None:
    gate = {"name": name, "rule": why, "verdict": "fail", "why": why}
    entry = AdapterEntry(domain="x", path=name, sha256=None, gates=[gate], verdict="fail")
    base = BaseRecord("tiny", None, "0" * 64, "float32", None)
    report = Report(base=base, environment={}, adapters=[entry], matrix={})
    root = Xml.fromstring(junit(report).encode("utf-8", "strict"))
    assert root[0][0][0].tag == "failure"
