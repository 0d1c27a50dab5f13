// The table of layers, and the lines of the rewritten graph; both point at the timeline and are pointed at.

class Layers {
  constructor(view) {
    this.view = view;
    this.columns = this.chosenColumns();
    this.sorted = { column: null, isDown: false };
    this.rows = view.rows.map((row, index) => this.makeRow(row, index));
    this.body = made("tbody", {}, ...this.rows);
    this.heads = this.columns.map((column, index) => this.makeHead(column, index));
    const table = made("table", { class: "layers" }, made("thead", {}, made("tr", {}, ...this.heads)), this.body, this.makeFoot());
    byId("layers").replaceChildren(table);
    rove(this.body, () => [...this.body.children], (row) => selection.hover({ row: row.row, key: null }, "layers"));
  }

  // Those with something to say. Each has a title, what it is sorted by, what it shows, a hint, and its sum for
  // the last line.
  chosenColumns() {
    const { rows, unit } = this.view;
    const sum = (value) => rows.reduce((total, row) => total + value(row), 0);
    const time = (us) => (us ? formatTime(us, unit) : "–");
    const size = (nbytes) => (nbytes ? formatBytes(nbytes) : "–");
    const columns = [
      { title: "layer", value: (row, index) => index, show: (row) => row.name, isText: true, foot: "all rows" },
      { title: "weights", value: (row) => row.nbytes, show: (row) => size(row.nbytes), foot: size(sum((row) => row.nbytes)) },
      { title: "placement", value: (row) => row.placement, show: (row) => row.placement, isText: true, foot: "" },
    ];
    const add = (title, value, format, isShown = true) => {
      if (isShown) columns.push({ title, value, show: (row) => format(value(row)), foot: format(sum(value)) });
    };
    const kinds = ["predicted", "measured"].filter((kind) => rows.some((row) => row[kind]));
    for (const [title, name, isAlways] of [["compute", "compute", true], ["copy", "copy"], ["stall", "stall", true], ["send", "send"]]) {
      for (const kind of kinds) {
        const suffix = kinds.length > 1 ? `\n${kind}` : "";
        const part = (row) => (row[kind] ? row[kind][name] : 0);
        add(title + suffix, part, time, isAlways || rows.some(part));
        if (name === "stall") columns.push(...this.causes(kind, suffix));
      }
    }
    add("gradients", (row) => row.gradients_bytes, size, rows.some((row) => row.gradients_bytes));
    return columns;
  }

  // What a row waits for, where any does: the causes, and as a hint each with its page.
  causes(kind, suffix) {
    const waits = (row) => (row[kind] ? row[kind].waits : []);
    const show = (row) => [...new Set(waits(row).map(([cause]) => cause))].join(", ");
    const hint = (row) => waits(row).map(([cause, page]) => `${cause}: waits for ${page}`).join("\n");
    const column = { title: `cause${suffix}`, value: show, show, hint, isText: true, foot: "" };
    return this.view.rows.some(show) ? [column] : [];
  }

  makeHead(column, index) {
    const button = made("button", { type: "button", title: `sort by ${column.title.replace("\n", ", ")}` }, column.title);
    button.addEventListener("click", () => this.sort(index));
    return made("th", { scope: "col", class: column.isText ? "text" : "" }, button);
  }

  makeRow(row, index) {
    const cells = this.columns.map((column) => {
      const hint = column.hint ? { title: column.hint(row) } : {};
      return made("td", { class: column.isText ? "text" : "", ...hint }, column.show(row));
    });
    cells[0].prepend(made("span", { class: "swatch", style: `background:${row.colour}` }));
    const element = made("tr", { "data-row": index, tabindex: index ? -1 : 0 }, ...cells);
    element.row = index;
    element.key = null;
    return element;
  }

  makeFoot() {
    const cells = this.columns.map((column) => made("td", { class: column.isText ? "text" : "" }, column.foot));
    return made("tfoot", {}, made("tr", {}, ...cells));
  }

