// What all parts of the page use: elements, numbers for people, ticks, the tip, and what is selected.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes = {}, parent = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.append(element);
  return element;
}

function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);

// As spcompile.text.format_bytes.
function formatBytes(nbytes) {
  if (Math.abs(nbytes) < 1024) return `${nbytes} B`;
  let scaled = nbytes / 1024;
  for (const unit of ["KiB", "MiB", "GiB"]) {
    if (Math.abs(Number(scaled.toFixed(2))) < 1024) return `${scaled.toFixed(2)} ${unit}`;
    scaled /= 1024;
  }
  return `${scaled.toFixed(2)} TiB`;
}

// As spcompile.viz.words.format_time; steps as they are.
function formatTime(time, unit) {
  if (unit === "step") return `step ${Math.round(time)}`;
  const digits = (number) => {
    if (number === 0) return "0";
    const whole = Math.abs(number) >= 1 ? String(Math.trunc(Math.abs(number))).length : 0;
    const places = Math.max(0, 3 - Math.max(1, whole));
    return number.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  };
  if (Math.abs(time) < 999.5) return `${digits(time)} us`;
  if (Math.abs(time) < 999.5e3) return `${digits(time / 1e3)} ms`;
  return `${digits(time / 1e6)} s`;
}

// Round values between two numbers, about so many.
function ticks(low, high, about, least = 0) {
  const rough = Math.max((high - low) / Math.max(1, about), least, Number.MIN_VALUE);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return { step, values: found };
}

// Round values of bytes: in the unit that suits the highest.
function byteTicks(low, high, about) {
  const units = [["B", 1], ["KiB", 2 ** 10], ["MiB", 2 ** 20], ["GiB", 2 ** 30], ["TiB", 2 ** 40]];
  const [name, size] = units.filter(([, each]) => high >= each).pop() || units[0];
  const { step, values } = ticks(low / size, high / size, about);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => ({ at: value * size, text: `${value.toFixed(places)} ${name}` }));
}

function timeTicks(low, high, about, unit) {
  if (unit === "step") return ticks(low, high, about, 1).values.map((at) => ({ at, text: String(Math.round(at)) }));
  const [name, size] = high - low >= 2e6 ? ["s", 1e6] : high - low >= 2e3 ? ["ms", 1e3] : ["us", 1];
  const { step, values } = ticks(low / size, high / size, about);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return values.map((value) => ({ at: value * size, text: `${value.toFixed(places)} ${name}` }));
}

// The tip beside the pointer, or beside what the keyboard has chosen: a title, and pairs of a name and a value.
const tip = {
  show(x, y, title, pairs, note = "") {
    const element = byId("tip");
    const table = made("table");
    for (const [name, value] of pairs) table.append(made("tr", {}, made("td", {}, name), made("td", {}, value)));
    element.replaceChildren(made("strong", {}, title), table, note);
    element.hidden = false;
    const { width, height } = element.getBoundingClientRect();
    const left = x + 16 + width > innerWidth - 8 ? x - width - 16 : x + 16;
    const top = y + 16 + height > innerHeight - 8 ? y - height - 12 : y + 16;
    element.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    element.style.top = `${Math.max(8, top)}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};

// What is selected: a row, and by key what of it ("r3" the run of step 3, "s3" its send, "i5" the copy of interval 5).
// Pointing selects for as long as it lasts; a click keeps it until the next one, or Escape.
const selection = {
  hovered: null,
  kept: null,
  listeners: [],
  get current() {
    return this.hovered || this.kept;
  },
  hover(chosen, source) {
    this.hovered = chosen;
    this.tell(source);
  },
  keep(chosen, source) {
    const isSame = chosen && this.kept && this.kept.row === chosen.row && this.kept.key === chosen.key;
    this.kept = isSame ? null : chosen;
    this.tell(source, !isSame);
  },
  clear() {
    this.hovered = this.kept = null;
    this.tell(null);
  },
  tell(source, isKept = false) {
    for (const listener of this.listeners) listener(this.current, source, isKept);
  },
};

function keyOf(each) {
  if (each.interval !== null) return `i${each.interval}`;
  return (each.lane === "D2H" || each.kind === "send" ? "s" : "r") + each.step;
}

function mark(element, each, chosen) {
  const isOn = chosen !== null && each.row === chosen.row && each.row >= 0;
  element.classList.toggle("on", isOn);
  element.classList.toggle("exact", isOn && chosen.key !== null && chosen.key === each.key);
}
