// The jobs in one state, a page at a time; of those that failed, why.

const LISTED_STATES = {
  queued: "Waiting", started: "Running", finished: "Finished", failed: "Failed", deferred: "Deferred",
  scheduled: "Scheduled", canceled: "Cancelled",
};

const jobList = {
  state: "failed",
  after: null,

  open(state, after) {
    if (state !== this.state || after !== this.after) listRows.show([]);
    this.state = state;
    this.after = after;
    setText(byId("list-title"), this.title());
    setText(byId("list-trouble"), "");
    setText(byId("listed").nextElementSibling, "");
    byId("next-page").hidden = true;
    byId("first-page").hidden = after === null;
    byId("first-page").href = addressOfList(state);
    showStates(state);
  },

  title() {
    return `${LISTED_STATES[this.state] ?? visible(this.state).slice(0, 40)} jobs`;
  },

  async look() {
    const { state, after } = this;
    const query = new URLSearchParams(after === null ? { state } : { state, after });
    try {
      const page = await askJson(`v1/jobs?${query}`);
      if (state === this.state && after === this.after) this.show(page);
    } catch (error) {
      if (error.status === 401) lock();
      else if (error.status && error.status !== 503) setText(byId("list-trouble"), visible(error.message));
    }
  },

  show({ data = [], next = null, total = 0 }) {
    byId("listed").classList.toggle("with-prompts", data.some((job) => job.prompt !== undefined));
    listRows.show(data);
    setText(byId("list-trouble"), "");
    setText(byId("listed").nextElementSibling, `No ${this.title().toLowerCase()}${this.after === null ? "" : " here"}.`);
    setText(byId("list-total"), `${whole(total)} in all`);
    byId("next-page").hidden = next === null;
    if (next !== null) byId("next-page").href = addressOfList(this.state, next);
  },
};

function showStates(current) {
  const items = Object.entries(LISTED_STATES).map(([state, name]) => {
    const link = makeElement("a", "", name);
    link.href = addressOfList(state);
    if (state === current) link.setAttribute("aria-current", "page");
    const item = makeElement("li");
    item.append(link);
    return item;
  });
  byId("states").replaceChildren(...items);
}

const listRows = new Rows(byId("listed"), (job) => job.id, [
  { head: true, control: makeJobLink, text: shortId, title: (job) => job.id, style: "id" },
  { text: (job) => STATES[job.status] ?? job.status, kind: (job) => job.status, style: "state" },
  { text: (job) => visible(job.message ?? ""), note: (job) => job.error, style: "sentence" },
  { text: (job) => visible(String(promptOf(job))), title: promptOf, style: "prompt" },
  { text: (job) => whole(job.attempts), style: "number" },
  { text: (job) => moments(job.enqueued_at), style: "number" },
  { text: (job) => moments(job.ended_at), style: "number" },
  { control: makeAgainButton, showControl: showAgainButton, style: "control" },
]);

function makeAgainButton(id) {
  const button = makeElement("button", "", "Run again");
  button.type = "button";
  const short = visible(id.slice(0, 8));
  button.setAttribute("aria-label", `Run job ${short} again`);
  button.addEventListener("click", async () => {
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = "true";
    try {
      const { id: newId } = await runAgain(id);
      announce(newId === id ? `Job ${short} runs again` : `Job ${short} runs again, as job ${newId.slice(0, 8)}`);
    } catch (error) {
      if (error.status === 401) lock();
      announce(`Job ${short} could not be run again: ${error.message}`);
      setText(byId("list-trouble"), `Job ${short} could not be run again: ${visible(error.message)}`);
    }
    button.ariaDisabled = "false";
    look();
  });
  return button;
}

function showAgainButton(button, job) {
  button.hidden = !ENDED.includes(job.status);
}
