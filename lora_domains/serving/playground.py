"""The playground: a page that puts base and adapters side by side on a text, a chat or a file.

It runs on Gradio and works without a network: no telemetry, and a policy by which the browser loads
nothing from elsewhere. Texts stay in memory; files lie in a temporary folder that is deleted.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from lora_domains.errors import LoraDomainsError
from lora_domains.inference.predict import task_of
from lora_domains.model import DomainModel
from lora_domains.serving.answers import converses
from lora_domains.serving.comparison import (
    ASSETS,
    Talk,
    comparisons_html,
    error_html,
    rows_html,
    talks_html,
    turn,
)
from lora_domains.serving.network import LOOPBACK, run
from lora_domains.serving.requests import failed, log

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""Content security policy: everything from this server. Gradio needs inline and evaluated code."""
FONT = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")
IDLE, GRACE = 20.0, 2.0
"""Seconds of a browser that sends or reads nothing, and of answers in progress at the end."""
MOST_CHARACTERS = 20_000
"""Characters of a text in the page."""
FORMS = ("csv", "tsv", "jsonl", "parquet")
"""Forms of the file of answers."""
FIRST_SHOWN = 4
"""Adapters that are compared unless others are chosen."""
Tell = Callable[[int, int], None]
"""Told how many rows of how many are answered."""
AnswerFile = Callable[[str, Path, Path, Mapping[str, Any], Tell], str]
"""Answers the rows of a file: (adapter, rows, output, options, tell) → what happened."""


