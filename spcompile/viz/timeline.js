// The lanes and device memory on one axis of time: what is drawn, and where. `zoom.js` moves the axis.

const HEIGHTS = { compute: 36, H2D: 28, D2H: 28, track: 24 };
const MEMORY_HEIGHT = 190;

class Timeline {
  constructor(view) {
    this.view = view;
    this.end = Math.max(...view.lanes.map((lanes) => Math.max(0, ...lanes.parts.map((part) => part.end)))) || 1;
    this.domain = [0, this.end];
    this.holder = byId("timeline");
    this.bars = [];
    this.draw();
  }

  get isNarrow() {
    return this.width < 640;
  }

  x(time) {
    const [low, high] = this.domain;
    return this.left + ((time - low) / (high - low)) * this.plotWidth;
  }

  time(x) {
    const [low, high] = this.domain;
    return low + ((x - this.left) / this.plotWidth) * (high - low);
  }

  // Everything anew, for the width that there is.
  draw() {
    this.width = Math.max(280, this.holder.clientWidth);
    this.left = this.isNarrow ? 62 : 92;
    this.plotWidth = this.width - this.left - 10;
    this.svg = drawn("svg", { role: "group", "aria-label": "Lanes and device memory over time" });
    this.defs();
    this.ground = drawn("g", {}, this.svg);
    this.grid = drawn("g", {}, this.svg);
    this.plot = drawn("g", { "clip-path": "url(#plot)" }, this.svg);
    this.front = drawn("g", {}, this.svg);
    this.bars = [];
    this.parts = [];
    let y = 4;
    for (const lanes of this.view.lanes) y = this.drawLanes(lanes, y) + 8;
    this.axisY = y + 6;
    this.memoryY = y + 40;
    this.drawMemory();
    this.overviewY = this.memoryY + MEMORY_HEIGHT + 14;
    this.height = this.overviewY + 16;
    drawn("rect", { class: "overview", x: this.left, y: this.overviewY, width: this.plotWidth, height: 10, rx: 5 }, this.ground);
    this.window = drawn("rect", { class: "window", y: this.overviewY, height: 10, rx: 5 }, this.front);
    this.cross = drawn("line", { class: "cross", y1: 0, y2: this.overviewY - 8, visibility: "hidden" }, this.front);
    this.dragged = drawn("rect", { class: "drag", y: 0, height: this.overviewY - 8, visibility: "hidden" }, this.front);
    this.svg.setAttribute("height", this.height);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.querySelector("#plot rect").setAttribute("height", this.height);
    this.holder.replaceChildren(this.svg);
    this.place();
    this.select(selection.current);
  }

