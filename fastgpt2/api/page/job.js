// One job: how it stands, what it asks for, and how it ended.

const TEXT_SHOWN = 20_000; // characters
const TEXTS_SHOWN = 16;

const ENDED = ["finished", "failed", "stopped", "canceled"];

const jobPage = {
  id: null,
  job: null, // as the endpoint tells of it; null until it has
  isOver: false, // nothing will come that is not known
  isActing: false,

  open(id) {
    this.id = id;
    this.isOver = false;
    this.show(null);
    setText(byId("job-id"), visible(id));
    this.tell("", "Asking");
  },

  title() {
    return `Job ${visible(this.id).slice(0, 40)}`;
  },

  async look() {
    const { id } = this;
    if (this.isOver || this.isActing) return;
    try {
      const job = await askJson(`v1/jobs/${encodeURIComponent(id)}?details=true`);
      if (id === this.id && !this.isActing) this.show(job);
    } catch (error) {
      if (error.status === 401) lock();
      else if (id === this.id && error.status) this.showTrouble(error);
    }
  },

  showTrouble({ status, message }) {
    if (status === 503) return; // the page says so, and asks again
    this.isOver = true;
    this.show(null);
    this.tell("failed", status === 404 ? `There is no such job: ${message}` : message);
  },

  tell(kind, text) {
    const state = byId("job-state").firstElementChild;
    state.dataset.kind = kind;
    setText(state, visible(text));
  },

  show(job) {
    this.job = job;
    const hasEnded = job !== null && ENDED.includes(job.status);
    this.isOver ||= hasEnded && (job.status !== "canceled" || !job.worker || job.error !== null);
    byId("run-again").ariaDisabled = String(!hasEnded);
    byId("cancel-job").ariaDisabled = String(job === null || hasEnded || job.status === "expired");
    setText(byId("run-again-note"), hasEnded ? describeRunningAgain(job) : "");
    for (const part of ["job-failure", "job-result", "job-request"]) byId(part).hidden = true;
    showList(byId("job-figures"), job ? figuresOf(job) : []);
    if (job === null) return;
    this.tell(job.status, STATES[job.status] ?? job.status);
    showFailure(job);
    showResult(job);
    showRequest(job.details?.request, job.details?.shows_prompts);
  },

  /** Do something with the job, once, and show what has become of it. */
  async act(button, action) {
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = "true";
    this.isActing = true;
    try {
      await action(this.id);
    } catch (error) {
      if (error.status === 401) lock();
      announce(error instanceof Refusal ? error.message : "The endpoint does not answer");
      setText(byId("run-again-note"), error instanceof Refusal ? visible(error.message) : "The endpoint does not answer");
      if (this.job !== null) button.ariaDisabled = "false";
      return;
    } finally {
      this.isActing = false;
    }
    this.isOver = false;
    await this.look();
  },
};

function describeRunningAgain({ status }) {
  return status === "failed" || status === "stopped" ? "under the same id" : "as a new job with the same request";
}

/** Return what stands in the margin: moments, durations, and who had the job. */
function figuresOf({ details = {}, ...job }) {
  const timings = job.result?.timings ?? {};
  const waited = isNumber(job.started_at) && isNumber(job.enqueued_at) ? job.started_at - job.enqueued_at : null;
  const ran = isNumber(job.ended_at) && isNumber(job.started_at) ? job.ended_at - job.started_at : null;
  return [
    ["enqueued", moments(job.enqueued_at)],
    ["started", moments(job.started_at)],
    ["ended", moments(job.ended_at)],
    ["waited", duration(waited === null ? null : Math.max(0, waited))],
    ["ran", duration(ran === null ? null : Math.max(0, ran))],
    ["prefill", duration(timings.prefill_seconds)],
    ["decode", duration(timings.decode_seconds)],
    ["attempts", whole(job.attempts)],
    ...(details.crashes ? [["workers died", whole(details.crashes)]] : []),
    ...(isNumber(details.retries_left) ? [["retries left", whole(details.retries_left)]] : []),
    ["worker", visible(job.worker ?? UNKNOWN)],
    ["queue", visible(details.queue || UNKNOWN)],
    ["priority", details.priority ?? UNKNOWN],
    ["model", visible(job.result?.model ?? details.model ?? UNKNOWN)],
    ...(details.depends_on?.length ? [["waits for", visible(details.depends_on.join(" "))]] : []),
    ...(isNumber(details.job_timeout) ? [["may run", duration(details.job_timeout)]] : []),
    ...(isNumber(details.result_ttl) ? [["kept for", duration(details.result_ttl)]] : []),
  ];
}

