// The text of figures; one that is not known is a dash. And the helpers that put text on the page.

const UNKNOWN = "–";

// What people read for RQ's words on how a job stands.
const STATES = {
  queued: "Waiting", started: "Running", finished: "Finished", failed: "Failed", stopped: "Stopped",
  canceled: "Cancelled", deferred: "Waiting for another job", scheduled: "Scheduled",
  rate_limited: "Waiting under a rate limit", expired: "Gone",
};

const wholeFormat = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function whole(value) {
  return isNumber(value) ? wholeFormat.format(value) : UNKNOWN;
}

/** Return a rate or a mean, with a decimal where that is more than noise. */
function roughly(value) {
  return isNumber(value) && value > 0 && value < 9.95 ? value.toFixed(1) : whole(value);
}

function percent(fraction) {
  return isNumber(fraction) ? `${Math.round(100 * fraction)}\u00a0%` : UNKNOWN;
}

function megabytes(bytes) {
  return isNumber(bytes) ? wholeFormat.format(bytes / 1e6) : UNKNOWN;
}

/** Return a duration, to two or three figures. */
function duration(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  if (seconds < 0.00995) return `${(1000 * seconds).toFixed(1)}\u00a0ms`;
  if (seconds < 0.9995) return `${Math.round(1000 * seconds)}\u00a0ms`;
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)}\u00a0s`;
  return age(seconds);
}

/** Return a duration in its largest unit alone. */
function age(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  const [size, unit] = units.find(([size]) => seconds >= 2 * size) ?? [1, "s"];
  return `${Math.floor(Math.max(0, seconds) / size)}\u00a0${unit}`;
}

function clock(epochSeconds) {
  return new Date(1000 * epochSeconds).toLocaleTimeString("en-GB");
}

function count(number, one, many) {
  return `${whole(number)}\u00a0${number === 1 ? one : many}`;
}

/** Return the sum of the known values, or null if none is known. */
function sum(values) {
  const known = values.filter(isNumber);
  return known.length ? known.reduce((total, value) => total + value, 0) : null;
}

/** Return the sum of one figure over many things. */
function total(things, name) {
  return sum(things.map((thing) => thing[name]));
}

function join(...parts) {
  return parts.filter(Boolean).join(" · ");
}

// Characters that a screen does not show, or that turn the direction of what follows.
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** Return a text from outside with the characters that nobody would see as their escapes. */
function visible(text) {
  return text.replace(UNSEEN, (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`);
}

function byId(id) {
  return document.getElementById(id);
}

/** Set an element's text if it differs: a selection in the element survives, and a screen reader stays silent. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make an element with a class and a text. All that comes from outside gets onto the page as text. */
function makeElement(name, kind = "", text = "") {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  if (text) element.textContent = text;
  return element;
}
