// The models by the names that jobs may give: a table of them, and the choice of one for a prompt.

const modelRows = new Rows(byId("models"), (model) => model.name, [
  {
    head: true,
    text: (model) => model.name,
    title: (model) => model.name,
    note: (model) => {
      const others = (model.models ?? []).filter((name) => name !== model.name);
      return others.length ? `a name of ${others.join(", ")}` : "";
    },
  },
  {
    text: (model) => (model.served ? "served" : "not served"),
    kind: (model) => (model.served ? "busy" : "silent"),
    note: (model) => join(count(model.workers, "worker", "workers"), model.silent && `${whole(model.silent)} silent`),
    style: "state",
  },
  {
    text: (model) => whole(model.depth),
    note: (model) => isNumber(model.oldest_wait_seconds) && `first ${age(model.oldest_wait_seconds)}`,
    style: "number",
  },
  { text: (model) => whole(model.in_hand), note: (model) => `of ${whole(model.max_batch)}`, style: "number" },
  { text: (model) => roughly(model.tokens_per_second), style: "number" },
  { text: (model) => whole(model.totals?.generated_tokens), style: "number" },
  {
    text: (model) => whole(model.totals?.finished),
    note: (model) => `${whole(model.totals?.failed)} failed`,
    style: "number",
  },
]);

/** Show the models if there is more than one name, or one that no worker serves. */
function showModels(status) {
  const models = Object.entries(status.by_model ?? {}).map(([name, state]) => ({ ...state, name }));
  const several = models.length > 1 || models.some((model) => !model.served && model.depth);
  byId("models-row").hidden = !several;
  modelRows.show(several ? models : []);
  const served = models.filter((model) => model.workers).map((model) => model.name);
  showChoice(served, status.workers.find((worker) => !worker.named_only && worker.model)?.model);
}

/** Offer the names for a prompt; none is chosen until somebody does, and what was chosen stays. */
function showChoice(names, first) {
  byId("model-choice").hidden = names.length < 2;
  const select = byId("model");
  const texts = [first ? `${first} (the pool's first)` : "the pool's first", ...names];
  if (texts.join("\n") === [...select.options].map((option) => option.text).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...texts.map((text, nth) => {
    const option = makeElement("option", "", text);
    option.value = nth ? text : "";
    return option;
  }));
  select.value = names.includes(chosen) ? chosen : "";
}
