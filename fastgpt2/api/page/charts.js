// Four charts of the last 15 minutes: the endpoint's history, and what this page has seen since its last point.

const SPAN = 900; // s
const PLOT = { width: 900, height: 100 };

const CHARTS = [
  {
    title: "Queue depth",
    unit: "waiting",
    lines: ["depth"],
    least: 5,
    read: whole,
    detail: ({ queue }) => join(
      ...Object.entries(queue?.by_priority ?? {}).map(([name, depth]) => `${name}\u00a0${whole(depth)}`),
      isNumber(queue?.oldest_wait_seconds) && `oldest\u00a0${age(queue.oldest_wait_seconds)}`,
    ),
  },
  {
    title: "Tokens per second",
    unit: "tokens/s",
    lines: ["tokens_per_second"],
    least: 10,
    read: roughly,
    detail: ({ rates }) => join(...["1m", "5m", "15m"].map(
      (span) => `${span.replace("m", "\u00a0min")}\u00a0${roughly(rates?.[span]?.tokens_per_second)}`,
    )),
  },
  {
    title: "Batch occupancy",
    unit: "of the slots",
    lines: ["batch_occupancy"],
    most: 1,
    read: percent,
    detail: ({ workers, rates }) => join(
      `${whole(total(workers, "in_hand"))} of ${whole(total(workers, "max_batch"))} in hand`,
      `mean batch\u00a0${roughly(rates?.["1m"]?.batch)}`,
    ),
  },
  {
    title: "Time to first token",
    unit: "",
    note: "mean, 1 min",
    now: ({ rates }) => rates?.["1m"]?.first_token_seconds,
    lines: ["first_token_seconds", "queue_seconds"],
    least: 0.01,
    read: duration,
    detail: ({ rates }) => join(
      `of it waiting\u00a0${duration(rates?.["1m"]?.queue_seconds)}`,
      `then a token\u00a0${duration(rates?.["1m"]?.token_seconds)}`,
    ),
  },
];

/** The points in time that all charts draw, each with the figures of that moment. */
const timeline = {
  points: [],
  totals: [], // [time, tokens generated so far] at the last looks
  step: 10, // s
  end: 0,

  /** Take in a status. Its history, if it has one, counts up to its last point; this page's looks go on from there. */
  add(status) {
    this.end = status.time ?? Date.now() / 1000;
    const { seconds, points } = status.history ?? {};
    if (isNumber(seconds) && seconds > 0) this.step = seconds;
    if (Array.isArray(points)) {
      // A point stands for the seconds that begin with it; it is drawn where they end.
      const past = points.map((point) => ({ ...point, at: point.at + this.step, batch_occupancy: occupancyOf(point) }));
      const last = past.at(-1)?.at ?? -Infinity;
      this.points = [...past, ...this.points.filter((point) => point.isLook && point.at > last)];
    }
    this.points.push(this.pointOf(status));
    this.points = this.points.filter((point) => point.at >= this.end - SPAN && point.at <= this.end);
  },

  /** Return this moment as a point of the history. Only the history has means of the times that jobs took. */
  pointOf({ queue, workers, totals }) {
    const slots = total(workers, "max_batch");
    return {
      at: this.end,
      isLook: true,
      depth: queue?.depth,
      tokens_per_second: this.rate(totals?.generated_tokens),
      batch_occupancy: slots ? total(workers, "in_hand") / slots : 0,
    };
  },

  /** Return the tokens a second since a look about ten seconds ago: workers report once a second, not all at once. */
  rate(generated) {
    this.totals = this.totals.filter(([at]) => at < this.end && at >= this.end - this.step - 1);
    const [at, before] = this.totals[0] ?? [];
    if (isNumber(generated)) this.totals.push([this.end, generated]);
    if (isNumber(generated) && isNumber(before) && generated >= before) return (generated - before) / (this.end - at);
    return this.points.at(-1)?.tokens_per_second;
  },

  /** Return the point with a known figure that is nearest to a moment, given as seconds before the end; or null. */
  near(offset, key) {
    const distance = (point) => Math.abs(point.at - this.end - offset);
    return this.points
      .filter((point) => isNumber(point[key]))
      .reduce((best, point) => (best === null || distance(point) <= distance(best) ? point : best), null);
  },
};

/** Return the mean over the steps of that time, or 0 if there were none, as the slots were empty then. */
function occupancyOf(point) {
  return point.batch_occupancy ?? (isNumber(point.tokens_per_second) ? 0 : null);
}