/** Return the moment: the time alone if it was today. */
function moments(epochSeconds) {
  if (!isNumber(epochSeconds)) return UNKNOWN;
  const then = new Date(1000 * epochSeconds);
  const isToday = then.toDateString() === new Date().toDateString();
  return isToday ? clock(epochSeconds) : then.toLocaleString("en-GB", { dateStyle: "short", timeStyle: "short" });
}

function showFailure({ error, status, details }) {
  const hasFailed = Boolean(error) && status !== "canceled"; // whose error says no more than its state
  byId("job-failure").hidden = !hasFailed;
  if (!hasFailed) return;
  setText(byId("job-error"), visible(error.message));
  const text = details?.failure ?? "";
  byId("job-traceback").hidden = !text;
  setText(byId("job-traceback").lastElementChild, visible(text));
}

function showResult({ result }) {
  byId("job-result").hidden = !result;
  const box = byId("job-texts");
  if (!result) return box.replaceChildren();
  showList(byId("job-tokens"), [
    ["tokens", tokensOf(result.usage ?? {})],
    ["ended by", { length: "the limit", stop: "itself" }[result.finish_reason] ?? result.finish_reason ?? UNKNOWN],
    ...(isNumber(result.seed) ? [["seed", String(result.seed)]] : []),
    ...(result.usage?.cached_tokens ? [["cached", whole(result.usage.cached_tokens)]] : []),
  ]);
  const texts = [result, ...(result.alternatives ?? [])];
  const shown = texts.slice(0, TEXTS_SHOWN).map(({ text }) => shorten(text));
  const more = texts.length > shown.length ? [`and ${whole(texts.length - shown.length)} more texts`] : [];
  // A selection survives a second look that finds the same.
  if (box.dataset.of === JSON.stringify(shown) && box.childElementCount) return;
  box.dataset.of = JSON.stringify(shown);
  box.replaceChildren(...shown.map((text, nth) => makeText(text, nth, texts.length)), ...more);
}

function makeText(text, nth, count) {
  const block = makeElement("pre", "", visible(text));
  block.tabIndex = 0;
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", count > 1 ? `Text ${nth + 1} of ${count}` : "Text");
  return block;
}

function shorten(text) {
  return text.length <= TEXT_SHOWN ? text : `${text.slice(0, TEXT_SHOWN)}… (${whole(text.length - TEXT_SHOWN)} more characters)`;
}

function showRequest(request, showsPrompts) {
  byId("job-request").hidden = !request;
  if (!request) return;
  const { prompt, messages, ...fields } = request;
  const asked = prompt || messages || prompt;
  const hidden = "not shown; --show-prompts of the endpoint shows it";
  showList(byId("job-fields"), [
    ["prompt", showsPrompts ? visible(written(asked ?? UNKNOWN)) : hidden],
    ...Object.entries(fields).map(([name, value]) => [visible(name), visible(written(value))]),
  ]);
}

function written(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

byId("run-again").addEventListener("click", ({ target }) => jobPage.act(target, async (id) => {
  const { id: newId } = await runAgain(id);
  announce(newId === id ? "The job runs again" : `The job runs again, as job ${newId.slice(0, 8)}`);
  if (newId !== id) location.hash = addressOfJob(newId);
}));
byId("cancel-job").addEventListener("click", ({ target }) => jobPage.act(target, async (id) => {
  const { cancelled } = await cancelJob(id);
  announce(cancelled ? "The job is cancelled" : "The job had ended");
}));
