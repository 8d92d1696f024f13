"""A report as JUnit XML: a suite for each adapter with its conclusion, a case for each gate.

A gate that fails is a failure. An inconclusive one is an error: a CI server must not show it as
passed. A gate that informs passes, and its output says so where it warns.
"""

import re
from xml.etree import ElementTree as Xml

from lora_domains.report.card import AdapterEntry, Report
from lora_domains.report.conclusion import conclusion
from lora_domains.report.text import worsened

# Characters that XML 1.0 cannot hold, not even escaped.
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
OUTCOME = {"fail": "failure", "inconclusive": "error", "not applicable": "skipped"}


def junit(report: Report) -> str:
    """The XML document."""
    suites = [
        _suite(f"lora_domains.{entry.path}", _cases(entry), conclusion(entry, report.since))
        for entry in report.adapters
    ]
    since = report.since
    if since:
        verdict = "fail" if since["worse"] else "pass"
        cases = [("since", verdict, " ".join(worsened(since)) or "Nothing is clearly worse.", "")]
        suites.append(_suite(f"lora_domains.since {since['report']}", cases))
    totals = {k: str(sum(int(s.get(k, 0)) for s in suites))
              for k in ("tests", "failures", "errors")}  # fmt: skip
    root = Xml.Element("testsuites", {"name": "lora_domains", **totals})
    root.extend(suites)
    Xml.indent(root)
    body = Xml.tostring(root, encoding="unicode")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + body + "\n"


def _cases(entry: AdapterEntry) -> list[tuple[str, str, str, str]]:
    """(name, verdict, why, rule) of each gate; a case without a verdict where there is none."""
    if not entry.gates:
        return [("evaluated", "inconclusive", "It has not been evaluated.", "a verdict")]
    return [(g["name"], g["verdict"], g["why"], g["rule"]) for g in entry.gates]


def _suite(name: str, cases: list[tuple[str, str, str, str]], says: str = "") -> Xml.Element:
    verdicts = [verdict for _, verdict, _, _ in cases]
    suite = Xml.Element(
        "testsuite", name=_clean(name), tests=str(len(cases)),
        failures=str(verdicts.count("fail")), errors=str(verdicts.count("inconclusive")),
        skipped=str(verdicts.count("not applicable")),
    )  # fmt: skip
    for gate, verdict, why, rule in cases:
        case = Xml.SubElement(suite, "testcase", classname=_clean(name), name=_clean(gate))
        if verdict in OUTCOME:
            result = Xml.SubElement(case, OUTCOME[verdict], type=verdict, message=_clean(why))
            result.text = _clean(rule)
        else:
            sign = "Warning: " if verdict == "warning" else ""
            Xml.SubElement(case, "system-out").text = _clean(sign + why)
    if says:
        Xml.SubElement(suite, "system-out").text = _clean(says)
    return suite


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
