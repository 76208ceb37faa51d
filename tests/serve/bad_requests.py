"""Requests that no server should answer, and what it should say to them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from tests.serve.support import KEY, NAME, http_request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_BYTES = 100_000
"""Of a body, on the server that is asked."""


@dataclass(frozen=True)
class Bad:
    """A request and its refusal."""

    name: str
    request: bytes
    statuses: tuple[int, ...] = (400,)
    param: str | None = None
    """The field that is to be named; None: there is none."""
    word: str = ""
    """What the message has to say; the field's name if empty."""
    is_closed: bool = False
    """Whether the client says that nothing more will come."""
    is_http: bool = True
    """Whether it is; else the refusal is HTTP's own, without an error object."""


def _body(body: bytes, path: str = COMPLETIONS, **headers: str | None) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http_request("POST", path, body, named)


def _completion(**fields: Any) -> bytes:
    body = {"model": NAME, "prompt": "Question:", "max_tokens": 1, **fields}
    return _body(json.dumps(body).encode())


def _chat(**fields: Any) -> bytes:
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    body = {"model": NAME, "messages": asked, "max_tokens": 1, **fields}
    return _body(json.dumps(body).encode(), CHAT)


def _field(name: str, value: Any, label: str = "", param: str | None = None, **more: Any) -> Bad:
    """A completion with one field that is wrong."""
    request = _completion(**{name: value}, **more)
    return Bad(f"{name}: {label or json.dumps(value)[:40]}", request, param=param or name)


def _chat_field(name: str, value: Any, label: str = "", param: str = "", **more: Any) -> Bad:
    """The same of a chat."""
    request = _chat(**{name: value}, **more)
    return Bad(f"chat {name}: {label or json.dumps(value)[:40]}", request, param=param or name)


def _tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", "parameters": parameters}}


def _deep(levels: int) -> bytes:
    """A chat that is to call a tool with such a schema."""
    mark = "here"
    request = json.dumps(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": "a"}],
            "tools": [_tool({"not": mark})],
            "tool_choice": "required",
        }
    )
    schema = '{"not":' * levels + "{}" + "}" * levels
    return _body(request.replace(f'"{mark}"', schema).encode(), CHAT)


def _without(name: str) -> bytes:
    body: dict[str, Any] = {"model": NAME, "prompt": "Question:"}
    del body[name]
    return _body(json.dumps(body).encode())


def _text(text: str, label: str, param: str | None = None, word: str = "") -> Bad:
    """A body as it is written."""
    return Bad(label, _body(text.encode()), param=param, word=word or param or "body")


def _headers(label: str, statuses: tuple[int, ...], **headers: str | None) -> Bad:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()
    request = http_request("POST", COMPLETIONS, body, named)
    return Bad(label, request, statuses, word=" ")


def _kind(label: str, given: str | None) -> Bad:
    """A good body that is said to be something else."""
    refused = _headers(label, (415,), Content_Type=given)
    return replace(refused, word="content-type: expected application/json, got")


