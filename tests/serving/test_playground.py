"""The playground: base and adapters side by side, in a browser that reaches no other machine."""

import asyncio
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.adapters import save, strong, with_task
from support.browser import CONTRAST, OVERFLOW, Seen, browsing, needs_browser
from support.commands import run
from support.folders import FAILS, items
from support.folders import folder as card_folder
from support.heads import headed
from support.models import model_in

from lora_domains.cli.playground import answering
from lora_domains.model import DomainModel
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.serving.answers import label_text
from lora_domains.serving.comparison import Talk, compare, comparisons_html, turn
from lora_domains.serving.playground import Playground
from lora_domains.tasks import Chat, Classification, MultiLabel, Number, Task

TEXT = "alpha <b>beta</b> ${document.title='run'} <img src=x onerror=\"document.title='run'\">"
LABELS = ("urgent", "routine")
QUESTION = "alpha beta red"


@dataclass(frozen=True)
class Running:
    """A playground in a process of its own."""

    process: "subprocess.Popen[str]"
    url: str
    files: Path


@dataclass(frozen=True)
class Saved:
    """A model with three adapters, and their folders."""

    model: DomainModel
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    out = tmp_path_factory.mktemp("adapters")
    model = model_in(out, tiny_base)
    tasks = {
        "triage": Classification(labels=LABELS, positive="urgent"),
        "helpdesk": Chat(max_new_tokens=4),
        "columns": Classification(text=("title", "body"), labels=LABELS),
    }
    folders = {}
    for seed, (name, task) in enumerate(tasks.items()):
        adapter = with_task(strong(model.base, name, seed=seed), model.base, task)
        if name == "triage":
            adapter = replace(adapter, card=evaluated(adapter.card))
        folders[name] = save(out / name, adapter, model.base)
        model.load_adapter(folders[name])
    return Saved(model, folders)


GUARD = """
import os, socket
def noted(function):
    def call(*arguments, **options):
        address = next(one for one in arguments if not isinstance(one, socket.socket))
        host = address[0] if isinstance(address, tuple) else address
        if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0"):
            with open(os.environ["GUARDED"], "a") as log:
                log.write(f"{address}\\n")
        return function(*arguments, **options)
    return call
socket.socket.connect = noted(socket.socket.connect)
socket.getaddrinfo = noted(socket.getaddrinfo)
"""
"""A ``sitecustomize`` that notes the machines that a process connects to or asks the address of."""


