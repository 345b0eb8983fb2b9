// The tables of workers and of the latest jobs.

/**
 * The body of a table. An item keeps its row, and the row changes only where the item has changed: a selection, the
 * focus and the place of a screen reader survive each look at the endpoint.
 */
class Rows {
  /**
   * columns: each has `text`, which gives an item's text, and may have `note`, a second line; `title`; `kind`, for the
   * style; `control`, which makes a control for a row, and `showControl`, which updates it; `head`, if the column names
   * the row; `style`, the class of its cells.
   */
  constructor(table, keyOf, columns) {
    this.body = table.tBodies[0];
    this.empty = table.parentElement.querySelector(".empty");
    this.keyOf = keyOf;
    this.columns = columns;
    this.rows = new Map();
  }

  show(items) {
    const focused = document.activeElement;
    const left = new Map(this.rows);
    let place = this.body.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      const row = this.rows.get(key) ?? this.add(key);
      left.delete(key);
      if (row === place) place = row.nextElementSibling;
      else this.body.insertBefore(row, place);
      this.columns.forEach((column, nth) => showCell(row.cells[nth], column, item));
    }
    for (const [key, row] of left) {
      row.remove();
      this.rows.delete(key);
    }
    this.empty.hidden = items.length > 0;
    this.keepFocus(focused);
  }

  add(key) {
    const row = makeElement("tr");
    for (const column of this.columns) {
      const cell = makeElement(column.head ? "th" : "td", column.style);
      if (column.head) cell.scope = "row";
      if (column.control) cell.append(column.control(key));
      else cell.append(makeElement("span"));
      if (column.note) cell.append(makeElement("small"));
      row.append(cell);
    }
    this.rows.set(key, row);
    return row;
  }

  /** Give the focus back: to move a row takes it away at once, to hide the row's button does so a little later. */
  keepFocus(focused) {
    if (focused === document.body) return;
    const stays = focused.isConnected && focused.checkVisibility();
    if (stays && focused === document.activeElement) return;
    (stays ? focused : this.body.closest(".scroller")).focus({ preventScroll: true });
  }
}

function showCell(cell, column, item) {
  const [first, second] = cell.children;
  if (column.showControl) column.showControl(first, item);
  else setText(first, column.text(item));
  if (column.note) setText(second, column.note(item) || "");
  if (column.title) first.title = column.title(item) ?? "";
  if (column.kind) first.dataset.kind = column.kind(item);
}

const workerRows = new Rows(byId("workers"), (worker) => worker.name, [
  {
    head: true,
    text: (worker) => worker.name,
    title: (worker) => worker.name,
    note: (worker) => join(
      worker.host, isNumber(worker.pid) && `pid\u00a0${worker.pid}`,
      isNumber(worker.threads) && count(worker.threads, "core", "cores"), worker.blas ?? worker.computes_by,
      worker.drafts && worker.drafts !== "off" && `drafts\u00a0${worker.drafts}`,
    ),
  },
  {
    text: (worker) => worker.state ?? UNKNOWN,
    kind: (worker) => worker.state,
    note: (worker) => `seen ${ago(worker.heartbeat_age_seconds)}`,
    style: "state",
  },
  {
    text: (worker) => worker.model ?? UNKNOWN,
    title: (worker) => worker.notes?.join("\n"),
    note: (worker) => join(worker.version, worker.notes?.length && count(worker.notes.length, "note", "notes")),
  },
  { text: (worker) => whole(worker.in_hand), note: (worker) => `of ${whole(worker.max_batch)}`, style: "number" },
  { text: (worker) => roughly(worker.tokens_per_second), style: "number" },
  {
    text: (worker) => percent(worker.batch_occupancy),
    note: (worker) => `mean ${roughly(worker.batch_mean)}`,
    style: "number",
  },
  { text: (worker) => percent(worker.kv_used), style: "number" },
  {
    text: (worker) => megabytes(worker.private_bytes),
    note: (worker) => `+ ${megabytes(worker.shared_bytes)} shared`,
    style: "number",
  },
  {
    text: (worker) => whole(worker.jobs_finished),
    note: (worker) => `${whole(worker.jobs_failed)} failed`,
    style: "number",
  },
  {
    text: (worker) => age(worker.age_seconds),
    note: (worker) => isNumber(worker.restarts) && count(worker.restarts, "restart", "restarts"),
    style: "number",
  },
]);

const JOBS_ASKED = 100;
const JOBS_SHOWN = 20;
const RUNNING_SHOWN = 6; // at least, where jobs that have ended would fill the table

let moment = 0; // the endpoint's clock at the last look, in seconds since 1970
let modelsByWorker = new Map(); // empty if all workers have the same model

