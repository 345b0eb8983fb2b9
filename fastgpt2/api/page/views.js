// Which part of the page is shown, by the fragment of its address: the pool, the jobs in a state, or one job. A fragment
// is never sent: the frame is the same for all, and what a job holds comes with the token.

const VIEWS = {
  pool: { look: () => undefined, title: () => "", heading: () => document.querySelector("h1") },
  list: { look: () => jobList.look(), title: () => jobList.title(), heading: () => byId("list-title") },
  job: { look: () => jobPage.look(), title: () => jobPage.title(), heading: () => byId("job-title") },
};

function addressOfJob(id) {
  return `#/jobs/${encodeURIComponent(id)}`;
}

function addressOfList(state, after = null) {
  return `#/jobs?${new URLSearchParams(after === null ? { state } : { state, after })}`;
}

/** Return the name of the view that a fragment names, and what it shows. What names none is the pool. */
function readRoute(fragment) {
  const [path, query = ""] = fragment.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [what, id] = path.split(/\/(.*)/s);
  if (what !== "jobs") return { view: "pool" };
  if (id) return { view: "job", id: decode(id) };
  const parameters = new URLSearchParams(query);
  return { view: "list", state: parameters.get("state") ?? "failed", after: parameters.get("after") };
}

/** Return a text without its percent-encoding; as it is, if it is none. */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Show the view that the address names. */
function openView() {
  const route = readRoute(location.hash);
  document.body.dataset.view = route.view;
  if (route.view === "job") jobPage.open(route.id);
  if (route.view === "list") jobList.open(route.state, route.after);
  showTitle();
}

function showTitle() {
  document.title = join(VIEWS[document.body.dataset.view].title(), "fastgpt2");
}

function titleOfView() {
  return VIEWS[document.body.dataset.view].heading();
}

/** Ask the endpoint for what the view shows. An error is shown there, or by the page as a whole. */
async function lookAtView() {
  await VIEWS[document.body.dataset.view].look();
  showTitle();
}

addEventListener("hashchange", ({ oldURL }) => {
  openView();
  scrollTo(0, 0);
  // The focus goes where a reader goes on: back to the link that was followed, else to the title.
  const back = document.body.dataset.view !== "job" && linkTo(new URL(oldURL).hash);
  (back || titleOfView()).focus();
  if (byId("token-form").hidden) lookAtView();
});

/** Return the link to an address that the view has, if it has one. */
function linkTo(fragment) {
  const links = document.querySelectorAll("tbody a");
  return [...links].find((link) => link.getAttribute("href") === fragment && link.checkVisibility());
}

openView();
