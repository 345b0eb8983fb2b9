// The page: looks at the endpoint every two seconds, and says how it is.

const PERIOD = 2_000; // ms
const LONGEST_PERIOD = 8_000; // ms, while nobody answers

let period = PERIOD;
let timer = 0;
let looking = false;
let historyDue = 0; // on the clock of performance.now()
let shown = false;
let told = "";

/** Look once, and again in a while. Not while nobody sees the page, nor while it waits for a token. */
async function look() {
  clearTimeout(timer);
  if (looking || document.hidden || !byId("token-form").hidden) return;
  looking = true;
  try {
    const seen = await asked();
    if (seen) show(...seen);
  } finally {
    looking = false;
    timer = setTimeout(look, period);
  }
}

/** The status and the latest jobs; or nothing, and the page says why. */
async function asked() {
  const withHistory = performance.now() >= historyDue;
  try {
    const [status, jobs] = await Promise.all([
      askJson(withHistory ? "status?history=true" : "status"),
      askJson(`v1/jobs?limit=${JOBS_ASKED}`),
    ]);
    if (withHistory) historyDue = performance.now() + 1000 * timeline.step;
    period = PERIOD;
    return [{ ...status, workers: status.workers ?? [] }, jobs.data ?? []];
  } catch (error) {
    historyDue = 0;
    period = Math.min(2 * period, LONGEST_PERIOD);
    if (error.status === 401) lock();
    else showTrouble(error);
    return null;
  }
}

function show(status, jobs) {
  shown = true;
  for (const section of document.querySelectorAll("main > section")) section.hidden = false;
  document.body.classList.remove("stale");
  showCharts(status);
  showTables(status, jobs);
  const { workers } = status;
  const models = (status.models ?? []).join(", ");
  const waiting = `${whole(status.queue?.depth)}\u00a0waiting`;
  const kind = !workers.length ? "alone" : workers.some((worker) => worker.in_hand) ? "serving" : "idle";
  const word = { alone: "No workers", serving: "Serving", idle: "Idle" }[kind];
  showState(kind, word, workers.length ? joined(models, count(workers.length, "worker", "workers"), waiting) : waiting);
  say(byId("as-of"), clock(timeline.end));
  tellChange(workers.length ? `Serving, ${count(workers.length, "worker", "workers")}` : "No workers");
}

/** What is on the page stays there, marked as what was. */
function showTrouble(error) {
  document.body.classList.add("stale");
  const [word, reason] = troubleOf(error);
  showState("trouble", word, joined(reason, "asking again"));
  if (shown) say(byId("as-of"), `as of ${clock(timeline.end)}`);
  tellChange(joined(word, reason));
}

function troubleOf({ status, message, explained }) {
  if (!status) return ["The endpoint does not answer", ""];
  if (status === 503) return [explained ? "Redis is away" : "The endpoint is busy", ""];
  return ["The endpoint refuses", message];
}

function showState(kind, word, rest) {
  const state = byId("state");
  state.dataset.kind = kind;
  say(state.firstElementChild, word);
  say(state.lastElementChild, rest && ` · ${rest}`);
}

/** For a screen reader: what has just happened. */
function announce(text) {
  say(byId("news"), text);
}

/** Of how the pool is, only that it has become different. */
function tellChange(text) {
  if (text !== told) announce(text);
  told = text;
}

/** Ask for the token; what it opens is put away. */
function lock() {
  const tried = token.read() !== null;
  token.write(null);
  for (const section of document.querySelectorAll("main > section")) section.hidden = true;
  showState("locked", "Locked", "");
  say(byId("as-of"), "");
  say(byId("token-note"), tried ? "That token was refused." : "It is kept in this tab until you close it.");
  byId("token-form").hidden = false;
  byId("token").value = "";
  byId("token").focus();
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // What a header cannot hold cannot be a token either.
  token.write(byId("token").value.replace(/[^!-~]/g, ""));
  byId("token").value = "";
  byId("token-form").hidden = true;
  showState("waiting", "Connecting", "");
  period = PERIOD;
  look().then(() => {
    if (byId("token-form").hidden) byId("prompt").focus();
  });
});

document.addEventListener("visibilitychange", look);
addEventListener("online", look);
look();