/** A chart: the value now, the curve, and a read-out of any moment by pointer, finger or arrow keys. */
class Chart {
  constructor(plan) {
    this.plan = plan;
    const part = (selector) => this.figure.querySelector(selector);
    this.figure = byId("chart").content.firstElementChild.cloneNode(true);
    this.now = part(".now span");
    this.detail = part(".detail");
    this.svg = part("svg");
    this.top = part(".top");
    this.cursor = part(".cursor");
    this.range = part("input");
    part("h3").textContent = plan.title;
    part("small").textContent = plan.note ?? plan.unit;
    this.range.setAttribute("aria-label", `${plan.title}: look back`);
    // The area lies under the last curve, whose figure is part of the first one's; the first curve is on top.
    this.area = this.path(plan.lines.length > 1 ? "area second" : "area");
    this.curves = plan.lines.map((_, nth) => this.path(nth ? "curve second" : "curve"));
    this.svg.append(this.curves[0]);
    this.offset = null; // the moment that is read out, in seconds before the end; null is now
    this.follow(part(".plot"));
  }

  path(kind) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", kind);
    return this.svg.appendChild(path);
  }

  follow(plot) {
    const pick = (offset) => {
      this.offset = offset;
      this.readOut();
    };
    plot.addEventListener("pointermove", (event) => {
      const { left, width } = plot.getBoundingClientRect();
      pick(SPAN * (Math.min(1, Math.max(0, (event.clientX - left) / width)) - 1));
    });
    const leave = () => {
      this.range.value = "0";
      pick(null);
    };
    plot.addEventListener("pointerleave", leave);
    this.range.addEventListener("input", () => pick(Number(this.range.value)));
    this.range.addEventListener("blur", leave);
  }

  show(status) {
    const { plan } = this;
    this.status = status;
    setText(this.now, plan.read(plan.now ? plan.now(status) : timeline.points.at(-1)[plan.lines[0]]));
    const values = plan.lines.flatMap((key) => timeline.points.map((point) => point[key])).filter(isNumber);
    const most = plan.most ?? roundUp(Math.max(plan.least, ...values));
    setText(this.top, plan.read(most).replace(/\.(\d*?)0+(?=\D|$)/, (_, kept) => kept && `.${kept}`)); // no 2.00 s
    plan.lines.forEach((key, nth) => this.curves[nth].setAttribute("d", curve(key, most)));
    this.area.setAttribute("d", curve(plan.lines.at(-1), most, true));
    this.svg.setAttribute("aria-label", this.summary());
    this.readOut();
  }

  /** Return what the chart shows, in words. */
  summary() {
    const { title, lines, read } = this.plan;
    const values = timeline.points.map((point) => point[lines[0]]).filter(isNumber);
    if (!values.length) return `${title}, last 15 minutes: nothing known`;
    const mean = sum(values) / values.length;
    return `${title}, last 15 minutes: now ${this.now.textContent}, highest ${read(Math.max(...values))}, `
      + `lowest ${read(Math.min(...values))}, mean ${read(mean)}`;
  }

  readOut() {
    const { plan, offset } = this;
    const point = offset === null ? null : timeline.near(offset, plan.lines[0]);
    this.cursor.hidden = point === null;
    if (point === null) {
      setText(this.detail, this.status ? plan.detail(this.status) : "");
      this.range.setAttribute("aria-valuetext", `now, ${this.now.textContent}`);
      return;
    }
    this.cursor.style.left = `${100 * (1 + (point.at - timeline.end) / SPAN)}%`;
    const values = plan.lines.map((key) => plan.read(point[key])).join(", of it waiting\u00a0");
    const text = join(clock(point.at), `${values} ${plan.unit}`.trim());
    setText(this.detail, text);
    this.range.setAttribute("aria-valuetext", text);
  }
}

/** Return the next round number, at which an axis ends, so that most of the axis is used. */
function roundUp(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return size * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * size >= value * 0.999999);
}

/** Return the SVG path data of one figure. A time without points is a gap, and a single point between gaps a dash. */
function curve(key, most, closed = false) {
  const runs = [[]];
  let before = -Infinity;
  for (const point of timeline.points) {
    if (!isNumber(point[key])) continue;
    const at = point.at - timeline.end + SPAN;
    if (at - before > 2.5 * timeline.step) runs.push([]);
    before = at;
    const x = (PLOT.width * at) / SPAN;
    const y = PLOT.height * (1 - Math.min(1, Math.max(0, point[key] / most)));
    runs.at(-1).push([x.toFixed(1), y.toFixed(1)]);
  }
  return runs.filter((run) => run.length).map((run) => {
    const line = `M${run.map(([x, y]) => `${x} ${y}`).join("L")}`;
    if (closed) return `${line}V${PLOT.height}H${run[0][0]}Z`;
    return run.length === 1 ? `${line}h${(-PLOT.width * timeline.step) / SPAN}` : line;
  }).join("");
}

const charts = CHARTS.map((plan) => new Chart(plan));
byId("charts").append(...charts.map((chart) => chart.figure));

function showCharts(status) {
  timeline.add(status);
  for (const chart of charts) chart.show(status);
}
