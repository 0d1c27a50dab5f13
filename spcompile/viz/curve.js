// The trade-off curve: what other budgets buy. Pointing at a point, or an arrow key, says what it means.

class Curve {
  constructor(view) {
    this.view = view;
    this.points = view.curve;
    byId("trade").hidden = this.points.length === 0;
    if (!this.points.length) return;
    this.chosen = this.points.findIndex((point) => point.is_chosen);
    this.rows();
    this.draw();
  }

  draw() {
    if (!this.points.length) return;
    const holder = byId("curve");
    const width = Math.max(260, holder.clientWidth);
    const [height, left, top, right, bottom] = [290, 66, 20, 16, 44];
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": "Memory against time" });
    const most = (values, level = 0) => Math.max(...values, level, 1) * 1.06;
    const mostBytes = most(this.points.map((point) => point.peak_bytes), this.view.memory.budget_bytes || 0);
    const mostTime = most(this.points.map((point) => point.iteration_us));
    const x = (nbytes) => left + (nbytes / mostBytes) * (width - left - right);
    const y = (time) => top + (1 - time / mostTime) * (height - top - bottom);
    for (const { at, text } of timeTicks(0, mostTime, 5, "us")) {
      drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }, svg);
      drawn("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, svg).textContent = text;
    }
    for (const { at, text } of byteTicks(0, mostBytes, (width - left) / 90)) {
      drawn("line", { class: "grid", x1: x(at), x2: x(at), y1: top, y2: height - bottom }, svg);
      drawn("text", { x: x(at), y: height - bottom + 16, "text-anchor": "middle" }, svg).textContent = text;
    }
    drawn("text", { class: "axis-name", x: left - 60, y: 12 }, svg).textContent = "time of an iteration";
    drawn("text", { class: "axis-name", x: width - right, y: height - 6, "text-anchor": "end" }, svg).textContent = "device memory, most at any moment";
    // A budget between two points buys the one below it: a staircase.
    const curve = this.points.filter((point) => !this.isAbove(point));
    const steps = curve.map((point, index) => `${index ? "H" + x(point.peak_bytes) + "V" : "M" + x(point.peak_bytes) + " "}${y(point.iteration_us)}`);
    drawn("path", { class: "curve-line", d: `${steps.join("")}H${width - right}` }, svg);
    if (this.view.memory.budget_bytes) {
      const at = x(this.view.memory.budget_bytes);
      drawn("line", { class: "budget", x1: at, x2: at, y1: top, y2: height - bottom }, svg);
      const anchor = at > width - 80 ? "end" : "start";
      drawn("text", { class: "budget-name", x: at + (anchor === "end" ? -5 : 5), y: top + 10, "text-anchor": anchor }, svg).textContent = "budget";
    }
    this.circles = this.points.map((point, index) => this.drawPoint(svg, point, index, x(point.peak_bytes), y(point.iteration_us)));
    if (this.chosen >= 0) svg.append(this.circles[this.chosen]);
    holder.replaceChildren(svg);
    this.choose(this.chosen >= 0 ? this.chosen : 0);
  }

  // Whether there is a point that is no larger and no slower.
  isAbove(point) {
    return this.points.some(
      (other) => other !== point && other.peak_bytes <= point.peak_bytes && other.iteration_us <= point.iteration_us,
    );
  }

  drawPoint(svg, point, index, x, y) {
    const size = 8;
    const circle = point.is_chosen
      ? drawn("path", { class: "point chosen", d: `M${x} ${y - size}L${x + size} ${y}L${x} ${y + size}L${x - size} ${y}Z` }, svg)
      : drawn("circle", { class: "point", cx: x, cy: y, r: 5 }, svg);
    circle.setAttribute("tabindex", point.is_chosen ? 0 : -1);
    circle.setAttribute("role", "img");
    circle.setAttribute("aria-label", point.meaning);
    circle.addEventListener("pointerenter", () => {
      this.choose(index);
      scrollTo(this.lines[index]);
    });
    circle.addEventListener("pointerleave", () => this.choose(this.chosen));
    circle.addEventListener("focus", () => {
      this.choose(index);
      scrollTo(this.lines[index]);
    });
    circle.addEventListener("keydown", (event) => {
      const next = index + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] || 0);
      if (next === index || !this.circles[next]) return;
      event.preventDefault();
      this.circles[next].focus();
    });
    return circle;
  }

  choose(index) {
    const point = this.points[Math.max(0, index)];
    for (const each of [this.circles, this.lines]) each.forEach((element, at) => element.classList.toggle("on", at === index));
    byId("point").replaceChildren(made("strong", {}, point.is_chosen ? "This plan: " : "Another plan: "), point.meaning, this.compared(point));
  }

  // How a point differs from the plan that is shown.
  compared(point) {
    const chosen = this.points[this.chosen];
    if (!chosen || point.is_chosen) return "";
    const nbytes = point.peak_bytes - chosen.peak_bytes;
    const time = chosen.iteration_us ? point.iteration_us / chosen.iteration_us - 1 : 0;
    const more = `${nbytes < 0 ? "−" : "+"}${formatBytes(Math.abs(nbytes))}`;
    return ` Against this plan: ${more}, ${time < 0 ? "−" : "+"}${Math.abs(time * 100).toFixed(1)} % time.`;
  }

  rows() {
    const head = made("tr", {}, ...["memory", "iteration", ""].map((title) => made("th", { scope: "col" }, title)));
    this.lines = this.points.map((point, index) => {
      const cells = [formatBytes(point.peak_bytes), formatTime(point.iteration_us, "us"), point.is_chosen ? "this plan" : ""];
      const row = made("tr", { class: point.is_chosen ? "chosen" : "" }, ...cells.map((cell) => made("td", {}, cell)));
      row.addEventListener("pointerenter", () => this.choose(index));
      row.addEventListener("pointerleave", () => this.choose(this.chosen));
      return row;
    });
    byId("points").replaceChildren(made("thead", {}, head), made("tbody", {}, ...this.lines));
  }
}
