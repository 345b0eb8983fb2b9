// The form that tries a prompt, and the text as it comes.

const CANCEL_WITHIN = 3_000; // ms

// The controls that say how tokens are chosen, by their fields. An empty one leaves its field out.
const CHOOSING = {
  temperature: "temperature",
  top_p: "top-p",
  repetition_penalty: "repetition-penalty",
  seed: "seed",
};

/** Return the fields of the controls that have a value. */
function readChoosing() {
  const values = Object.entries(CHOOSING).map(([field, id]) => [field, byId(id).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => isNumber(value)));
}

const trial = {
  abort: null, // the AbortController of the request under way, else null
  job: null,
  cancelled: false,

  async run() {
    if (this.abort !== null) return;
    this.abort = new AbortController();
    this.job = null;
    this.cancelled = false;
    this.showButtons();
    const prompt = byId("prompt").value;
    const answer = new Answer(prompt);
    try {
      await this.read(prompt, answer);
      answer.end(answer.summary());
    } catch (error) {
      if (error.status === 401) lock();
      const reason = error instanceof Refusal ? error.message : "the endpoint does not answer";
      answer.end(this.cancelled ? join("Cancelled", answer.summary()) : `Failed: ${reason}`, !this.cancelled);
    } finally {
      this.abort = null;
      this.showButtons();
      look();
    }
  },

  /** Read an answer to its end. Throws what `ask` throws. */
  async read(prompt, answer) {
    const reply = await ask("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        prompt,
        ...(byId("model").value && { model: byId("model").value }),
        max_tokens: byId("max-tokens").valueAsNumber,
        ...readChoosing(),
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal: this.abort.signal,
    });
    this.job = reply.headers.get("x-job-id");
    if (this.cancelled) this.cancel();
    for await (const data of eventsOf(reply.body)) {
      if (data === "[DONE]") return;
      const { error, choices, usage } = JSON.parse(data);
      if (error) throw new Refusal(error.message ?? "an error without a message", 0);
      answer.add(choices?.[0], usage);
    }
    throw new Refusal("the stream broke off", 0);
  },

  /** Cancel the job by its id, so that its end still comes; if there is no id yet, or no end, close the connection. */
  async cancel() {
    if (this.abort === null) return;
    this.cancelled = true;
    const { abort } = this;
    if (this.job === null) return abort.abort();
    setTimeout(() => abort.abort(), CANCEL_WITHIN);
    await cancelJob(this.job).catch(() => abort.abort());
  },

  showButtons() {
    byId("generate").ariaDisabled = String(this.abort !== null);
    byId("cancel").ariaDisabled = String(this.abort === null);
  },
};

/** The text on the page, and how long it took to come. */
class Answer {
  constructor(prompt) {
    this.box = byId("answer");
    this.pending = "";
    this.usage = null;
    this.seed = null;
    this.reason = null;
    this.started = performance.now();
    this.first = null;
    this.box.replaceChildren();
    this.box.append(makeElement("span", "asked", prompt));
    this.box.classList.add("coming");
    setText(byId("answer-end"), "");
    byId("answer-end").classList.remove("failed");
    byId("keep-seed").ariaDisabled = "true";
  }

  add(choice, usage) {
    if (usage) this.usage = usage;
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    if (isNumber(choice?.seed)) this.seed = choice.seed;
    if (!choice?.text) return;
    this.first ??= performance.now();
    if (!this.pending) requestAnimationFrame(() => this.flush());
    this.pending += choice.text;
  }

  /** Show what has come, once a frame. Each time it is a node of its own: a screen reader says only what is new. */
  flush() {
    if (!this.pending) return;
    const { scrollTop, scrollHeight, clientHeight } = this.box;
    const atEnd = scrollTop + clientHeight >= scrollHeight - 8;
    this.box.append(this.pending);
    this.pending = "";
    if (atEnd) this.box.scrollTop = this.box.scrollHeight;
  }

  end(text, failed = false) {
    this.flush();
    this.box.classList.remove("coming");
    byId("answer-end").classList.toggle("failed", failed);
    setText(byId("answer-end"), text);
    if (this.seed === null) return;
    byId("keep-seed").value = this.seed;
    byId("keep-seed").ariaDisabled = "false";
  }

  summary() {
    const now = performance.now();
    const { usage, first } = this;
    const accepted = usage?.completion_tokens_details?.accepted_prediction_tokens;
    const speed = usage && first !== null && now > first ? (usage.completion_tokens - 1) / ((now - first) / 1000) : 0;
    return join(
      this.reason && { length: "Stopped at the limit", stop: "Ended by itself" }[this.reason],
      usage && `${whole(usage.prompt_tokens)} + ${whole(usage.completion_tokens)} tokens`,
      usage?.prompt_tokens_details?.cached_tokens > 0 && `${whole(usage.prompt_tokens_details.cached_tokens)} cached`,
      accepted > 0 && `${whole(accepted)} guessed`,
      first !== null && `first after\u00a0${duration((first - this.started) / 1000)}`,
      speed > 0 && `then ${roughly(speed)}\u00a0tokens/s`,
      `${duration((now - this.started) / 1000)} in all`,
      this.seed !== null && `seed\u00a0${this.seed}`,
    );
  }
}

byId("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  trial.run();
});
byId("prompt-form").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  byId("prompt-form").requestSubmit();
});
byId("cancel").addEventListener("click", () => trial.cancel());
byId("keep-seed").addEventListener("click", ({ target }) => {
  if (target.ariaDisabled === "false") byId("seed").value = target.value;
});