BODIES = [
    _text("", "nothing"),
    _text("{", "cut off", word="JSON"),
    _text(json.dumps({f"x{i}": 1 for i in range(300)}), "very many fields", word="256 fields"),
    _text('{"prompt": "a"', "cut off in an object", word="JSON"),
    _text("{'prompt': 'a'}", "Python's quotes", word="JSON"),
    _text('{"prompt": "a",}', "a comma too many", word="JSON"),
    _text("prompt=a", "a form", word="JSON"),
    _text("[]", "a list"),
    _text('"a"', "a text"),
    _text("null", "null"),
    _text("7", "a number"),
    _text("[" * 20_000, "deep lists", word="JSON"),
    _text('{"a":' * 20_000, "deep objects", word="JSON"),
    _text('{"prompt": "a", "temperature": NaN}', "NaN", param="temperature"),
    _text('{"prompt": "a", "temperature": Infinity}', "Infinity", param="temperature"),
    _text('{"prompt": "a", "top_p": -Infinity}', "-Infinity", param="top_p"),
    _text('{"prompt": "a", "temperature": 1e999}', "1e999", param="temperature"),
    _text('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "5,000 digits", word=" "),
    _text('{"prompt": "a\\ud83d"}', "half of a character", param="prompt"),
    _text('{"prompt": ["a", "b\\udc00"]}', "half of one in a list", param="prompt[1]"),
    _text('{"prompt": "a", "stop": "\\ud800"}', "half of one to stop at", param="stop"),
    _text('{"prompt": "a", "prompt": 7}', "a key twice", param="prompt"),
    Bad("invalid UTF-8", _body(b'{"prompt": "\xff\xfe\x80"}'), word="body"),
    Bad("UTF-16", _body('{"prompt": 7}'.encode("utf-16")), param=None, word=" "),
    Bad("zeros", _body(b"\0" * 64), word="body"),
    Bad("too large", _body(b" " * (MOST_BYTES + 1)), (413,), word=str(MOST_BYTES)),
    Bad(
        "said to be too large",
        http_request("POST", COMPLETIONS, b"{}", {"Content-Length": str(10**12)}),
        (413,),
        word=str(MOST_BYTES),
    ),
    Bad(
        "too large in pieces",
        http_request("POST", COMPLETIONS, None, {"Transfer-Encoding": "chunked"})
        + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 8
        + b"0\r\n\r\n",
        (413,),
        word=str(MOST_BYTES),
    ),
]

FIELDS = [
    Bad("no prompt", _without("prompt"), param="prompt"),
    _field("prompt", ""),
    _field("prompt", []),
    _field("prompt", [[]], param="prompt"),
    _field("prompt", [""], param="prompt"),
    _field("prompt", {"a": 1}, param="prompt"),
    _field("prompt", 7),
    _field("prompt", None),
    _field("prompt", ["a", 7], param="prompt"),
    _field("prompt", [1, "a"], param="prompt"),
    _field("prompt", [-1], param="prompt"),
    _field("prompt", [10**6], "no such token", param="prompt"),
    _field("prompt", [2**70], "70 bits", param="prompt"),
    _field("prompt", [1.5], param="prompt"),
    _field("prompt", [True], param="prompt"),
    _field("prompt", "apples " * 8000, "too long", param="prompt"),
    _field("prompt", [5] * 2048, "as long as the context", param="prompt"),
    _field("prompt", ["a"] * 65, "more than may be answered at once", param="n"),
    _field("max_tokens", -1),
    _field("max_tokens", 1.5),
    _field("max_tokens", "many"),
    _field("max_tokens", True),
    _field("max_tokens", 1e400, "beyond all floats"),
    _field("max_tokens", "16"),
    _field("speculative", {"max_tokens": 2.5}, param="speculative.max_tokens"),
    _chat_field("logprobs", 1.0),
    _field("temperature", -0.1),
    _field("temperature", "hot"),
    _field("temperature", 1e300),
    _field("temperature", 1e-9),
    _field("temperature", []),
    _field("top_p", 0),
    _field("top_p", 1.01),
    _field("top_k", -2),
    _field("top_k", 1.5),
    _field("min_p", 2),
    _field("n", 0),
    _field("n", -1),
    _field("n", 1_000_000),
    _field("n", 65, "more than may be"),
    _field("best_of", 2),
    _field("seed", 2**64, "65 bits"),
    _field("seed", "one"),
    _field("seed", 1.5),
    _field("stop", ""),
    _field("stop", [""], param="stop"),
    _field("stop", [1], param="stop"),
    _field("stop", ["a"] * 1000, "a thousand"),
    _field("stop_token_ids", [-1], param="stop_token_ids[0]"),
    _field("stop_token_ids", "a"),
    _field("presence_penalty", 3),
    _field("frequency_penalty", -3),
    _field("repetition_penalty", 0),
    _field("logit_bias", []),
    _field("logit_bias", {"a": 1}, param="logit_bias"),
    _field("logit_bias", {"-1": 1}, param="logit_bias"),
    _field("logit_bias", {"1000000": 1}, param="logit_bias"),
    _field("logit_bias", {"5": "much"}, param="logit_bias.5"),
    _field("logit_bias", {str(i): 1 for i in range(2000)}, "of 2,000 tokens"),
    _field("logprobs", -1),
    _field("logprobs", 10_000),
    _field("logprobs", True),
    _field("echo", "yes"),
    _field("stream", "yes"),
    _field("stream_options", {"include": 1}, param="stream_options.include"),
    _field("stream_options", 7),
    _field("user", 7),
    _field("cache_salt", "a" * 1000, "a thousand letters"),
    _field("speculative", 7),
    _field("speculative", {"max_tokens": -1}, param="speculative.max_tokens"),
    _field("speculative", {"max_tokens": 1000}, param="speculative.max_tokens"),
    _field("speculative", {"drafter": "x"}, param="speculative.drafter"),
    _field("nonsense", 1),
    _field("min_tokens", -1),
    _field("bad_words", [7], param="bad_words[0]"),
    _field("allowed_token_ids", [10**6], "no such token"),
    _field("allowed_token_ids", []),
    _field("skip_special_tokens", "no"),
    Bad("another model", _completion(model="gpt-9"), (404,), param="model", word="gpt-9"),
    Bad("a model's path", _completion(model="../../etc/passwd"), (404,), param="model"),
    _field("model", 7),
]

FORMS = [
    _field("structured_outputs", {}),
    _field("structured_outputs", {"regex": "a", "choice": ["a"]}, "two forms"),
    _field("structured_outputs", {"regex": "(["}, param="structured_outputs"),
    _field("structured_outputs", {"regex": "a{1000000000}"}, param="structured_outputs"),
    _field("structured_outputs", {"choice": []}, param="structured_outputs"),
    _field("structured_outputs", {"grammar": "start: nothing"}, param="structured_outputs"),
    _field("structured_outputs", {"grammar": "a" * 90_000}, "90 KB of grammar"),
    _field("structured_outputs", {"json": {"type": "stone"}}, param="structured_outputs"),
    _field("structured_outputs", {"json": "{"}, param="structured_outputs"),
    _field("structured_outputs", {"json": {"$ref": "http://localhost/a"}}, "a schema elsewhere"),
    _field("structured_outputs", {"json": {"$ref": "file:///etc/passwd"}}, "a schema on disk"),
    _field("structured_outputs", {"shape": 1}, param="structured_outputs.shape"),
    _field("response_format", {"type": "xml"}, param="response_format.type"),
    _chat_field("response_format", {"type": "json_schema"}, "without a schema"),
    _chat_field("response_format", "json"),
    _chat_field(
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 7}}},
        "no schema",
    ),
]