@dataclass(frozen=True)
class Playground:
    """A page over the adapters of a model.

    ``answer_file`` answers the rows of a file, with the code of ``lora-domains predict``.
    ``max_upload`` is the size of a file in megabytes, at most.
    """

    model: DomainModel
    answer_file: AnswerFile
    max_upload: int

    def serve(self, bound: socket.socket, host: str) -> None:
        """Serve the page on a bound socket until SIGTERM or SIGINT."""
        with tempfile.TemporaryDirectory(prefix="lora-domains-") as folder:
            run(self.app(Path(folder), host), bound, idle=IDLE, grace=GRACE)

    def app(self, folder: Path, host: str = "127.0.0.1") -> Any:
        """The ASGI application; uploaded files and answers are written into ``folder``."""
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import gradio
        from fastapi import FastAPI
        from fastapi.middleware import Middleware
        from fastapi.middleware.trustedhost import TrustedHostMiddleware

        layers = [Middleware(Contained)]
        if host in LOOPBACK:  # a page elsewhere cannot reach this server under a name of its own
            layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
        app = FastAPI(middleware=layers, openapi_url=None)
        theme = gradio.themes.Default(font=FONT, font_mono=MONOSPACE)
        return gradio.mount_gradio_app(
            app, self.page(), "/", footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            enable_monitoring=False, mcp_server=False, max_file_size=f"{self.max_upload}mb",
            theme=theme, css_paths=ASSETS / "playground.css", show_error=True,
        )  # fmt: skip

    def page(self) -> Any:
        """The page as Gradio's blocks."""
        import gradio

        names = self.model.domains
        with gradio.Blocks(
            title="Playground", analytics_enabled=False, delete_cache=(600, 3600)
        ) as page:
            gradio.Markdown(f"# Playground\n{_count(len(names))} on `{self.model.base.id}`")
            with gradio.Tab("Text"):
                self._text_tab(names)
            known = [name for name in names if self.model.bank[name].card is not None]
            chats = [name for name in known if converses(self.model.bank, name)]
            if chats:
                with gradio.Tab("Chat"):
                    self._chat_tab(chats)
            with gradio.Tab("File"):
                self._file_tab(names)
        return page

    # ── One text ────────────────────────────────────────────────────────────────────────────────

    def _text_tab(self, names: Sequence[str]) -> None:
        import gradio

        columns = {name: self._columns(name) for name in names}
        boxes: dict[str, Any] = {}
        if "" in {column for of in columns.values() for column in of}:
            boxes[""] = gradio.Textbox(label="Text", lines=4, max_length=MOST_CHARACTERS)
        for column in dict.fromkeys(column for of in columns.values() for column in of):
            if column:
                boxes[column] = gradio.Textbox(label=column, lines=2, max_length=MOST_CHARACTERS)
        chosen = self._choice(names)
        button = gradio.Button("Compare", variant="primary")
        shown = gradio.HTML()

        def compare(picked: Sequence[str], *values: str) -> str:
            given = dict(zip(boxes, values, strict=True))
            if not picked or not any(value.strip() for value in values):
                raise gradio.Error("Write a text and choose an adapter.", print_exception=False)
            texts: dict[str, str | dict[str, str]] = {}
            for name in picked:
                of = columns[name]
                texts[name] = given[""] if of == ("",) else {column: given[column] for column in of}
            return comparisons_html(self.model, texts)

        button.click(_guarded(compare), [chosen, *boxes.values()], shown, **_EVENT)

    def _columns(self, name: str) -> tuple[str, ...]:
        """The columns that a text of ``name`` is made of; ("",) where it is a plain text."""
        if self.model.bank[name].card is None:
            return ("",)
        task = task_of(self.model.bank, name)
        columns = tuple(dict.fromkeys(task.input_columns))
        return columns if len(columns) > 1 and not task.converses else ("",)

    def _choice(self, names: Sequence[str]) -> Any:
        import gradio

        return gradio.CheckboxGroup(
            list(names), value=list(names[:FIRST_SHOWN]), label="Adapters", visible=len(names) > 1
        )

    # ── A chat ──────────────────────────────────────────────────────────────────────────────────

    def _chat_tab(self, names: Sequence[str]) -> None:
        import gradio

        talks = gradio.State([])
        chosen = self._choice(names)
        shown = gradio.HTML()
        text = gradio.Textbox(label="Message", lines=2, max_length=MOST_CHARACTERS)
        with gradio.Row():
            send = gradio.Button("Send", variant="primary")
            clear = gradio.Button("New chat")

        def said_to_all(
            picked: Sequence[str], said: str, before: Sequence[Talk]
        ) -> tuple[Any, ...]:
            if not picked or not said.strip():
                raise gradio.Error("Write a message and choose an adapter.", print_exception=False)
            known = {talk.name: talk for talk in before}
            now = [known.get(name, Talk(name)) for name in (None, *picked)]
            try:
                now = [turn(self.model, talk, said, talk.name or picked[0]) for talk in now]
            except LoraDomainsError as error:
                return talks_html(self.model, now, error), before, said
            return talks_html(self.model, now), now, ""

        inputs, outputs = [chosen, text, talks], [shown, talks, text]
        gradio.on([send.click, text.submit], _guarded(said_to_all), inputs, outputs, **_EVENT)
        clear.click(lambda: ("", [], ""), None, [shown, talks, text], **_EVENT)

    # ── A file ──────────────────────────────────────────────────────────────────────────────────

    def _file_tab(self, names: Sequence[str]) -> None:
        import gradio

        rows = gradio.File(
            label=f"Rows (at most {self.max_upload} MB)",
            file_types=[".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xlsx"],
        )
        with gradio.Row():
            name = gradio.Dropdown(list(names), value=names[0], label="Adapter")
            text = gradio.Textbox(
                label="Column of the text", placeholder="as in training", max_lines=1
            )
            form = gradio.Dropdown(list(FORMS), value=FORMS[0], label="Answers as")
        drop = gradio.Checkbox(label="Leave rows without a text unanswered")
        button = gradio.Button("Answer the rows", variant="primary")
        shown = gradio.HTML()
        answers = gradio.File(label="Answers", visible=False, interactive=False)

        def answer(
            path: str | None, picked: str, column: str, suffix: str, empty: bool,
            progress: Any = gradio.Progress(),  # noqa: B008 (how Gradio finds it)
        ) -> Any:  # fmt: skip
            if path is None:
                raise gradio.Error("Choose a file first.", print_exception=False)
            given = Path(path)
            output = given.with_name(f"{given.stem}-{picked}.{suffix}")
            output.unlink(missing_ok=True)
            options = {"text": column.strip() or None, "drop_empty": empty}
            try:
                said = self.answer_file(
                    picked, given, output, options,
                    lambda done, total: progress((done, total), unit="rows"),
                )  # fmt: skip
            except LoraDomainsError as error:
                return error_html(error), gradio.File(visible=False)
            return rows_html(output, said), gradio.File(str(output), visible=True)

        inputs, outputs = [rows, name, text, form, drop], [shown, answers]
        button.click(_guarded(answer), inputs, outputs, **_EVENT)
        rows.change(lambda: ("", gradio.File(visible=False)), None, outputs, **_EVENT)


_EVENT: Mapping[str, Any] = {"concurrency_id": "model", "api_visibility": "private"}
"""One answer at a time; no interface for programs, which ``lora-domains serve`` has."""


def _guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """``handler`` without the messages of unexpected errors, which may quote a text.

    Gradio shows them in the page, and prints them into the log.
    """
    import gradio

    @wraps(handler)
    def call(*values: Any, **named: Any) -> Any:
        try:
            return handler(*values, **named)
        except gradio.Error:
            raise
        except Exception as error:
            log("The page could not answer.", error)
            raise gradio.Error(failed(error).message, print_exception=False) from None

    return call


def _count(adapters: int) -> str:
    return "1 adapter" if adapters == 1 else f"{adapters} adapters"


class Contained:
    """ASGI middleware: the headers by which a browser loads and sends nothing elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[..., Any],
        send: Callable[..., Any],
    ) -> None:  # fmt: skip
        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, sent)
