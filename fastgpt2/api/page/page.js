// The page: it looks at the endpoint every two seconds, and shows the state of the pool.

const PERIOD = 2_000; // ms
const LONGEST_PERIOD = 8_000; // ms, while nobody answers

let period = PERIOD;
let timer = 0;
let isLooking = false;
let historyDue = 0; // on the clock of performance.now()
let isShown = false;
let lastNews = "";

/** Look once, and again after a while; but not while nobody sees the page, nor while it waits for a token. */
async function look() {
  clearTimeout(timer);
  if (isLooking || document.hidden || !byId("token-form").hidden) return;
  isLooking = true;
  try {
    const [found] = await Promise.all([readPool(), lookAtView()]);
    if (found) show(...found);
  } finally {
    isLooking = false;
    timer = setTimeout(look, period);
  }
}

/** Return the status and the latest jobs; or null, and the page says why. */
async function readPool() {
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
  isShown = true;
  for (const section of document.querySelectorAll("main > section")) section.hidden = false;
  document.body.classList.remove("stale");
  showCharts(status);
  showTables(status, jobs);
  showModels(status);
  const { workers } = status;
  const models = (status.models ?? []).join(", ");
  const waiting = `${whole(status.queue?.depth)}\u00a0waiting`;
  const silent = workers.filter((worker) => worker.state === "silent").length;
  const live = workers.length - silent;
  const kind = !live ? "alone" : workers.some((worker) => worker.in_hand) ? "serving" : "idle";
  const word = { alone: silent ? "No worker answers" : "No workers", serving: "Serving", idle: "Idle" }[kind];
  const pool = join(live && models, live && count(live, "worker", "workers"), silent && `${whole(silent)}\u00a0silent`);
  showState(kind, word, join(pool, waiting));
  setText(byId("as-of"), clock(timeline.end));
  tellChange(live ? join(`Serving, ${count(live, "worker", "workers")}`, silent && `${whole(silent)} silent`) : word);
}

/** Show an error. What is on the page stays there, marked as old. */
function showTrouble(error) {
  document.body.classList.add("stale");
  const [word, reason] = describeTrouble(error);
  showState("trouble", word, join(reason, "asking again"));
  if (isShown) setText(byId("as-of"), `as of ${clock(timeline.end)}`);
  tellChange(join(word, reason));
}

function describeTrouble({ status, message, explained }) {
  if (!status) return ["The endpoint does not answer", ""];
  if (status === 503) return [explained ? "Redis is away" : "The endpoint is busy", ""];
  return ["The endpoint refuses", message];
}

function showState(kind, word, rest) {
  const state = byId("state");
  state.dataset.kind = kind;
  setText(state.firstElementChild, word);
  setText(state.lastElementChild, rest && ` · ${rest}`);
}

/** Tell a screen reader what has just happened. */
function announce(text) {
  setText(byId("news"), text);
}

/** Announce the state of the pool, if it has changed. */
function tellChange(text) {
  if (text !== lastNews) announce(text);
  lastNews = text;
}

/** Ask for the token, and hide what it protects. */
function lock() {
  const tried = token.read() !== null;
  token.write(null);
  for (const section of document.querySelectorAll("main > section")) section.hidden = true;
  showState("locked", "Locked", "");
  setText(byId("as-of"), "");
  setText(byId("token-note"), tried ? "That token was refused." : "It is kept in this tab until you close it.");
  byId("token").ariaInvalid = String(tried);
  byId("token-form").hidden = false;
  byId("token").value = "";
  byId("token").focus();
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // A token holds no characters that a header cannot hold.
  token.write(byId("token").value.replace(/[^!-~]/g, ""));
  byId("token").value = "";
  byId("token-form").hidden = true;
  showState("waiting", "Connecting", "");
  period = PERIOD;
  look().then(() => {
    if (byId("token-form").hidden) (document.body.dataset.view === "pool" ? byId("prompt") : titleOfView()).focus();
  });
});

document.addEventListener("visibilitychange", look);
addEventListener("online", look);
look();