CHATS = [
    Bad("no messages", _body(b"{}", CHAT), param="messages"),
    _chat_field("messages", []),
    _chat_field("messages", "hello"),
    _chat_field("messages", ["hello"], param="messages[0]"),
    _chat_field("messages", [{}], param="messages[0].role"),
    _chat_field("messages", [{"role": "user", "content": 7}], param="messages[0].content"),
    _chat_field("messages", [{"role": "king", "content": "a"}], param="messages[0].role"),
    _chat_field("messages", [{"role": 7, "content": "a"}], param="messages[0].role"),
    _chat_field("messages", [{"role": "user", "content": [7]}], param="messages[0].content[0]"),
    _chat_field(
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}],
        "an image",
        param="messages[0].content[0]",
    ),
    _chat_field("messages", [{"role": "user"}], "no content", param="messages[0]"),
    _chat_field(
        "messages", [{"role": "system", "content": "a"}], "a role that the template refuses"
    ),
    _chat_field("messages", [{"role": "user", "content": "a " * 20_000}], "too long"),
    _chat_field("max_tokens", 0),
    _chat_field("max_completion_tokens", -1),
    _chat_field("top_logprobs", 2, "without logprobs"),
    _chat_field("top_logprobs", 1000, logprobs=True),
    _chat_field("logprobs", 3),
    _chat_field("tools", 7),
    _chat_field("tools", [{"type": "bomb"}], param="tools[0].type"),
    _chat_field(
        "tools",
        [{"type": "function", "function": {"name": "a b"}}],
        "a name with a space",
        param="tools[0].function.name",
    ),
    _chat_field("tools", [_tool({"a": math.nan})], "NaN", param="tools[0].function.parameters"),
    Bad("a tool's deep schema", _deep(200), param="tools"),
    Bad("a tool's deeper schema", _deep(600), param="tools"),
    Bad(
        "a response's metadata: Infinity",
        _body(b'{"input": "a", "metadata": {"a": Infinity}}', "/v1/responses"),
        param="metadata",
    ),
    _chat_field("tool_choice", "required", "without tools", param="tools"),
    _chat_field("tool_choice", "perhaps"),
]

