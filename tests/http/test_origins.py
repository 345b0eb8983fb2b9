"""Who may ask the endpoint: pages of other origins, its own page behind proxies, names. In-process, without a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastgpt2 import settings
from fastgpt2.api.http.access import names_to_serve
from fastgpt2.api.http.app import Web, create_app
from fastgpt2.api.http.reference import Reference
from fastgpt2.api.http.service import Bounds
from fastgpt2.api.http.tokens import Token, Tokens
from fastgpt2.errors import BadRequest
from fastgpt2.setting import Setting

TOKEN = "correct-horse-battery-staple"
APP, OTHER = "https://app.example.com", "https://other.example.com"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}


def ask_app(
    token: str | None = None, most: int = 4000, client: str = "127.0.0.1", at: str = "http://localhost", **web: Any
) -> TestClient:
    """Return a client of an endpoint whose Redis nobody asks."""
    tokens = None if token is None else Tokens([Token(hashlib.sha256(token.encode()).digest())])
    app = create_app("redis://127.0.0.1:1", "q", Bounds(), lambda: False, tokens, Web(**web), most)
    return TestClient(app, base_url=at, client=(client, 1), raise_server_exceptions=False, follow_redirects=False)


class TestPagesOfOtherSites:
    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_it_is_off_by_default(self, token: str | None) -> None:
        web = ask_app(token)
        for origin in (APP, "null", "http://localhost:5173"):
            answer = web.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "forbidden_origin"
            assert f"pages of '{origin}' may not use this endpoint" in answer.json()["error"]["message"]
            assert "--allow-origin" in answer.json()["error"]["message"]
            told = web.get("/health", headers={"origin": origin}).headers
            assert not [name for name in (*told, *answer.headers) if name.startswith("access-control")]
            assert "vary" not in told

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_a_preflight_needs_no_token_and_says_what_may_be_sent(self, token: str | None) -> None:
        web = ask_app(token, allow_origin=("http://localhost:5173", APP))
        answer = web.options("/v1/completions", headers={"origin": APP, **PREFLIGHT})
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert int(answer.headers["access-control-max-age"]) > 0
        assert "origin" in answer.headers["vary"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        local = {"origin": APP, **PREFLIGHT, "access-control-request-private-network": "true"}
        assert web.options("/x", headers=local).headers["access-control-allow-private-network"] == "true"
        refused = web.options("/v1/completions", headers={"origin": OTHER, **PREFLIGHT})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers

    def test_every_answer_and_every_error_can_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def break_down(*_: object) -> None:
            raise ValueError("a defect")

        monkeypatch.setattr(Reference, "v1", break_down)
        bearing = {"authorization": f"Bearer {TOKEN}"}
        web = ask_app(TOKEN, allow_origin=(APP,))
        answers = [
            (200, web.get("/version", headers={"origin": APP, **bearing})),
            (400, web.post("/v1/completions", headers={"origin": APP, **bearing}, content=b"{")),
            (401, web.post("/v1/completions", headers={"origin": APP}, json={})),
            (404, web.get("/nothing", headers={"origin": APP, **bearing})),
            (405, web.options("/version", headers={"origin": APP, **bearing})),
            (500, web.get("/v1", headers={"origin": APP, **bearing})),
            (503, ask_app(TOKEN, 0, allow_origin=(APP,)).get("/version", headers={"origin": APP, **bearing})),
        ]
        for status, answer in answers:
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == APP, status
            assert answer.headers["access-control-expose-headers"] == "*"
            assert "Origin" in answer.headers["vary"]
        # A cache must not keep for one page what another page, or nobody, was told.
        for headers in ({}, {"origin": OTHER}):
            answer = web.get("/version", headers={**headers, **bearing})
            assert (answer.status_code, answer.headers["vary"]) == (200, "Origin")
            assert "access-control-allow-origin" not in answer.headers

    def test_a_star_is_for_all_pages(self) -> None:
        web = ask_app(allow_origin=("*",))
        for origin in (APP, "null"):
            answer = web.post("/v1/completions", headers={"origin": origin}, content=b"{")
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (400, "*")
            assert web.options("/", headers={"origin": origin, **PREFLIGHT}).status_code == 204


class TestWhatPagesWantToHaveDone:
    @pytest.mark.parametrize("origin", [OTHER, "null", "http://localhost.example.com", "localhost", ""])
    def test_a_page_from_elsewhere_has_nothing_done(self, origin: str) -> None:
        web = ask_app(allow_origin=(APP,))
        for method, path in (("POST", "/"), ("POST", "/v1/jobs/x/requeue"), ("DELETE", "/v1/jobs/x"), ("PUT", "/x")):
            answer = web.request(method, path, headers={"origin": origin})
            assert answer.status_code == 403, (method, path)
            assert "forbidden_origin" in answer.text
        assert web.get("/version", headers={"origin": origin}).status_code == 200, "which the page cannot read"

    def test_two_origins_are_none(self) -> None:
        web = ask_app(allow_origin=(APP,))
        assert web.post("/", headers=[("origin", APP), ("origin", OTHER)]).status_code == 403
        assert web.post("/", headers=[("origin", "http://localhost"), ("origin", OTHER)]).status_code == 403

    def test_who_has_the_token_may_ask_from_anywhere(self) -> None:
        web = ask_app(TOKEN)
        for origin in (OTHER, "null"):
            headers = {"origin": origin, "authorization": f"Bearer {TOKEN}"}
            assert web.post("/v1/completions", headers=headers, content=b"{").status_code == 400, "it was read"
            assert web.post("/v1/completions", headers={"origin": origin}, content=b"{").status_code == 401
            wrong = {"origin": origin, "authorization": "Bearer wrong"}
            assert web.post("/v1/completions", headers=wrong, content=b"{").status_code == 401

    @pytest.mark.parametrize(
        ("origin", "host", "is_own"),
        [
            ("http://localhost:8000", "localhost:8000", True),
            ("https://localhost", "localhost", True),  # a proxy with TLS that passes the host on
            ("https://localhost", "localhost:443", True),
            ("http://localhost", "LOCALHOST:80", True),
            ("http://localhost", "localhost:443", False),
            ("http://localhost:8000", "localhost:8001", False),
            ("http://localhost:8000", "127.0.0.1:8000", False),
            ("https://pool.example.com", "127.0.0.1:8000", True),
            ("http://pool.example.com", "127.0.0.1:8000", False),
            ("https://pool.example.com:8443", "127.0.0.1:8000", False),
            ("app://localhost:8000", "localhost:8000", False),  # a program with a browser in it
            ("capacitor://localhost", "localhost", False),
        ],
    )
    def test_the_endpoints_own_page_is_known(self, origin: str, host: str, is_own: bool) -> None:
        web = ask_app(public_url="https://pool.example.com/gpt2")
        answer = web.post("/", headers={"origin": origin, "host": host}, content=b"{")
        assert answer.status_code == (400 if is_own else 403)


class TestProxies:
    @pytest.mark.parametrize(
        ("headers", "host"),
        [
            ({}, "localhost"),
            ({"x-forwarded-host": "pool.example.com"}, "pool.example.com"),
            ({"x-forwarded-host": "pool.example.com:8443"}, "pool.example.com:8443"),
            ({"x-forwarded-host": "pool.example.com", "x-forwarded-port": "8443"}, "pool.example.com:8443"),
            ({"x-forwarded-host": "pool.example.com:8443", "x-forwarded-port": "443"}, "pool.example.com:8443"),
            # Of what was added, only what comes from trusted proxies: before that, a client may write anything.
            ({"x-forwarded-host": "evil.example, pool.example.com"}, "pool.example.com"),
            (
                {"x-forwarded-host": "evil.example, cdn.example", "x-forwarded-for": "10.1.1.1, 192.0.2.7"},
                "cdn.example",
            ),
            (
                {"x-forwarded-host": "evil.example, cdn.example, inner", "x-forwarded-for": "192.0.2.7, 10.1.1.1"},
                "cdn.example",
            ),
            ({"x-forwarded-host": "cdn.example", "x-forwarded-for": "192.0.2.7, 10.1.1.1"}, "cdn.example"),
            ({"forwarded": "for=192.0.2.7;host=pool.example.com;proto=https"}, "pool.example.com"),
            ({"forwarded": 'For="[2001:db8::1]:4711"; Host="pool.example.com:8443"'}, "pool.example.com:8443"),
            ({"forwarded": 'for=10.9.9.9;host=evil.example, for=192.0.2.7;host="a,b;c"'}, "a,b;c"),
            ({"forwarded": "for=192.0.2.7;host=cdn.example, for=10.1.1.1;host=inner"}, "cdn.example"),
            ({"forwarded": "for=192.0.2.7;proto=https"}, "localhost"),
            ({"forwarded": 'host="pool'}, "localhost"),
            ({"forwarded": "host=pool.example.com", "x-forwarded-host": "other"}, "pool.example.com"),
        ],
    )
    def test_what_a_trusted_proxy_says_stands_for_the_host(self, headers: dict[str, str], host: str) -> None:
        def sentence(**more: Any) -> str:
            return str(ask_app(**more).post("/", headers={"origin": OTHER, **headers}).json()["error"])

        assert f"asked by the name {host!r}" in sentence(trusted_proxy=("127.0.0.1/32", "10.0.0.0/8"), names=None)
        assert "asked by the name 'localhost'" in sentence(trusted_proxy=("192.0.2.0/24",), names=None)
        assert "asked by the name 'localhost'" in sentence(names=None), "nobody is believed by default"

    def test_addresses_of_ipv6_are_those_of_ipv4_where_they_say_so(self) -> None:
        for client, trusted in (("::ffff:10.1.1.1", True), ("10.1.1.1", True), ("::1", False), ("testclient", False)):
            web = ask_app(client=client, trusted_proxy=("10.0.0.0/8",), names=None)
            headers = {"origin": "http://pool.example", "x-forwarded-host": "pool.example"}
            assert web.post("/", headers=headers, content=b"{").status_code == (400 if trusted else 403), client

    def test_the_name_that_was_asked_for_must_be_served(self) -> None:
        for names, status in (((), 403), (("pool.example.com",), 200)):
            web = ask_app(trusted_proxy=("127.0.0.1",), names=names)
            assert web.get("/version", headers={"x-forwarded-host": "pool.example.com"}).status_code == status

    @pytest.mark.parametrize(
        ("path", "status", "said"),
        [
            ("/gpt2/version", 200, "version"),
            ("/version", 200, "version"),
            ("/gpt2//version/", 200, "version"),
            ("/gpt2/", 200, "Ok"),
            ("/gpt2/v1/", 200, "/v1/completions"),
            ("/gpt2x/version", 404, "/version may be meant"),
            ("/gpt2", 308, ""),
        ],
    )
    def test_the_path_of_the_public_url_is_taken_off(self, path: str, status: int, said: str) -> None:
        web = ask_app(public_url="https://example.com/gpt2")
        answer = web.get(path)
        assert answer.status_code == status
        assert said in answer.text
        if status == 308:
            assert answer.headers["location"] == "/gpt2/"

    def test_a_path_that_is_a_routes_stays_the_routes(self) -> None:
        web = ask_app(public_url="https://example.com/version")
        assert web.get("/version").status_code == 200
        assert web.get("/version/health").json() == {"status": "ok"}

    def test_the_document_names_the_public_url(self) -> None:
        assert ask_app(public_url="https://example.com/gpt2").get("/openapi.json").json()["servers"] == [
            {"url": "https://example.com/gpt2"}
        ]


def test_a_name_of_ones_own_is_served_on_loopback_too() -> None:
    web = ask_app(names=names_to_serve("127.0.0.1", "pool", "https://pool.example.com"))
    for host, status in (("pool:8000", 200), ("POOL", 200), ("localhost", 200), ("pool.example.com", 200), ("x", 403)):
        assert web.get("/version", headers={"host": host}).status_code == status, host


def test_what_every_endpoint_tells_needs_no_token() -> None:
    web = ask_app(TOKEN)
    for path in ("/docs", "/openapi.json", "/health", "/"):
        assert web.get(path).status_code == web.head(path).status_code == 200, path
        assert web.post(path).status_code == 401, path
    for path in ("/version", "/v1", "/status", "/nothing"):
        assert web.get(path).status_code == 401, path


@pytest.mark.parametrize(
    ("host", "host_name", "public_url", "names"),
    [
        ("127.0.0.1", None, None, ["127.0.0.1"]),
        ("127.0.0.1", "pool", None, ["127.0.0.1", "pool"]),
        ("127.0.0.1", None, "https://Pool.example:8443/x", ["127.0.0.1", "pool.example"]),
        ("0.0.0.0", None, None, None),
        ("0.0.0.0", None, "https://pool.example", None),
        ("0.0.0.0", "pool", None, ["pool"]),
        ("0.0.0.0", "pool", "https://pool.example", ["pool", "pool.example"]),
    ],
)
def test_the_names_that_are_served(
    host: str, host_name: str | None, public_url: str | None, names: Collection[str] | None
) -> None:
    assert names_to_serve(host, host_name, public_url) == names


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        (settings.ALLOW_ORIGIN, "http://localhost:3000/", ("http://localhost:3000",)),
        (settings.ALLOW_ORIGIN, "HTTPS://App.Example.com:443, http://[::1]:80", (APP, "http://[::1]")),
        (settings.ALLOW_ORIGIN, "* null chrome-extension://abc", ("*", "null", "chrome-extension://abc")),
        (settings.ALLOW_ORIGIN, "https://bücher.example", ("https://xn--bcher-kva.example",)),
        (settings.PUBLIC_URL, "https://Pool.example:443/gpt2/", "https://pool.example/gpt2"),
        (settings.PUBLIC_URL, "http://pool:8080", "http://pool:8080"),
        (settings.TRUSTED_PROXY, "127.0.0.1,10.1.2.3/8 ::1", ("127.0.0.1/32", "10.0.0.0/8", "::1/128")),
        (settings.HOST_NAME, "::1", "::1"),
    ],
)
def test_values_are_read_as_people_write_them(setting: Setting[Any], text: str, value: Any) -> None:
    assert setting.resolve(text) == value


@pytest.mark.parametrize(
    ("setting", "text", "sentence"),
    [
        (settings.ALLOW_ORIGIN, "http://localhost:3000/app", "has none: leave it out"),
        (settings.ALLOW_ORIGIN, "https://*.example.com", "name each origin instead"),
        (settings.ALLOW_ORIGIN, "localhost:3000", "does not begin with a scheme and a host"),
        (settings.ALLOW_ORIGIN, "http://a b", "does not begin with a scheme"),
        (settings.ALLOW_ORIGIN, "http://me@host", "holds a user's name or a password: leave these out"),
        (settings.ALLOW_ORIGIN, "http://host:99999", "has a host or a port that cannot be"),
        (settings.PUBLIC_URL, "https://pool.example/v1", "leave that out"),
        (settings.PUBLIC_URL, "ftp://pool.example", "does not begin with http"),
        (settings.PUBLIC_URL, "https://pool.example/?x=1", "holds a ? or a #: leave out"),
        (settings.PUBLIC_URL, "https://pool.example/a//b", "has a path of other characters"),
        (settings.TRUSTED_PROXY, "nginx", "is no address or network"),
        (settings.HOST_NAME, "http://pool", "must be a name alone"),
        (settings.HOST_NAME, "pool:8000", "must be a name alone"),
    ],
)
def test_values_that_mean_nothing_are_refused(setting: Setting[Any], text: str, sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        setting.resolve(text)
    assert str(caught.value).startswith(f"{setting.option}: ")
    assert sentence in str(caught.value)
