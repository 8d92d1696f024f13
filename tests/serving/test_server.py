"""The server: OpenAI's shapes, labels, errors, limits, and clients that misbehave."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.adapters import save, strong
from support.served import EIGHT, KEY, Server, make_served, request_bytes, serving
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_domains.errors import OutOfMemory
from lora_domains.serving import app, scheduler
from lora_domains.serving.batch import Batch
from lora_domains.serving.service import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, max_tokens=200) as running:
        yield running


def turn(text: str) -> str:
    """The prompt of a conversation of one message."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def error(answer: tuple[int, Any]) -> tuple[int, str, str | None]:
    """Status, message and field of an error in OpenAI's shape."""
    status, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return status, body["error"]["message"], body["error"]["param"]


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_answered_in_the_shape_of_openai(server: Server) -> None:
    status, body = server.chat("d1", "the red river", max_completion_tokens=8)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert isinstance(body["created"], int)
    assert body["model"] == "d1"
    (choice,) = body["choices"]
    wanted = str(server.model.generate(turn("the red river"), "d1", max_new_tokens=8))
    assert choice["message"] == {"role": "assistant", "content": wanted.strip(), "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = body["usage"]
    tokens = server.model.tokenizer(turn("the red river"))["input_ids"]
    assert usage == {"prompt_tokens": len(tokens), "completion_tokens": 8,
                     "total_tokens": len(tokens) + 8}  # fmt: skip


def test_completions_continue_texts_and_token_ids(server: Server) -> None:
    texts = ["the red river", "call now"]
    status, body = server.complete("d2", texts, max_tokens=6)
    assert (status, body["object"]) == (200, "text_completion")
    wanted = server.model.generate(texts, "d2", max_new_tokens=6)
    assert [choice["text"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    ids = server.model.tokenizer("the red river")["input_ids"]
    for prompt in (ids, [ids]):
        assert server.complete("d2", prompt, max_tokens=6)[1]["choices"][0]["text"] == wanted[0]
    _, body = server.complete("base", "the red river")
    assert body["choices"][0]["text"] == server.model.generate("the red river", max_new_tokens=16)
    # The 16 tokens that a request leaves open are no more than the context has room for.
    long = server.model.tokenizer("red " * 600)["input_ids"][:507]
    status, body = server.complete("d2", long)
    assert (status, body["usage"]["completion_tokens"]) == (200, 5)


@pytest.mark.parametrize("model", ["d3", "base", "talk", "short", "spam"])
def test_a_stream_is_the_whole_answer_in_pieces(server: Server, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "the red river"}],
            "stream_options": {"include_usage": True}}  # fmt: skip
    _, whole = server.send("POST", "/v1/chat/completions", body | {"stream_options": None})
    *pieces, last = server.events("/v1/chat/completions", body)
    assert {piece["object"] for piece in [*pieces, last]} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in [*pieces, last]}) == 1
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(piece["usage"] is None for piece in pieces)
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole["choices"][0]["finish_reason"]]