HEADERS = [
    _headers("no key", (401,), Authorization=None),
    _headers("another key", (401,), Authorization="Bearer wrong"),
    _headers("no scheme", (401,), Authorization=KEY),
    _headers("another scheme", (401,), Authorization=f"Basic {KEY}"),
    _headers("a part of the key", (401,), Authorization=f"Bearer {KEY[:-1]}"),
    _headers("more than the key", (401,), Authorization=f"Bearer {KEY}x"),
    _headers("an empty key", (401,), Authorization="Bearer "),
    _headers("a key of no ASCII", (401,), Authorization="Bearer \xe4\xf6\xfc"),
    _headers("a long key", (401, 431, 400), Authorization="Bearer " + "a" * 20_000),
    _kind("no content type", None),
    _kind("a text as content type", "text/plain"),
    _kind("curl's own content type", "application/x-www-form-urlencoded"),
    _kind("a form as content type", "multipart/form-data; boundary=x"),
    _kind("two content types", "application/json, text/plain"),
    _headers("another host", (421,), Host="evil.example"),
    _headers("an absurd host", (400, 421), Host="[::"),
    _headers("another origin", (403,), Origin="http://evil.example"),
    _headers("no origin", (403,), Origin="null"),
]

ROUTES = [
    Bad("an unknown route", http_request("GET", "/v1/nothing", None), (404,), word=" "),
    Bad("GET for POST", http_request("GET", COMPLETIONS, None), (405,), word=" "),
    Bad("PUT", http_request("PUT", COMPLETIONS, b"{}"), (405,), word=" "),
    Bad("DELETE a model", http_request("DELETE", f"/v1/models/{NAME}", None), (405,), word=" "),
    Bad("POST for GET", http_request("POST", "/v1/models", b"{}"), (405,), word=" "),
    Bad("a method of nobody's", http_request("BREW", "/health", None), (400, 405), word=" "),
    Bad("a slash too many", http_request("POST", "/v1//completions", b"{}"), (404,), word=" "),
    Bad("another model's facts", http_request("GET", "/v1/models/x", None), (404,), "model"),
    Bad("up the tree", http_request("GET", "/../../etc/passwd", None), (404,), word=" "),
    Bad("up the tree, quoted", http_request("GET", "/%2e%2e/%2e%2e/etc/passwd", None), (404,),
        word=" "),
    Bad("beside the page", http_request("GET", "/page/../app.py", None), (404,), word=" "),
    Bad("the page's folder", http_request("GET", "/page/index.html", None), (404,), word=" "),
    Bad("a zero in a path", http_request("GET", "/page.js%00.html", None), (404,), word=" "),
    Bad("a long path", http_request("GET", "/" + "a" * 20_000, None), (404, 414), word=" "),
    Bad("/tokenize nothing", _body(b"{}", "/tokenize"), param="prompt"),
    Bad("/tokenize a number", _body(b'{"prompt": 7}', "/tokenize"), param="prompt"),
    Bad("/detokenize nothing", _body(b"{}", "/detokenize"), param="tokens"),
    Bad("/detokenize a text", _body(b'{"tokens": "a"}', "/detokenize"), param="tokens"),
    Bad("/detokenize no token", _body(b'{"tokens": [1, 9999999]}', "/detokenize"),
        param="tokens[1]"),
]  # fmt: skip

# What is no HTTP is the HTTP library's to refuse: 400 in its own words, or nothing at all.
NO_HTTP = [
    Bad("noise", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n", is_http=False),
    Bad("no host", http_request("GET", "/health", None, {"Host": None}), is_http=False),
    Bad("a header without a colon", b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        is_http=False),
    Bad("a negative length",
        http_request("POST", COMPLETIONS, b"", {"Content-Length": "-5"}), is_http=False),
    Bad("a length of letters",
        http_request("POST", COMPLETIONS, b"{}", {"Content-Length": "two"}), is_http=False),
    Bad("two lengths",
        http_request("POST", COMPLETIONS, b"{}", {"Content-length": "5"}), is_http=False),
    Bad("a chunk of no size",
        http_request("POST", COMPLETIONS, None, {"Transfer-Encoding": "chunked"})
        + b"zz\r\n{}\r\n0\r\n\r\n", is_http=False),
    Bad("a chunk longer than itself",
        http_request("POST", COMPLETIONS, None, {"Transfer-Encoding": "chunked"})
        + b"2\r\n{}{}\r\n0\r\n\r\n", is_http=False),
    Bad("less than was said",
        http_request("POST", COMPLETIONS, b"{}", {"Content-Length": "50"}),
        is_closed=True, is_http=False),
    Bad("half a head", b"POST /v1/completions HTTP/1.1\r\nHost: loc", is_closed=True,
        is_http=False),
    Bad("headers without end",
        b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, is_closed=True, is_http=False),
    Bad("nothing at all", b"", is_closed=True, is_http=False),
]  # fmt: skip

ALL: list[Bad] = [
    *BODIES, *FIELDS, *FORMS, *CHATS, *HEADERS, *ROUTES, *NO_HTTP,
]  # fmt: skip