  sort(index) {
    const { sorted, columns, view } = this;
    sorted.isDown = sorted.column === index ? !sorted.isDown : !columns[index].isText;
    sorted.column = index;
    const value = (element) => columns[index].value(view.rows[element.row], element.row);
    const compare = (one, other) => (one < other ? -1 : one > other ? 1 : 0);
    const way = sorted.isDown ? -1 : 1;
    this.rows.sort((one, other) => way * compare(value(one), value(other)) || one.row - other.row);
    this.body.append(...this.rows);
    this.heads.forEach((head, each) => {
      if (each === index) head.setAttribute("aria-sort", sorted.isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  select(chosen, source) {
    for (const row of this.rows) mark(row, row, chosen);
    if (source !== "layers" && chosen) scrollTo(this.rows.find((row) => row.row === chosen.row));
  }
}

class Graph {
  constructor(view) {
    this.lines = view.lines.map((line) => this.makeLine(line));
    const columns = Math.min(50, Math.max(...view.lines.map((line) => line.code.length), 0));
    const list = made("ol", { class: "graph", style: `--code: ${columns}ch` }, ...this.lines);
    byId("graph").replaceChildren(list);
    const chosen = this.lines.filter((line) => line.row >= 0);
    if (chosen.length) chosen[0].tabIndex = 0;
    rove(list, () => chosen, (line) => selection.hover({ row: line.row, key: line.key }, "graph"));
  }

  makeLine(line) {
    const code = made("span", { class: "code" }, line.code);
    const element = made("li", { class: `line ${line.kind === "graph" ? "graph-name" : line.kind}` }, code);
    if (line.meaning) element.append(made("span", { class: "means" }, line.meaning));
    element.row = line.row;
    element.key = line.row < 0 ? null : keyOf(line);
    if (line.row >= 0) element.tabIndex = -1;
    return element;
  }

  select(chosen, source) {
    for (const line of this.lines) mark(line, line, chosen);
    if (source === "graph" || !chosen) return;
    const exact = this.lines.find((line) => line.classList.contains("exact"));
    scrollTo(exact || this.lines.find((line) => line.classList.contains("on")));
  }
}

// One stop of the tab key for a list; arrows move in it, Enter keeps what is chosen. The pointer chooses as well.
function rove(list, items, choose) {
  const itemOf = (event) => {
    const item = event.target.closest("[tabindex]");
    return item && items().includes(item) ? item : null;
  };
  const source = list.tagName === "TBODY" ? "layers" : "graph";
  list.addEventListener("pointerover", (event) => {
    const item = itemOf(event);
    if (item) choose(item);
  });
  list.addEventListener("pointerleave", () => selection.hover(null, source));
  list.addEventListener("focusin", (event) => {
    const item = itemOf(event);
    if (item && item.matches(":focus-visible")) choose(item);
  });
  list.addEventListener("focusout", () => selection.hover(null, source));
  list.addEventListener("click", (event) => {
    const item = itemOf(event);
    if (item) selection.keep({ row: item.row, key: item.key }, source);
  });
  list.addEventListener("keydown", (event) => {
    const all = items();
    const index = all.indexOf(document.activeElement);
    const next = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: all.length - 1 }[event.key];
    if (index >= 0 && event.key === "Enter") selection.keep({ row: all[index].row, key: all[index].key }, source);
    if (index < 0 || next === undefined || !all[next]) return;
    event.preventDefault();
    all[index].tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].focus();
  });
}

// Scroll the box that holds an element, and nothing else, until the element is seen.
function scrollTo(element) {
  if (!element) return;
  const box = element.closest(".scroll");
  const [inner, outer] = [element.getBoundingClientRect(), box.getBoundingClientRect()];
  const margin = 34; // head and last line of the table stay in front
  if (inner.top >= outer.top + margin && inner.bottom <= outer.bottom - margin) return;
  box.scrollTop += (inner.top + inner.bottom - outer.top - outer.bottom) / 2;
}