def guarded(there: Path) -> tuple[dict[str, str], Path]:
    """The environment of a process whose connections to other machines are noted in a file."""
    (there / "guard").mkdir()
    (there / "guard" / "sitecustomize.py").write_text(GUARD)
    log = there.with_suffix(".connections")
    paths = os.pathsep.join([str(there / "guard"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "GUARDED": str(log)}, log


@contextmanager
def started(
    folders: Iterable[Path], base: Path, there: Path, *flags: str,
    end: signal.Signals = signal.SIGINT,
) -> Iterator[Running]:  # fmt: skip
    """A playground in a process of its own, which ``end`` stops; its files are below ``there``."""
    (there / "temp").mkdir()
    command = [sys.executable, "-m", "lora_domains.cli.main", "playground", *map(str, folders),
               "--base", str(base), "--port", "0", *flags]  # fmt: skip
    environment, connections = guarded(there)
    environment["TMPDIR"] = str(there / "temp")
    with (there.with_suffix(".log").open("w") as log,
          subprocess.Popen(command, cwd=there, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=log) as process):  # fmt: skip
        assert process.stdout is not None
        address = next((line for line in process.stdout if "http" in line), "")
        assert address, there.with_suffix(".log").read_text()
        url = address.split()[1]
        while not answers(url):
            assert process.poll() is None, there.with_suffix(".log").read_text()
            time.sleep(0.1)
        yield Running(process, url, there)
        process.send_signal(end)
        assert process.wait(60) == 0, there.with_suffix(".log").read_text()
    shutil.rmtree(there / "guard")
    assert not connections.exists(), connections.read_text()  # no telemetry


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url):
            return True
    except urllib.error.URLError:
        return False


@pytest.fixture(scope="module")
def running(
    saved: Saved, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    pytest.importorskip("gradio", reason="the extra `playground` is not installed")
    there = tmp_path_factory.mktemp("running")
    with started(saved.folders.values(), tiny_base, there, "--max-upload", "1") as running:
        yield running


def evaluated(card: Card | None) -> Card:
    """``card`` with the figures of an adapter that fails."""
    from tempfile import TemporaryDirectory

    assert card is not None
    with TemporaryDirectory() as place:
        judged = rebuild(card_folder(Path(place), "triage", items(FAILS)))
    entry = replace(judged.adapter, settings={**judged.adapter.settings, **card.adapter.settings})
    return Card(base=card.base, adapter=entry)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with browsing() as opened:
        yield opened


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ── Without a browser ───────────────────────────────────────────────────────────────────────────


def test_a_comparison_is_what_predict_answers(saved: Saved) -> None:
    found = compare(saved.model, TEXT, "triage")
    (answer,) = saved.model.predict(TEXT, "triage")
    assert found.adapter == answer.label
    assert {bar.label: bar.adapter for bar in found.bars} == answer.probabilities
    base = {bar.label: bar.base for bar in found.bars}
    assert sum(base.values()) == pytest.approx(1)
    assert base != answer.probabilities
    assert found.base == max(base, key=base.__getitem__)
    assert max(abs(effect) for _, effect in found.words[""]) == 1
    assert 0 < found.swap < found.seconds


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        (Classification(labels=LABELS, head=True), 2),
        (MultiLabel(labels=LABELS, head=True), 2),
        (Number(mean=3.0, sd=2.0), 1),
    ],
    ids=["classes", "labels", "number"],
)
def test_the_base_has_no_answer_where_a_head_gives_it(
    saved: Saved, task: Task, classes: int
) -> None:
    base = saved.model.base
    saved.model.bank.add(with_task(headed(base, "head", classes), base, task))
    found = compare(saved.model, TEXT, "head")
    (answer,) = saved.model.predict(TEXT, "head")
    assert found.base is None
    assert found.adapter == label_text(answer)
    assert len(found.bars) == (0 if isinstance(answer, float) else 2)
    assert all(bar.base is None for bar in found.bars)
    html = comparisons_html(saved.model, {"head": TEXT})
    assert "no answer of its own" in html
    saved.model.unload("head")


def test_an_adapter_that_cannot_answer_says_why(saved: Saved) -> None:
    saved.model.bank.add(strong(saved.model.base, "plain"))  # without a card
    html = comparisons_html(saved.model, {"plain": TEXT, "triage": TEXT})
    assert "lora-domains evaluate FOLDER --test" in html
    assert "it was not evaluated here" in html
    assert html.count('class="ld-panel"') == 2
    saved.model.unload("plain")


def test_each_side_of_a_chat_has_its_own_history(saved: Saved) -> None:
    sides = {}
    for name in (None, "helpdesk"):
        talk = Talk(name)
        for said in (QUESTION, "green river"):
            talk = turn(saved.model, talk, said, "helpdesk")
        sides[name] = talk.messages
    assert [m["role"] for m in sides[None]] == ["user", "assistant"] * 2
    first = {"messages": [{"role": "user", "content": QUESTION}]}
    (answer,) = saved.model.predict(first, "helpdesk")
    assert sides["helpdesk"][1]["content"] == answer
    second = {"messages": list(sides["helpdesk"][:3])}
    assert sides["helpdesk"][3]["content"] == saved.model.predict(second, "helpdesk")[0]
    assert sides[None][1]["content"] != answer


def test_the_guard_notes_a_connection(tmp_path: Path) -> None:
    environment, connections = guarded(tmp_path)
    code = "import socket; socket.getaddrinfo('192.0.2.1', 80)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert connections.read_text() == "192.0.2.1\n"


def test_a_file_is_answered_with_progress(saved: Saved, tmp_path: Path) -> None:
    rows = table(tmp_path / "rows.csv", [{"text": f"alpha {n}"} for n in range(3)] + [{"text": ""}])
    told: list[tuple[int, int]] = []
    answer = answering(saved.model, saved.folders)
    options = {"text": None, "drop_empty": True}
    said = answer("triage", rows, tmp_path / "out.csv", options, lambda *at: told.append(at))
    assert said == "4 rows: out.csv"
    assert told[-1] == (4, 4)
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        assert [bool(row["prediction"]) for row in csv.DictReader(file)] == [True] * 3 + [False]