const jobRows = new Rows(byId("jobs"), (job) => job.id, [
  { head: true, control: makeJobLink, text: shortId, title: (job) => job.id, style: "id" },
  {
    text: (job) => (STATES[job.status] ?? job.status ?? UNKNOWN).toLowerCase(),
    kind: (job) => job.status,
    note: (job) => job.error ?? (job.finish_reason !== "cancelled" && job.finish_reason),
    title: (job) => job.error,
    style: "state",
  },
  { text: promptOf, title: promptOf, style: "prompt" },
  { text: tokensOf, title: savingsOf, style: "number" },
  { text: (job) => duration(job.queue_seconds), style: "number" },
  { text: (job) => duration(firstTokenOf(job)), style: "number" },
  { text: (job) => roughly(speedOf(job)), style: "number" },
  {
    text: (job) => job.worker ?? UNKNOWN,
    note: (job) => modelsByWorker.get(job.worker),
    title: (job) => job.worker,
    style: "name",
  },
  { text: (job) => (isNumber(job.ended_at) ? ago(moment - job.ended_at) : UNKNOWN), style: "number" },
  { control: makeCancelButton, showControl: showCancelButton, style: "control" },
]);

function ago(seconds) {
  return isNumber(seconds) ? `${age(seconds)} ago` : UNKNOWN;
}

/** Return a job's prompt, which may be token ids. */
function promptOf(job) {
  return Array.isArray(job.prompt) ? job.prompt.join(" ") : job.prompt ?? "";
}

/** Return the number of prompt tokens, and of generated ones. */
function tokensOf({ prompt_tokens: prompt, completion_tokens: generated }) {
  return isNumber(prompt ?? generated) ? `${whole(prompt)}\u00a0+\u00a0${whole(generated)}` : UNKNOWN;
}

/** Return how many prompt tokens were not computed, and how many guesses saved a step each. */
function savingsOf({ cached_tokens: cached, drafted, accepted }) {
  return join(
    cached > 0 && `${whole(cached)} of the prompt's were cached`,
    drafted > 0 && `${whole(accepted)} of ${whole(drafted)} guesses came true`,
  );
}

/** Return the seconds from a job's enqueueing to its first token, which ends the prefill. */
function firstTokenOf(job) {
  return isNumber(job.prefill_seconds) ? (job.queue_seconds ?? 0) + job.prefill_seconds : null;
}

/** Return the tokens a second after the first token. */
function speedOf(job) {
  return job.completion_tokens > 1 && job.decode_seconds > 0 ? (job.completion_tokens - 1) / job.decode_seconds : null;
}

/** Choose the jobs to show: some that have ended however many run, and some that run however many have ended. */
function chooseJobs(jobs) {
  const running = jobs.filter(isActive);
  const ended = jobs.filter((job) => !isActive(job));
  const count = Math.min(running.length, Math.max(RUNNING_SHOWN, JOBS_SHOWN - ended.length));
  return { shown: [...running.slice(0, count), ...ended.slice(0, JOBS_SHOWN - count)], more: running.length - count };
}

function isActive(job) {
  return job.status === "queued" || job.status === "started";
}

function shortId({ id }) {
  return visible(id.slice(0, 8));
}

function makeJobLink(id) {
  const link = makeElement("a");
  link.href = addressOfJob(id);
  return link;
}

function makeCancelButton(id) {
  const button = makeElement("button", "", "Cancel");
  button.type = "button";
  button.setAttribute("aria-label", `Cancel job ${id.slice(0, 8)}`);
  button.addEventListener("click", async () => {
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = "true";
    try {
      await cancelJob(id);
      announce(`Job ${id.slice(0, 8)} is cancelled`);
    } catch (error) {
      button.ariaDisabled = "false";
      announce(`Job ${id.slice(0, 8)} could not be cancelled: ${error.message}`);
    }
    look();
  });
  return button;
}

function showCancelButton(button, job) {
  button.hidden = !isActive(job);
}

/** Show a list of terms and figures in the margin. */
function showList(list, entries) {
  entries.forEach(([term, text], nth) => {
    const pair = list.children[nth] ?? list.appendChild(makeElement("div"));
    if (!pair.children.length) pair.append(makeElement("dt"), makeElement("dd"));
    setText(pair.firstElementChild, term);
    setText(pair.lastElementChild, text);
  });
  while (list.children.length > entries.length) list.lastElementChild.remove();
}

function showTables(status, jobs) {
  const { workers, totals } = status;
  moment = status.time ?? Date.now() / 1000;
  modelsByWorker = new Map(workers.map((worker) => [worker.name, worker.model]));
  if (new Set(modelsByWorker.values()).size < 2) modelsByWorker.clear();
  workerRows.show(workers);
  showList(byId("pool"), [
    ["memory", `${megabytes(total(workers, "private_bytes"))}\u00a0MB`],
    ["Redis", status.redis?.version ?? UNKNOWN],
    ["fastgpt2", status.version ?? UNKNOWN],
    ...(totals?.drafted_tokens > 0 ? [["drafts taken", percent(totals.accepted_tokens / totals.drafted_tokens)]] : []),
  ]);
  byId("jobs").classList.toggle("with-prompts", jobs.some((job) => job.prompt !== undefined));
  const { shown, more } = chooseJobs(jobs);
  jobRows.show(shown);
  setText(byId("more-jobs"), more ? `and ${whole(more)} more running` : "");
  const counts = status.jobs ?? {};
  showList(byId("counts"), [
    ["waiting", whole(counts.queued)],
    ["running", whole(counts.started)],
    ["finished", whole(counts.finished)],
    ["failed", whole(counts.failed)],
    ["cancelled", whole(counts.canceled)],
  ]);
}