def test_a_streamed_completion_has_several_answers(server: Server) -> None:
    body = {"model": "d4", "prompt": ["red", "blue"], "max_tokens": 5, "n": 2, "temperature": 1.0,
            "seed": 3}  # fmt: skip
    _, whole = server.send("POST", "/v1/completions", body)
    texts = dict.fromkeys(range(4), "")
    for event in server.events("/v1/completions", body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert [texts[n] for n in range(4)] == [choice["text"] for choice in whole["choices"]]
    assert len(set(texts.values())) == 4
    other = server.send("POST", "/v1/completions", body | {"seed": 4})[1]
    assert [choice["text"] for choice in other["choices"]] != [texts[n] for n in range(4)]


def test_an_answer_ends_before_a_stop(server: Server) -> None:
    text = str(server.model.generate("the red river", "d1", max_new_tokens=30))
    stop = text[len(text) // 2 :][:3]
    _, body = server.complete("d1", "the red river", max_tokens=30, stop=[stop, "never"])
    assert body["choices"][0]["text"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_domain_answers_as_it_was_trained(server: Server) -> None:
    """In its own prompt, and with as many tokens."""
    (wanted,) = server.model.predict("the red river", "short")
    _, body = server.chat("short", "the red river")
    assert body["choices"][0]["message"]["content"] == wanted
    assert body["usage"]["completion_tokens"] <= 7
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"},
                {"role": "user", "content": [{"type": "text", "text": "green"}]}]  # fmt: skip
    status, body = server.send(
        "POST", "/v1/chat/completions", {"model": "talk", "messages": messages}
    )
    prompt = turn("red") + "blue<|im_end|>\n" + turn("green")
    assert status == 200
    assert (
        body["choices"][0]["message"]["content"]
        == str(server.model.generate(prompt, "talk", max_new_tokens=9)).strip()
    )
    answer = server.send("POST", "/v1/chat/completions", {"model": "short", "messages": messages})
    assert error(answer)[1].startswith("messages: expected one message of the user")


def test_texts_are_labelled(server: Server) -> None:
    texts = ["red alpha", "blue beta", "now"] * 20
    wanted = server.model.predict(texts, "spam")
    body = {"model": "spam", "input": [*texts[:-1], {"text": texts[-1]}]}
    status, found = server.send("POST", "/v1/classify", body)
    assert status == 200
    assert found["usage"]["prompt_tokens"] > 100
    for number, (record, answer) in enumerate(zip(found["data"], wanted, strict=True)):
        assert record["index"] == number
        assert record["prediction"] == answer.label  # type: ignore[union-attr]
        assert record["probability"] == pytest.approx(answer.probability, abs=1e-5)  # type: ignore[union-attr]
        assert sum(record["probabilities"].values()) == pytest.approx(1)
    _, found = server.send("POST", "/v1/classify", {"model": "spam", "input": "red",
                                                    "refer_below": 1.0})  # fmt: skip
    assert found["data"][0]["prediction"] == "refer"
    _, chat = server.chat("spam", "red alpha")
    assert chat["choices"][0]["message"]["content"] == wanted[0].label  # type: ignore[union-attr]


def test_the_models_are_the_adapters_and_the_base(server: Server) -> None:
    _, body = server.send("GET", "/v1/models")
    assert [one["id"] for one in body["data"]] == [*EIGHT, "spam", "talk", "short", "base"]
    assert {one["object"] for one in body["data"]} == {"model"}
    assert server.send("GET", "/v1/models/d1") == (200, body["data"][1])
    assert server.send("GET", "/v1/models/nope")[0] == 404


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────

HELLO = [{"role": "user", "content": "red"}]
WRONG: dict[str, tuple[str, Any, int, str]] = {
    "unknown domain": ("chat/completions", {"model": "medcal", "messages": HELLO}, 404,
                       "Known: d0, d1"),
    "no model": ("chat/completions", {"messages": HELLO}, 400, "'model' is missing"),
    "no messages": ("chat/completions", {"model": "d1"}, 400, "'messages' is missing"),
    "no JSON": ("completions", b'{"model": ', 400, "no valid JSON at line 1"),
    "not UTF-8": ("completions", b'{"model": "\xff"}', 400, "no valid JSON"),
    "NaN": ("completions", b'{"model": "d1", "prompt": "x", "temperature": NaN}', 400,
            "no valid JSON"),
    "deep JSON": ("completions", b"[" * 200_000, 400, "no valid JSON"),
    "a list": ("completions", [1], 400, "Expected a JSON object, found a list"),
    "unknown role": ("chat/completions", {"model": "d1", "messages": [
        {"role": "wizard", "content": "red"}]}, 400, "expected a role: system"),
    "empty content": ("chat/completions", {"model": "d1", "messages": [
        {"role": "user", "content": " "}]}, 400, "empty content"),
    "an image": ("chat/completions", {"model": "d1", "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "text"),
    "last of the assistant": ("chat/completions", {"model": "d1", "messages": [
        *HELLO, {"role": "assistant", "content": "x"}]}, 400, "one of the assistant"),
    "half a character": ("chat/completions", {"model": "d1", "messages": [
        {"role": "user", "content": "\ud800"}]}, 400, ""),
    "half a character in a prompt": ("completions", {"model": "d1", "prompt": "\ud800"}, 400, ""),
    "longer than the limit": ("completions", {"model": "d1", "prompt": "x", "max_tokens": 201},
                              400, "at most 200"),
    "longer than the context": ("completions", {"model": "d1", "prompt": "red " * 400,
                                                "max_tokens": 200}, 400, "context of 512"),
    "half a character in a field": ("completions", {"model": "d1", "prompt": "x", "\ud800": 1},
                                    400, "not supported"),
    "half a character in a model": ("completions", {"model": "\ud800", "prompt": "x"}, 404, ""),
    "a prompt beyond the context": ("completions", {"model": "d1", "prompt": "red " * 600}, 400,
                                    "prompt: expected prompt and answer within"),
    "a chat beyond the context": ("chat/completions", {"model": "d1", "messages": [
        {"role": "user", "content": "red " * 600}]}, 400, "messages: expected prompt and answer"),
    "unknown token": ("completions", {"model": "d1", "prompt": [5, 400]}, 400, "from 0 to 399"),
    "empty prompt": ("completions", {"model": "d1", "prompt": []}, 400, "found an empty list"),
    "unknown field": ("completions", {"model": "d1", "prompt": "x", "temprature": 1}, 400,
                      "Did you mean 'temperature'?"),
    "unsupported field": ("completions", {"model": "d1", "prompt": "x", "logprobs": 2}, 400,
                          "'logprobs' is not supported"),
    "tools": ("chat/completions", {"model": "d1", "messages": HELLO, "tools": [{}]}, 400,
              "'tools' is not supported"),
    "an option of a template": ("chat/completions", {"model": "d1", "messages": HELLO,
                                "chat_template_kwargs": {"documents": []}}, 400, "enable_thinking"),
    "hot": ("completions", {"model": "d1", "prompt": "x", "temperature": 3}, 400, "from 0 to 2"),
    "no number": ("completions", {"model": "d1", "prompt": "x", "temperature": True}, 400,
                  "found true"),
    "too many": ("completions", {"model": "d1", "prompt": ["x"] * 33, "n": 2}, 400, "At most 64"),
    "empty stop": ("completions", {"model": "d1", "prompt": "x", "stop": [""]}, 400, "none of"),
    "long stop": ("completions", {"model": "d1", "prompt": "x", "stop": "x" * 201}, 400, "200 ch"),
    "two lengths": ("chat/completions", {"model": "d1", "messages": HELLO, "max_tokens": 1,
                                         "max_completion_tokens": 2}, 400, "differ"),
    "no labels": ("classify", {"model": "d1", "input": "x"}, 400, "no labels"),
    "labels of the base": ("classify", {"model": "base", "input": "x"}, 400, "no labels"),
    "an empty text": ("classify", {"model": "spam", "input": ["red", ""]}, 400, ""),
    "a row without a text": ("classify", {"model": "spam", "input": [{"note": "x"}]}, 400,
                             "'text'"),
    "too many texts": ("classify", {"model": "spam", "input": ["x"] * 1025}, 400, "up to 1024"),
    "a chat for one text": ("chat/completions", {"model": "spam", "messages": [
        {"role": "system", "content": "red"}, *HELLO]}, 400, "answers texts"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_by_name(server: Server, case: str) -> None:
    path, body, status, message = WRONG[case]
    found = error(server.send("POST", f"/v1/{path}", body))
    assert found[0] == status
    assert message in found[1], found[1]


def test_other_requests_have_openais_shape_too(server: Server) -> None:
    assert error(server.send("GET", "/nope"))[0] == 404
    assert error(server.send("GET", "/v1/completions"))[0] == 405
    assert error(server.send("POST", "/v1/adapters/reload"))[0] == 403
    neutral = {"chat_template_kwargs": {"enable_thinking": False}, "frequency_penalty": 0,
               "logit_bias": {}, "tools": [], "user": "someone",
               "response_format": {"type": "text"}, "logprobs": False, "n": None}  # fmt: skip
    assert server.chat("d1", "red", max_tokens=2, **neutral)[0] == 200


# ── Keys, limits, counts ────────────────────────────────────────────────────────────────────────


def test_a_key_is_asked_for(folder: Path) -> None:
    with serving(folder, ("d0",), Settings(keys=("other", "secret"))) as server:
        for given in (None, "Bearer wrong", "secret", "Basic secret", "Bearer secret other"):
            headers = {} if given is None else {"Authorization": given}
            assert error(server.send("GET", "/v1/models", headers=headers))[0] == 401
            assert server.headers["www-authenticate"] == "Bearer"
        assert error(server.send("GET", "/metrics"))[0] == 401
        assert server.send("GET", "/v1/models", headers=KEY)[0] == 200
        assert server.send("GET", "/health") == (200, {"status": "ok"})
        assert server.send("GET", "/ready")[0] == 200


def test_a_retrained_adapter_is_read_again(tmp_path: Path) -> None:
    folder = make_served(tmp_path)
    with serving(folder, ("d0", "d1"), Settings(keys=("secret",)), max_tokens=500) as server:

        def reload() -> tuple[int, dict[str, str]]:
            status, body = server.send("POST", "/v1/adapters/reload", headers=KEY)
            return status, {one["id"]: one["status"] for one in body["data"]}

        def answer(most: int = 8) -> str:
            _, body = server.send("POST", "/v1/completions", {
                "model": "d0", "prompt": "red", "max_tokens": most}, KEY)  # fmt: skip
            return str(body["choices"][0]["text"])

        before = answer()
        assert reload() == (200, {"d0": "unchanged", "d1": "unchanged"})
        base = server.model.base
        save(folder / "adapters" / "d0", strong(base, "d0", 99), base)
        assert answer() == before
        # A request that runs ends on the adapter that it began with.
        long = str(server.model.generate("red", "d0", max_new_tokens=400))
        body = {"model": "d0", "prompt": "red", "max_tokens": 400, "stream": True}
        data = request_bytes("/v1/completions", body)
        data = data.replace(b"\r\n", b"\r\nAuthorization: Bearer secret\r\n", 1)
        with server.open(data) as connection:
            stream = connection.makefile("rb")
            started = [stream.readline() for _ in range(8)]
            assert reload() == (200, {"d0": "reloaded", "d1": "unchanged"})
            after = answer()
            assert after != before
            text = (b"".join(started) + stream.read1(1 << 20)).decode()
            while "[DONE]" not in text:
                text += stream.read1(1 << 20).decode()
        parts = re.findall(r"^data: (\{.*)$", text, re.M)
        assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == long
        (folder / "adapters" / "d0" / "adapter_model.safetensors").write_bytes(b"broken")
        status, found = reload()
        assert (status, found["d0"]) == (500, "failed")
        assert answer() == after
        text = server.send("GET", "/metrics", headers=KEY)[1]
        assert 'lora_domains_reloads_total{domain="d0",result="reloaded"} 1' in text


def test_a_full_queue_is_told_to_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, go = Batch.step, threading.Event()

    def held(batch: Batch) -> Any:
        go.wait(60)
        return step(batch)

    monkeypatch.setattr(Batch, "step", held)
    with serving(folder, ("d0",), rows=1, queue=2) as server, ExitStack() as busy:
        busy.callback(go.set)
        ask = request_bytes("/v1/completions", {"model": "d0", "prompt": "red", "max_tokens": 400})
        busy.enter_context(server.open(ask))
        server.until(lambda: server.service.scheduler._running)
        for _ in range(2):
            busy.enter_context(server.open(ask))
        server.until(lambda: server.service.scheduler.waiting == 2)
        assert server.send("GET", "/ready")[0] == 503
        text = server.send("GET", "/metrics")[1]
        assert "\nlora_domains_queue_requests 2.0\n" in text
        assert "\nlora_domains_running_answers 1.0\n" in text
        status, message, _ = error(server.complete("d0", "red"))
        assert (status, "queue is full" in message) == (429, True)
        assert 1 <= int(server.headers["retry-after"]) <= 60
        # Clients that leave make room, whether their answer was begun or not.
        busy.close()
        server.until(lambda: not server.service.scheduler.waiting)
        server.until(lambda: server.send("GET", "/ready")[0] == 200)
        assert server.complete("d0", "red")[0] == 200


def test_a_body_that_is_too_large_or_too_slow_is_refused(folder: Path) -> None:
    with serving(folder, ("d0",), Settings(body=2000, idle=0.5)) as server:
        assert error(server.complete("d0", "x" * 3000))[0] == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        with server.open(head + b"Transfer-Encoding: chunked\r\n\r\n" +
                         b"400\r\n" + b"x" * 1024 + b"\r\n400\r\n" + b"x" * 1024 + b"\r\n"
                         ) as connection:  # fmt: skip
            assert b" 413 " in connection.recv(4096)
        with server.open(head + b"Content-Length: 500\r\n\r\n{") as connection:
            assert b" 408 " in connection.recv(4096)
        # Half of a head, nothing at all, or half of a second head.
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for data in (head, b""):
            with server.open(data) as connection:
                assert connection.recv(10) == b""
        with server.open(b"\x00\xff nonsense\r\n\r\n") as connection:
            assert b" 400 " in connection.recv(4096)
        with server.open(whole) as connection:
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(4096)
            connection.sendall(whole[:20])
            assert connection.recv(10) == b""
        assert server.complete("d0", "red")[0] == 200


def test_a_client_that_reads_nothing_is_cut_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, pause = threading.Event(), H11Protocol.pause_writing
    monkeypatch.setattr(H11Protocol, "pause_writing", lambda self: (paused.set(), pause(self)))
    settings = Settings(idle=0.5)
    with serving(folder, ("d0",), settings, buffer=4096, max_tokens=500) as server:
        body = {"model": "d0", "prompt": ["red"] * 8, "max_tokens": 480, "stream": True}

        def asking() -> socket.socket:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(request_bytes("/v1/completions", body))
            return connection

        with asking():
            server.until(lambda: any(line.startswith("499") for line in server.lines))
        server.until(lambda: not server.service.scheduler._running)
        # One that was slow for a while is not.
        paused.clear()
        with asking() as connection:
            assert paused.wait(20)
            text = b""
            while b"[DONE]" not in text[-100:]:
                part = connection.recv(1 << 16)
                assert part
                text += part
        assert server.complete("d0", "red")[0] == 200


def test_an_answer_has_a_time_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: (time.sleep(0.05), step(batch))[1])
    with serving(folder, ("d0",), Settings(timeout=0.4), max_tokens=500) as server:
        assert error(server.complete("d0", "red", max_tokens=400))[0] == 504
        server.until(lambda: not server.service.scheduler._running)
        events = server.send("POST", "/v1/completions", {
            "model": "d0", "prompt": "red", "max_tokens": 400, "stream": True})[1]  # fmt: skip
        assert "took too long" in events.split("\n\n")[-2]


def test_requests_fail_when_the_server_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: (time.sleep(0.05), step(batch))[1])
    with serving(folder, ("d0",), rows=1, max_tokens=500) as server:
        found: list[Any] = []

        def send() -> None:
            found.append(server.complete("d0", "red", max_tokens=400))

        waiting = [threading.Thread(target=send) for _ in range(3)]
        for thread in waiting:
            thread.start()
        server.until(lambda: server.service.scheduler.waiting == 2)
        server.service.scheduler.stop()
        for thread in waiting:
            thread.join()
        assert [error(answer)[:2] for answer in found] == [(503, "The server is stopping.")] * 3
        assert error(server.complete("d0", "red"))[0] == 503
        assert server.send("GET", "/health")[0] == 503


def test_answers_that_outlast_the_grace_are_cut_off_without_a_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: (time.sleep(0.05), step(batch))[1])
    body = {"model": "d0", "prompt": "red", "max_tokens": 400}
    with serving(folder, ("d0",), grace=1, max_tokens=500) as server:
        whole = server.open(request_bytes("/v1/completions", body))
        streamed = server.open(request_bytes("/v1/completions", {**body, "stream": True}))
        server.until(lambda: len(server.service.scheduler._running) == 2)
    answer = http.client.HTTPResponse(whole)
    answer.begin()
    assert (answer.status, "stopping" in answer.read().decode()) == (503, True)
    whole.close()
    streamed.close()
    assert [line[:3] for line in server.lines] == ["503", "503"]
    assert not [record for record in caplog.records if record.exc_info]


def test_an_error_fails_its_requests_only(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "a text of the request about stopping"

    def broken(*_: Any) -> Any:
        raise RuntimeError(secret)

    for owner, name, send in (
        (Batch, "step", lambda: server.complete("d0", "red")),
        (Batch, "join", lambda: server.complete("d0", "red")),
        (scheduler, "predict_encoded", lambda: server.chat("spam", "red")),
        (app.prompts, "messages_in", lambda: server.chat("d0", "red")),
        (scheduler.prompts, "text_prompt", lambda: server.complete("d0", "red")),
    ):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            status, message, _ = error(send())
            assert (status, message) == (500, "The server could not answer (RuntimeError).")
            # Where it was raised, and not what it says: that may be text of the request.
            assert "RuntimeError" in caplog.text
            assert "in broken" in caplog.text
            assert secret not in caplog.text
        assert send()[0] == 200


def test_a_lack_of_memory_is_no_fault_of_the_client(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OutOfMemory(where="scoring", expected="memory", found="none", hint="")

    monkeypatch.setattr(scheduler, "predict_encoded", full)
    assert error(server.chat("spam", "red"))[0] == 500


def test_counts_and_logs_hold_no_text(server: Server) -> None:
    planted = "Zebrafinch"
    server.chat("d5", planted, max_tokens=3)
    server.chat(planted, planted)
    server.send("POST", "/v1/classify", {"model": "spam", "input": planted, planted: 1})
    server.send("GET", f"/{planted}?{planted}")
    text = server.send("GET", "/metrics")[1]
    assert server.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert planted not in text + "".join(server.lines)
    assert 'requests_total{domain="d5",endpoint="/v1/chat/completions",status="200"}' in text
    assert re.search(r'tokens_total\{domain="d5",kind="completion"\} \d+', text)
    assert re.search(r'request_seconds_bucket\{domain="d5",[^}]*le="\+Inf"\} 1', text)
    assert re.search(r'first_token_seconds_count\{domain="d5",[^}]*\} 1', text)
    assert server.lines[-1].startswith("400 /v1/classify ")
    for line in text.splitlines():  # name{labels} value
        assert line.startswith("# ") or re.fullmatch(
            r'lora_domains_[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+-]+', line
        ), line
