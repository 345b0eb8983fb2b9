// The page of the routes: it sends the requests that stand on it, and shows the answers as they come.

// The endpoint's own address, which may have a path: a proxy can show it at a prefix, and a slash may follow "docs".
const BASE = new URL(location.pathname.replace(/\/docs\/*$/, "/"), location.origin);
const TELLING = ["content-type", "x-request-id", "x-job-id", "retry-after", "x-should-retry"];

/** Return the request that a form describes: its address, and the options of `fetch`. */
function requestOf(form) {
  let path = form.dataset.path;
  const query = new URLSearchParams();
  const headers = new Headers();
  for (const input of form.querySelectorAll("[data-in]")) {
    if (input.value === "") continue;
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.dataset.in === "query") query.set(input.name, input.value);
    else headers.set(input.name, input.value.replace(/[^\x20-\x7e]/g, ""));
  }
  const body = form.querySelector("textarea")?.value;
  if (body !== undefined) headers.set("Content-Type", "application/json");
  const url = new URL(path.slice(1) + (query.size ? `?${query}` : ""), BASE);
  return [url, { method: form.dataset.method, headers, body }];
}

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Return the line for a shell that sends the same request. */
function curlOf(form) {
  const [url, { method, headers, body }] = requestOf(form);
  const words = ["curl -sN", quote(url.href)];
  if (method !== (body === undefined ? "GET" : "POST")) words.push(`-X ${method}`);
  if (token.read() !== null) words.push('-H "Authorization: Bearer $FASTGPT2_TOKEN"');
  for (const [name, value] of headers) words.push(`-H ${quote(`${name}: ${value}`)}`);
  if (body !== undefined) words.push(`-d ${quote(body)}`);
  return words.join(" ");
}

/** One form, and the request that was sent from it last. */
class Sender {
  constructor(form) {
    this.form = form;
    this.part = (name) => form.querySelector(`.${name}`);
    this.abort = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    form.addEventListener("input", () => this.showCurl());
    this.part("stop").addEventListener("click", () => this.abort?.abort());
    this.showCurl();
  }

  showCurl() {
    setText(this.part("curl"), curlOf(this.form));
  }

  async send() {
    if (this.abort !== null) return;
    this.abort = new AbortController();
    this.showButtons();
    this.show("Sent", "");
    const began = performance.now();
    const took = () => duration((performance.now() - began) / 1000);
    try {
      const [url, options] = requestOf(this.form);
      if (token.read() !== null) options.headers.set("Authorization", `Bearer ${token.read()}`);
      const answer = await fetch(url, { ...options, cache: "no-store", redirect: "error", signal: this.abort.signal });
      if (answer.status === 401) askForToken();
      const told = TELLING.filter((name) => answer.headers.has(name)).map((name) => `${name}: ${answer.headers.get(name)}`);
      const line = () => [`${answer.status} ${answer.statusText}, ${took()}`, ...told].join(" · ");
      await this.read(answer, line);
      this.show(line(), null, !answer.ok);
    } catch (error) {
      const why = error.name === "AbortError" ? "Stopped" : "The endpoint does not answer";
      this.show(`${why}, ${took()}`, null, error.name !== "AbortError");
    } finally {
      this.abort = null;
      this.showButtons();
    }
  }

  /** Show the body of an answer as it comes; JSON that is whole with line ends, as people read it. */
  async read(answer, line) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      text += value;
      this.show(line(), text, !answer.ok);
    }
    if (answer.headers.get("content-type")?.startsWith("application/json")) this.show(line(), indented(text), !answer.ok);
  }

  show(line, text, isFailure = false) {
    const outcome = this.part("outcome");
    outcome.classList.toggle("failed", isFailure);
    setText(outcome, line);
    if (text !== null) setText(this.part("answer"), text);
  }

  showButtons() {
    this.part("send").ariaDisabled = String(this.abort !== null);
    this.part("stop").ariaDisabled = String(this.abort === null);
  }
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function askForToken() {
  const tried = token.read() !== null;
  token.write(null);
  setText(byId("token-note"), tried ? "That token was refused." : "This endpoint asks for a token.");
  byId("token").ariaInvalid = "true";
  byId("token").focus();
}

const senders = [...document.querySelectorAll("form.try")].map((form) => new Sender(form));

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // A token holds no characters that a header cannot hold.
  token.write(byId("token").value.replace(/[^!-~]/g, "") || null);
  byId("token").value = "";
  byId("token").ariaInvalid = "false";
  setText(byId("token-note"), token.read() === null ? "No token is sent." : "Requests have it now.");
  for (const sender of senders) sender.showCurl();
});

for (const link of document.querySelectorAll("a[data-route]")) link.href = new URL(link.dataset.route || "./", BASE);

/** Open what a link leads into: the fields of a body that is folded up. */
function unfold() {
  const target = byId(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", unfold);
unfold();
