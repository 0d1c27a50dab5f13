// Moves the timeline's axis of time: by dragging, wheel, touch, buttons and keys; and points at what is drawn.

class Zoom {
  constructor(timeline) {
    this.timeline = timeline;
    this.pointers = new Map();
    this.focused = -1; // index into timeline.bars of what the keyboard has chosen
    const { holder } = timeline;
    this.listeners = new AbortController();
    const on = (name, listener, options = {}) =>
      holder.addEventListener(name, listener, { signal: this.listeners.signal, ...options });
    on("pointerdown", (event) => this.down(event));
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.up(event));
    on("pointercancel", () => this.drop());
    on("pointerleave", (event) => event.pointerType === "touch" || this.leave()); // a lifted finger leaves the tip
    on("dblclick", () => this.reset());
    on("wheel", (event) => this.wheel(event), { passive: false });
    on("keydown", (event) => this.key(event));
    on("blur", () => this.leave());
  }

  end() {
    this.listeners.abort();
  }

  // Show from low to high, as far as there is anything, and no less than a thousandth of what there is.
  to(low, high) {
    const { end } = this.timeline;
    const length = Math.min(end, Math.max(high - low, end / 5000));
    const middle = (low + high) / 2;
    const start = Math.min(Math.max(0, middle - length / 2), end - length);
    this.timeline.domain = [start, start + length];
    this.timeline.place();
  }

  by(factor, at = null) {
    const [low, high] = this.timeline.domain;
    const fixed = at === null ? (low + high) / 2 : at;
    this.to(fixed - (fixed - low) * factor, fixed + (high - fixed) * factor);
  }

  shift(part) {
    const [low, high] = this.timeline.domain;
    const by = (high - low) * part;
    this.to(low + by, high + by);
  }

  reset() {
    this.to(0, this.timeline.end);
  }

  // Move the axis, if need be, so that this stretch of time is seen.
  reveal(start, end) {
    const [low, high] = this.timeline.domain;
    if (end <= high && start >= low) return;
    const length = Math.max(high - low, (end - start) * 1.2);
    const middle = (start + end) / 2;
    this.to(middle - length / 2, middle + length / 2);
  }

  place(event) {
    const box = this.timeline.holder.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  down(event) {
    if (event.button) return;
    const [x, y] = this.place(event);
    this.pointers.set(event.pointerId, x);
    const isOverview = y >= this.timeline.overviewY - 4;
    const target = event.target.closest(".bar, .wait");
    this.drag = { from: x, last: x, isMoving: false, isOverview, isTouch: event.pointerType === "touch", target };
    if (isOverview) this.overview(x);
  }

  move(event) {
    const [x, y] = this.place(event);
    const { timeline } = this;
    if (!this.drag) return this.point(event, x, y);
    if (this.pointers.has(event.pointerId)) {
      if (this.pointers.size === 2) return this.pinch(event, x);
      this.pointers.set(event.pointerId, x);
    }
    if (Math.abs(x - this.drag.from) > 4 && !this.drag.isMoving) {
      this.drag.isMoving = true;
      timeline.holder.setPointerCapture(event.pointerId);
      this.leave();
    }
    if (!this.drag.isMoving) return undefined;
    if (this.drag.isOverview) return this.overview(x);
    if (this.drag.isTouch) {
      this.shift((this.drag.last - x) / timeline.plotWidth);
      this.drag.last = x;
      return undefined;
    }
    const [left, right] = [Math.min(x, this.drag.from), Math.max(x, this.drag.from)];
    timeline.dragged.setAttribute("visibility", "visible");
    timeline.dragged.setAttribute("x", Math.max(left, timeline.left));
    timeline.dragged.setAttribute("width", Math.max(0, right - Math.max(left, timeline.left)));
    return undefined;
  }

  up(event) {
    const { drag, timeline } = this;
    const [x] = this.place(event);
    this.drop();
    if (!drag || drag.isOverview) return;
    if (!drag.isMoving) {
      if (drag.target) selection.keep({ row: drag.target.item.row, key: drag.target.item.key }, "timeline");
      else if (selection.kept) selection.clear();
      if (drag.isTouch) this.point(event, ...this.place(event));
      return;
    }
    if (!drag.isTouch) this.to(timeline.time(Math.min(x, drag.from)), timeline.time(Math.max(x, drag.from)));
  }

  drop() {
    this.pointers.clear();
    this.drag = null;
    this.timeline.dragged.setAttribute("visibility", "hidden");
  }

  pinch(event, x) {
    const before = [...this.pointers.values()];
    this.pointers.set(event.pointerId, x);
    const after = [...this.pointers.values()];
    const apart = (pair) => Math.max(20, Math.abs(pair[0] - pair[1]));
    this.by(apart(before) / apart(after), this.timeline.time((after[0] + after[1]) / 2));
    this.drag.isMoving = true;
  }

  overview(x) {
    const { domain, left, plotWidth, end } = this.timeline;
    const at = ((x - left) / plotWidth) * end;
    const half = (domain[1] - domain[0]) / 2;
    this.to(at - half, at + half);
  }

  wheel(event) {
    const [x] = this.place(event);
    if (event.ctrlKey || event.metaKey || event.shiftKey) {
      event.preventDefault();
      const turn = event.deltaY || event.deltaX;
      this.by(1.0015 ** turn, this.timeline.time(x));
    } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.shift(event.deltaX / this.timeline.plotWidth);
    }
  }

  point(event, x, y) {
    const { timeline } = this;
    if (x < timeline.left || x > timeline.left + timeline.plotWidth || y > timeline.overviewY - 8) return this.leave();
    timeline.cross.setAttribute("visibility", "visible");
    timeline.cross.setAttribute("x1", x);
    timeline.cross.setAttribute("x2", x);
    const target = event.target.closest ? event.target.closest(".bar, .wait") : null;
    if (target) {
      const { item } = target;
      if (this.pointed !== item) selection.hover({ row: item.row, key: item.key }, "timeline");
      this.pointed = item;
      tip.show(event.clientX, event.clientY, ...timeline.describe(item));
    } else {
      if (this.pointed) selection.hover(null, "timeline");
      this.pointed = null;
      if (y >= timeline.memoryY) tip.show(event.clientX, event.clientY, ...timeline.describeMemory(timeline.time(x)));
      else tip.hide();
    }
    return undefined;
  }

  leave() {
    this.timeline.cross.setAttribute("visibility", "hidden");
    if (this.pointed) selection.hover(null, "timeline");
    this.pointed = null;
    tip.hide();
  }

  key(event) {
    const actions = {
      "+": () => this.by(0.6),
      "=": () => this.by(0.6),
      "-": () => this.by(1 / 0.6),
      "0": () => this.reset(),
      Home: () => this.reset(),
      PageUp: () => this.shift(-0.5),
      PageDown: () => this.shift(0.5),
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      ArrowUp: () => this.change(-1),
      ArrowDown: () => this.change(1),
      Enter: () => this.keep(),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // The next bar of the same lane.
  step(by) {
    const { bars } = this.timeline;
    const now = bars[this.focused];
    const lane = now ? bars.filter((each) => each.lanes === now.lanes && each.lane === now.lane) : bars;
    const index = now ? lane.indexOf(now) + by : 0;
    this.focus(lane[Math.min(Math.max(index, 0), lane.length - 1)]);
  }

  // The lane above or below: its bar that is nearest in time.
  change(by) {
    const { bars } = this.timeline;
    const now = bars[this.focused];
    if (!now) return this.step(0);
    const heights = [...new Set(bars.map((each) => each.y))].sort((one, other) => one - other);
    const y = heights[heights.indexOf(now.y) + by];
    const near = bars.filter((each) => each.y === y);
    near.sort((one, other) => Math.abs(one.start - now.start) - Math.abs(other.start - now.start));
    return near.length ? this.focus(near[0]) : undefined;
  }

  focus(item) {
    if (!item) return;
    const { timeline } = this;
    this.focused = timeline.bars.indexOf(item);
    this.reveal(item.start, item.end);
    this.pointed = item;
    selection.hover({ row: item.row, key: item.key }, "timeline");
    const box = timeline.holder.getBoundingClientRect();
    const x = Math.max(timeline.x(item.start), timeline.left);
    tip.show(box.left + x, box.top + item.y + item.height, ...timeline.describe(item));
  }

  keep() {
    const item = this.timeline.bars[this.focused];
    if (item) selection.keep({ row: item.row, key: item.key }, "timeline");
  }
}