@pytest.mark.slow
def test_an_unexpected_error_quotes_no_text(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gradio = pytest.importorskip("gradio", reason="the extra `playground` is not installed")

    def broken(*_: Any) -> Any:
        raise RuntimeError(TEXT)

    for name in ("comparisons_html", "turn"):
        monkeypatch.setattr(f"lora_domains.serving.playground.{name}", broken)

    async def made() -> Any:
        # Inside a loop: gradio would make one for the page, which nobody closes.
        return Playground(saved.model, broken, 1).page()

    page = asyncio.run(made())
    handlers = {one.name: one.fn for one in page.fns.values()}
    for handler, values in {
        "compare": (["triage"], TEXT, "", ""),
        "said_to_all": (["helpdesk"], TEXT, []),
        "answer": ("rows.csv", "triage", "", "csv", False),
    }.items():
        with pytest.raises(gradio.Error) as raised:
            handlers[handler](*values)
        assert str(raised.value) == "'The server could not answer (RuntimeError).'"
        assert not raised.value.print_exception
    assert "in broken" in caplog.text
    assert TEXT not in caplog.text


@pytest.mark.slow
def test_the_page_may_load_nothing_from_elsewhere(running: Running) -> None:
    with urllib.request.urlopen(running.url) as answer:
        policy, html = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert not re.findall(r"https?://[^\s;]+", policy)
    assert not re.findall(
        r"""<(?:script|link)[^>]+(?:src|href)=["']?(?:https?:)?//[^"'> ]+""", html
    )
    assert '"analytics_enabled":false' in html.replace(" ", "")


@pytest.mark.slow
def test_a_name_of_another_machine_is_refused(running: Running) -> None:
    request = urllib.request.Request(running.url, headers={"Host": "rows.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_without_gradio_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_domains.errors.find_spec", lambda _: None)
    assert run("playground", "--out", "none") == 2
    assert "pip install 'lora-domains[playground]'" in capsys.readouterr().err


def test_adapters_on_other_bases_are_left_out(
    saved: Saved, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "triage").symlink_to(saved.folders["triage"])
    card_folder(tmp_path, "z-other")
    loaded: list[str] = []
    monkeypatch.setattr(Playground, "serve", lambda page, *_: loaded.extend(page.model.domains))
    assert run("playground", "--out", str(tmp_path), "--port", "0", "--base", str(tiny_base)) == 0
    assert loaded == ["triage"]
    shown = capsys.readouterr().out
    assert "On other bases, and not loaded: z-other" in shown
    assert re.search(r"http://127\.0\.0\.1:\d+ ", shown)


def test_it_warns_that_everyone_in_the_network_can_use_it(
    saved: Saved, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Playground, "serve", lambda *_: None)
    flags = ["--port", "0", "--base", str(tiny_base), "--host", "0.0.0.0"]
    assert run("playground", str(saved.folders["triage"]), *flags) == 0
    assert "everyone who reaches this machine" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("flags", "found"), [
    (["--max-upload", "0"], "at least 1"), (["nothing"], "an adapter folder"), ([], "none in"),
])  # fmt: skip
def test_bad_flags_are_refused(
    flags: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("playground", *flags, "--out", str(tmp_path), "--port", "0") == 2
    assert found in capsys.readouterr().err


# ── In a browser ────────────────────────────────────────────────────────────────────────────────


def ask(page: Any, text: str) -> None:
    page.get_by_label("Text", exact=True).last.fill(text)
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".ld-panel")


def upload(page: Any, rows: Path, adapter: str) -> None:
    page.get_by_role("tab", name="File").click()
    page.locator("input[type=file]").last.set_input_files(rows)
    page.get_by_label("Adapter", exact=True).last.click()
    page.get_by_role("option", name=adapter).click()


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@needs_browser
@pytest.mark.slow
def test_a_text_and_a_file_are_answered_in_the_page(
    saved: Saved, running: Running, seen: Seen, tmp_path: Path
) -> None:
    page = seen.open(running.url)
    ask(page, TEXT)
    panel = page.locator(".ld-panel[data-adapter=triage]")
    shown = panel.inner_text()
    (answer,) = saved.model.predict(TEXT, "triage")
    for label in LABELS:
        assert percent(answer.probabilities[label]) in shown
    assert panel.locator(".ld-verdict").inner_text() == "fail"
    assert panel.locator(".ld-sentence").inner_text().startswith("triage beats the base (F1 0.203")
    assert re.search(r"Switched from the base in [\d.]+ ms, answered in [\d.]+ m?s", shown)
    # The text is shown as text, and its words are marked.
    assert TEXT in panel.locator(".ld-words").inner_text()
    assert page.title() == "Playground"
    assert panel.locator("img").count() == 0
    assert panel.locator(".ld-words .ld-for, .ld-words .ld-against").count() > 0
    # The adapter that reads two columns did not get them.
    assert "title" in page.locator(".ld-panel[data-adapter=columns] .ld-error").inner_text()

    rows = [{"no": str(n), "text": f"alpha {word} now"} for n, word in enumerate(["red", "blue"])]
    upload(page, table(tmp_path / "rows.csv", rows), "triage")
    page.get_by_role("button", name="Answer the rows").click()
    page.wait_for_selector(".ld-rows")
    with page.expect_download() as download:
        page.locator("a[download='rows-triage.csv']").last.click()
    with Path(download.value.path()).open(encoding="utf-8") as file:
        answered = list(csv.DictReader(file))
    wanted = saved.model.predict([row["text"] for row in rows], "triage")
    assert [row["prediction"] for row in answered] == [one.label for one in wanted]
    assert [row["no"] for row in answered] == ["0", "1"]
    assert page.locator(".ld-rows tbody tr").count() == len(rows)
    assert not seen.elsewhere(running.url)
    assert not seen.errors


@needs_browser
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_it_is_readable_in_light_and_dark_on_desktop_and_phone(
    running: Running, seen: Seen, tmp_path: Path, scheme: str, size: str
) -> None:
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page = seen.open(running.url, size, scheme)
    ask(page, TEXT)
    readable(page, pictures / f"text-{size}-{scheme}.png")
    page.get_by_role("tab", name="Chat").click()
    for turns in (1, 2):
        page.get_by_label("Message").fill(QUESTION)
        page.get_by_role("button", name="Send").click()
        page.wait_for_function(f"document.querySelectorAll('.ld-turn').length == {4 * turns}")
    readable(page, pictures / f"chat-{size}-{scheme}.png")
    upload(page, table(tmp_path / "rows.csv", [{"text": TEXT, "ward": "long " * 30}]), "triage")
    page.get_by_role("button", name="Answer the rows").click()
    page.wait_for_selector(".ld-rows")
    readable(page, pictures / f"file-{size}-{scheme}.png")
    assert not seen.elsewhere(running.url)
    assert not seen.errors


def readable(page: Any, picture: Path) -> None:
    page.wait_for_timeout(500)  # a result fades in
    page.screenshot(path=picture, full_page=True)
    assert page.evaluate(OVERFLOW) <= 0
    ratio, which = page.evaluate(CONTRAST, ".ld-panel *, .ld-rows *, .ld-note")
    assert ratio >= 4.5, which


@needs_browser
@pytest.mark.slow
@pytest.mark.long
def test_files_that_cannot_be_answered_are_refused(
    running: Running, seen: Seen, tmp_path: Path
) -> None:
    page = seen.open(running.url)
    upload(page, table(tmp_path / "other.csv", [{"note": "alpha"}]), "triage")
    page.get_by_role("button", name="Answer the rows").click()
    assert "text" in page.wait_for_selector(".ld-error").inner_text()
    page.get_by_label("Column of the text").fill("note")
    page.get_by_role("button", name="Answer the rows").click()
    page.wait_for_selector(".ld-rows")
    page.reload()
    big = tmp_path / "big.csv"
    big.write_text("text\n" + "alpha beta\n" * 200_000)
    page.get_by_role("tab", name="File").click()
    page.locator("input[type=file]").last.set_input_files(big)
    page.wait_for_selector("text=maximum allowed size")
    assert not list(running.files.rglob("big.csv"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_stopped(
    saved: Saved, tiny_base: Path, tmp_path: Path, end: signal.Signals
) -> None:
    pytest.importorskip("gradio", reason="the extra `playground` is not installed")
    there = tmp_path / "there"
    there.mkdir()
    with started([saved.folders["triage"]], tiny_base, there, end=end) as running:
        secret, mark = b"planted-in-a-row", b"--boundary"
        head = b'Content-Disposition: form-data; name="files"; filename="rows.csv"\r\n\r\n'
        body = b"%s\r\n%stext\n%s\r\n%s--\r\n" % (mark, head, secret, mark)
        kind = {"Content-Type": "multipart/form-data; boundary=boundary"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{running.url}/gradio_api/upload", body, kind)
        ) as answer:
            assert answer.status == 200
        assert [path for path in there.rglob("*.csv") if secret in path.read_bytes()]
    assert not [path for path in there.rglob("*") if path.is_file()]
