// Requests to the endpoint, and the token that it may ask for.

const ANSWER_WITHIN = 15_000; // ms
const TOKEN_KEY = "fastgpt2-token";

/** A refusal by the endpoint. `status` is HTTP's, 0 for an error within a stream; `explained`: it gave a reason. */
class Refusal extends Error {
  constructor(message, status, explained = true) {
    super(message);
    this.status = status;
    this.explained = explained;
  }
}

const token = {
  value: null,

  /** Return the token, which only this tab keeps. If the browser stores nothing, it lasts until the page is left. */
  read() {
    try {
      this.value ??= sessionStorage.getItem(TOKEN_KEY);
    } catch { /* storage is switched off */ }
    return this.value;
  },

  write(value) {
    this.value = value;
    try {
      if (value === null) sessionStorage.removeItem(TOKEN_KEY);
      else sessionStorage.setItem(TOKEN_KEY, value);
    } catch { /* as above */ }
  },
};

/**
 * Ask for a route, by an address relative to the page's, which may stand behind a prefix.
 * Throws Refusal; TypeError if nobody answers; an AbortError or TimeoutError if the signal says so.
 */
async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token.read() !== null) headers.set("Authorization", `Bearer ${token.read()}`);
  const answer = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  if (answer.ok) return answer;
  const sentence = await readSentence(answer);
  throw new Refusal(sentence ?? `status ${answer.status}`, answer.status, sentence !== null);
}

async function askJson(path, options = {}) {
  const answer = await ask(path, { signal: AbortSignal.timeout(ANSWER_WITHIN), ...options });
  return answer.json();
}

/** Return the message of an error, or null if there is none. Some routes put it in an object, as OpenAI's API does. */
async function readSentence(answer) {
  try {
    const { error } = await answer.json();
    return error?.message ?? error ?? null;
  } catch {
    return null;
  }
}

function cancelJob(id) {
  return askJson(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
}

/** Run a job again. Return it, or the new job that runs in its place. */
function runAgain(id) {
  return askJson(`v1/jobs/${encodeURIComponent(id)}/requeue`, { method: "POST" });
}

/** Yield the data of each server-sent event in a body. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
