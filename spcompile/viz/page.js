// Puts the page together from its data (#plan-data), anew for each graph that is chosen.

const data = JSON.parse(byId("plan-data").textContent);
let parts = [];
let zoom = null;

function show(index) {
  const view = data.graphs[index];
  if (zoom) zoom.end();
  selection.listeners = [];
  selection.clear();
  byId("title").textContent = view.title;
  byId("summary").textContent = view.summary;
  byId("notes").replaceChildren(...view.notes.map((note) => made("li", {}, note)));
  byId("figures").replaceChildren(
    ...view.figures.map((figure) =>
      made("div", { "data-figure": figure.name }, made("dt", {}, figure.name), made("dd", {}, figure.text), made("dd", { class: "note" }, figure.note)),
    ),
  );
  byId("causes").replaceChildren(...view.causes.map(([cause, meaning]) => made("li", {}, made("b", {}, cause), ` – ${meaning}`)));
  byId("words").replaceChildren(...view.words.map(([word, meaning]) => made("div", {}, made("dt", {}, word), made("dd", {}, meaning))));
  balance();
  const timeline = new Timeline(view);
  zoom = new Zoom(timeline);
  byId("legend").replaceChildren(...timeline.legend());
  const layers = new Layers(view);
  for (const id of ["table", "code"]) byId(id).classList.toggle("whole", view.rows.some((row) => row.measured));
  const graph = new Graph(view);
  parts = [timeline, new Curve(view)];
  for (const each of [timeline, layers, graph]) {
    selection.listeners.push((chosen, source, isKept) => each.select(chosen, source, isKept));
  }
  selection.listeners.push((chosen, source, isKept) => {
    if (!isKept || source === "timeline" || !chosen) return;
    const bars = timeline.bars.filter((bar) => (chosen.key ? bar.key === chosen.key : bar.row === chosen.row));
    if (bars.length) zoom.reveal(Math.min(...bars.map((bar) => bar.start)), Math.max(...bars.map((bar) => bar.end)));
  });
}

// As many figures in each row of them, as far as that goes.
function balance() {
  const figures = byId("figures");
  const most = Math.max(2, Math.floor((figures.clientWidth + 10) / 148));
  const rows = Math.ceil(figures.children.length / most);
  figures.style.setProperty("--columns", Math.max(2, Math.ceil(figures.children.length / rows), Math.min(most, 6)));
}

const choice = byId("graph-select");
choice.append(...data.graphs.map((view, index) => made("option", { value: index }, `${index + 1} of ${data.graphs.length}: ${view.title}`)));
byId("graph-choice").hidden = data.graphs.length === 1;
choice.addEventListener("change", () => show(Number(choice.value)));

byId("zoom-in").addEventListener("click", () => zoom.by(0.5));
byId("zoom-out").addEventListener("click", () => zoom.by(2));
byId("zoom-left").addEventListener("click", () => zoom.shift(-0.4));
byId("zoom-right").addEventListener("click", () => zoom.shift(0.4));
byId("zoom-reset").addEventListener("click", () => zoom.reset());
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  tip.hide();
  selection.clear();
});

addEventListener("scroll", () => tip.hide(), { passive: true });

let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's address bar changes only the height
  width = innerWidth;
  balance();
  parts.forEach((part) => part.draw());
});

show(0);
document.documentElement.dataset.ready = "true";