  defs() {
    const defs = drawn("defs", {}, this.svg);
    const clip = drawn("clipPath", { id: "plot" }, defs);
    drawn("rect", { x: this.left, y: 0, width: this.plotWidth, height: 1 }, clip);
    for (const [id, ground, line, gap] of [["waiting", "waiting-ground", "waiting-line", 7], ["arriving", null, "arriving-line", 6]]) {
      const turn = { patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
      const pattern = drawn("pattern", { id, width: gap, height: gap, ...turn }, defs);
      if (ground) drawn("rect", { class: ground, width: gap, height: gap }, pattern);
      drawn("line", { class: line, x1: 0, y1: 0, x2: 0, y2: gap }, pattern);
    }
  }

  // The lanes of one prediction or recording, from y on; returns where they end.
  drawLanes(lanes, y) {
    const isOne = this.view.lanes.length === 1;
    this.parts.push({ lanes, y: y + 12, elements: lanes.parts.map((part) => this.drawPart(part, y + 12)) });
    if (!isOne) drawn("text", { class: "group-name", x: 2, y: y + 12 }, this.ground).textContent = lanes.title;
    y += 18;
    for (const lane of lanes.lanes) {
      const bars = lanes.bars.filter((bar) => bar.lane === lane);
      const tracks = 1 + Math.max(...bars.map((bar) => bar.track));
      const each = lane === "slots" ? HEIGHTS.track : HEIGHTS[lane];
      drawn("rect", { class: "lane", x: this.left, y, width: this.plotWidth, height: each * tracks }, this.ground);
      const name = drawn("text", { class: "lane-name", x: 2, y: y + each / 2 + 4 }, this.ground);
      name.textContent = lane;
      if (lane === "compute") for (const wait of lanes.waits) this.drawWait(lanes, wait, y + 2, each - 4);
      for (const bar of bars) this.drawBar(lanes, bar, y + bar.track * each + 2, each - 4);
      y += each * tracks + 4;
    }
    return y;
  }

  drawPart(part, y) {
    const line = drawn("path", { class: "part", fill: "none" }, this.plot);
    const text = drawn("text", { class: "part-name", "text-anchor": "middle", y: y - 1 }, this.plot);
    return { part, line, text, y };
  }

  drawBar(lanes, bar, y, height) {
    const row = this.view.rows[bar.row];
    const group = drawn("g", { class: "bar", "data-lane": bar.lane, "data-row": bar.row, fill: row.ink }, this.plot);
    const rect = drawn("rect", { y, height, rx: 2, fill: row.colour }, group);
    const item = { ...bar, key: keyOf(bar), lanes, group, rect, y, height, text: null };
    if (bar.arrives > bar.start) item.arriving = drawn("rect", { class: "arriving", y, height }, group);
    group.item = item;
    this.bars.push(item);
  }

  drawWait(lanes, wait, y, height) {
    const group = drawn("g", { class: "wait", "data-row": wait.row, "data-cause": wait.cause }, this.plot);
    const rect = drawn("rect", { y, height }, group);
    const item = { ...wait, interval: null, lane: "wait", key: `r${wait.step}`, lanes, group, rect, y, height, text: null };
    group.item = item;
    this.bars.push(item);
  }

  drawMemory() {
    const { memory } = this.view;
    const highest = Math.max(...memory.times.map((_, index) => memory.shares.reduce((sum, share) => sum + share.nbytes[index], 0)), 0);
    this.most = Math.max(highest, memory.peak_bytes, memory.budget_bytes || 0, memory.measured_peak_bytes || 0, 1) * 1.06;
    const top = this.memoryY;
    drawn("text", { class: "lane-name", x: 2, y: top - 8 }, this.ground).textContent = "device memory";
    drawn("rect", { class: "lane", x: this.left, y: top, width: this.plotWidth, height: MEMORY_HEIGHT }, this.ground);
    for (const { at, text } of byteTicks(0, this.most, 4)) {
      const y = this.memoryHeight(at);
      drawn("line", { class: "grid", x1: this.left, x2: this.left + this.plotWidth, y1: y, y2: y }, this.ground);
      drawn("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, this.ground).textContent = text;
    }
    const frame = { x: this.left, y: top, width: this.plotWidth, height: MEMORY_HEIGHT, preserveAspectRatio: "none" };
    this.stack = drawn("svg", { class: "memory", ...frame }, this.plot);
    const below = memory.times.map(() => 0);
    for (const share of memory.shares) {
      const above = below.map((nbytes, index) => nbytes + share.nbytes[index]);
      const path = this.stairs(memory.times, above, false) + this.stairs(memory.times, below, true) + "Z";
      drawn("path", { d: path, fill: share.colour, "data-share": share.name }, this.stack);
      above.forEach((nbytes, index) => (below[index] = nbytes));
    }
    this.drawLevel(memory.budget_bytes, "budget");
    this.drawLevel(memory.measured_peak_bytes, "measured peak");
  }

  // A staircase in the coordinates of the stack: time, and bytes as a part of the most.
  stairs(times, nbytes, isBack) {
    const height = (index) => (1 - nbytes[index] / this.most).toFixed(6);
    const end = Math.max(...this.view.lanes[0].parts.map((part) => part.end), times[times.length - 1]);
    const at = (index) => (index < times.length ? times[index] : end);
    const corners = times.flatMap((_, index) => [`${at(index)} ${height(index)}`, `${at(index + 1)} ${height(index)}`]);
    return (isBack ? "L" + corners.reverse().join("L") : "M" + corners.join("L"));
  }

  drawLevel(nbytes, name) {
    if (nbytes === null) return;
    const y = this.memoryHeight(nbytes);
    drawn("line", { class: "budget", x1: this.left, x2: this.left + this.plotWidth, y1: y, y2: y, "data-level": name }, this.front);
    const place = name === "budget" ? { x: this.left + this.plotWidth - 4, "text-anchor": "end" } : { x: this.left + 4 };
    const text = drawn("text", { class: "budget-name", y: y - 4, ...place }, this.front);
    text.textContent = `${name} ${formatBytes(nbytes)}`;
  }

  memoryHeight(nbytes) {
    return this.memoryY + MEMORY_HEIGHT * (1 - nbytes / this.most);
  }

  // Everything to where the axis of time has it now.
  place() {
    const [low, high] = this.domain;
    this.stack.setAttribute("viewBox", `${low} 0 ${high - low} 1`);
    for (const item of this.bars) this.placeBar(item, low, high);
    for (const { elements } of this.parts) elements.forEach((each) => this.placePart(each));
    this.grid.replaceChildren();
    for (const { at, text } of timeTicks(low, high, this.plotWidth / 90, this.view.unit)) {
      const x = this.x(at);
      drawn("line", { class: "grid", x1: x, x2: x, y1: this.axisY - 4, y2: this.memoryY + MEMORY_HEIGHT }, this.grid);
      const anchor = x > this.width - 30 ? "end" : "middle";
      drawn("text", { x, y: this.axisY + 9, "text-anchor": anchor }, this.grid).textContent = text;
    }
    this.window.setAttribute("x", this.left + (low / this.end) * this.plotWidth);
    this.window.setAttribute("width", Math.max(4, ((high - low) / this.end) * this.plotWidth));
    this.holder.dataset.low = low;
    this.holder.dataset.high = high;
  }

  placeBar(item, low, high) {
    const isSeen = item.end >= low && item.start <= high;
    item.group.toggleAttribute("hidden", !isSeen);
    item.group.style.display = isSeen ? "" : "none";
    if (!isSeen) return;
    const start = Math.max(this.x(item.start), this.left - 4);
    const end = Math.min(this.x(item.end), this.left + this.plotWidth + 4);
    const width = Math.max(0.75, end - start);
    item.rect.setAttribute("x", start);
    item.rect.setAttribute("width", width);
    item.group.classList.toggle("thin", width < 10);
    if (item.arriving) {
      item.arriving.setAttribute("x", start);
      item.arriving.setAttribute("width", Math.max(0, Math.min(this.x(item.arrives), end) - start));
    }
    this.letter(item, Math.max(start, this.left), Math.min(end, this.left + this.plotWidth));
  }

  // The longest name that fits, if any does.
  letter(item, start, end) {
    const fits = this.names(item).find((name) => name.length * 6.4 + 8 <= end - start);
    if (!fits) {
      if (item.text) item.text.textContent = "";
      return;
    }
    item.text = item.text || drawn("text", { y: item.y + item.height / 2 + 4, "text-anchor": "middle" }, item.group);
    if (item.arriving) item.text.setAttribute("style", `paint-order: stroke; stroke: ${this.view.rows[item.row].colour}; stroke-width: 3px`);
    item.text.setAttribute("x", (start + end) / 2);
    item.text.textContent = fits;
  }

  names(item) {
    if (item.lane === "wait") return [`waits for ${item.page} (${item.cause})`, `waits: ${item.cause}`, item.cause];
    const { short } = this.view.rows[item.row];
    return [item.label, short];
  }

  placePart({ part, line, text, y }) {
    const start = this.x(part.start), end = this.x(part.end);
    line.setAttribute("d", `M${start + 1} ${y + 4}V${y + 1}M${start + 1} ${y + 2}H${end - 1}M${end - 1} ${y + 4}V${y + 1}`);
    const from = Math.max(start, this.left), to = Math.min(end, this.left + this.plotWidth);
    text.setAttribute("x", (from + to) / 2);
    text.textContent = to - from > part.name.length * 6 + 10 ? part.name : "";
  }

  select(chosen) {
    this.svg.classList.toggle("selecting", chosen !== null);
    for (const item of this.bars) mark(item.group, item, chosen);
  }

  // What the tip says of a bar or stall.
  describe(item) {
    const { unit } = this.view;
    const row = this.view.rows[item.row];
    const title = item.lane === "wait" ? `waits for ${item.page}` : item.label;
    const pairs = [];
    if (this.view.lanes.length > 1) pairs.push([item.lanes.title, ""]);
    if (item.lane !== "wait") pairs.push(["lane", item.lane]);
    if (row.name !== title) pairs.push([row.is_layer ? "layer" : "piece", row.name]);
    pairs.push(["from", formatTime(item.start, unit)], ["to", formatTime(item.end, unit)]);
    if (unit === "us") pairs.push(["takes", formatTime(item.end - item.start, unit)]);
    if (item.arrives > item.start) pairs.push(["read from", formatTime(item.arrives, unit)]);
    if (item.nbytes) pairs.push([item.lane === "compute" ? "read in place" : "bytes", formatBytes(item.nbytes)]);
    const cause = item.lane === "wait" ? this.view.causes.find(([name]) => name === item.cause)[1] : "";
    return [title, pairs, cause];
  }

  // What memory holds at a time, the highest share first.
  describeMemory(time) {
    const { memory, unit } = this.view;
    let index = memory.times.findIndex((each) => each > time) - 1;
    if (index < 0) index = memory.times.length - 1;
    const held = memory.shares.map((share) => [share.name, share.nbytes[index]]);
    const total = held.reduce((sum, [, nbytes]) => sum + nbytes, 0);
    const pairs = [...held.reverse().map(([name, nbytes]) => [name, formatBytes(nbytes)]), ["together", formatBytes(total)]];
    return [`device memory at ${formatTime(time, unit)}`, pairs, ""];
  }

  legend() {
    const entries = this.view.memory.shares.map((share) => {
      const swatch = made("span", { class: "swatch", style: `background:${share.colour}` });
      return made("li", { title: share.meaning }, swatch, share.name);
    });
    if (this.bars.some((bar) => bar.arriving)) {
      entries.unshift(made("li", {}, made("span", { class: "swatch arriving" }), "its copy may still be on its way"));
    }
    if (this.view.lanes.some((lanes) => lanes.waits.length)) {
      entries.unshift(made("li", {}, made("span", { class: "swatch waiting" }), "compute waits (stall)"));
    }
    return entries;
  }
}
