// Which neurons a task keeps, layer by layer, beside those of another task; and how much it shares with each other one.

import { BOTH, NEITHER, ONLY_THAT, ONLY_THIS, compare, tally, unpack } from "./bitmap.js";
import { bar, byId, drawn, element, setOptions, setText } from "./elements.js";
import { count, percent } from "./numbers.js";

const NOBODY = "";
const CELL = 4;
const ROWS_AT_LEAST = 6;

export class Neurons {
  /** `ask(method, path)` asks the server with the page's key. */
  constructor(ask) {
    this._ask = ask;
    this._maps = new Map();
    this._infos = new Map();
    this._shown = null;
    this._width = 0;
    byId("neurons-task").addEventListener("change", () => this._load());
    byId("neurons-other").addEventListener("change", () => this._load());
    new ResizeObserver(() => this._resized()).observe(byId("neurons-layers"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this._draw());
  }

  /** Offer these tasks; what is shown is loaded again once another version of it is active. */
  show(infos) {
    byId("neurons").hidden = infos.length === 0;
    this._infos = new Map(infos.map((info) => [info.task, info]));
    const names = infos.map((info) => [info.task, info.task]);
    setOptions(byId("neurons-task"), names);
    setOptions(byId("neurons-other"), [[NOBODY, "no other task"], ...names]);
    if (infos.length > 0) this._load();
  }

  /** Show this task. */
  choose(task) {
    byId("neurons-task").value = task;
    this._load();
  }

  async _load() {
    const [mine, theirs] = [byId("neurons-task").value, byId("neurons-other").value];
    const other = theirs === mine ? NOBODY : theirs;
    const wanted = JSON.stringify([...this._infos.values()].map((info) => info.digest).concat(mine, other));
    if (wanted === this._wanted) return;
    this._wanted = wanted;
    setText(byId("neurons-error"), "");
    try {
      const [map, beside] = await Promise.all([this._map(mine), other === NOBODY ? null : this._map(other)]);
      if (wanted !== this._wanted) return;
      this._shown = { map, beside };
      this._draw();
      this._showOverlaps(map);
    } catch (error) {
      if (wanted !== this._wanted) return;
      this._wanted = null;
      setText(byId("neurons-error"), error.message);
    }
  }

  async _map(task) {
    // Its overlaps are with what is served now: any change asks again.
    const key = JSON.stringify([task, [...this._infos.values()].map((info) => info.digest)]);
    if (!this._maps.has(key)) {
      if (this._maps.size > 50) this._maps.clear();
      const found = await this._ask("GET", `v1/tasks/${encodeURIComponent(task)}/neurons`);
      const layers = found.layers.map((layer) => ({ ...layer, bits: unpack(layer.neurons, found.ffn_width) }));
      this._maps.set(key, { ...found, layers });
    }
    return this._maps.get(key);
  }

  _resized() {
    const width = byId("neurons-layers").clientWidth;
    if (width === this._width) return;
    this._width = width;
    this._draw();
  }

  _draw() {
    if (this._shown === null) return;
    const { map, beside } = this._shown;
    const states = map.layers.map((layer, number) => compare(layer.bits, beside?.layers[number].bits ?? null));
    this._showLegend(states);
    const strips = map.layers.map((layer, number) => this._strip(layer, number, states[number]));
    byId("neurons-layers").replaceChildren(...strips);
    const colours = this._colours();
    strips.forEach((strip, number) => paint(strip.querySelector("canvas"), states[number], colours));
  }

  _showLegend(states) {
    const { map, beside } = this._shown;
    const found = [0, 0, 0, 0];
    for (const layer of states) tally(layer).forEach((n, state) => { found[state] += n; });
    const all = map.ffn_width * map.layers.length;
    const entries = beside
      ? [["both", BOTH, "both"], ["this", ONLY_THIS, `only ${map.task}`], ["that", ONLY_THAT, `only ${beside.task}`], ["neither", NEITHER, "neither"]]
      : [["this", ONLY_THIS, "kept"], ["neither", NEITHER, "left out"]];
    byId("neurons-legend").replaceChildren(...entries.map(([kind, state, name]) => element(
      "span", {}, element("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), `${name} `,
      element("b", {}, count(found[state])), ` (${percent(found[state] / all)})`)));
  }

  _strip(layer, number, states) {
    const { map, beside } = this._shown;
    const [, mine, theirs, both] = tally(states);
    const told = beside
      ? `both tasks keep ${both}, only ${map.task} ${mine}, only ${beside.task} ${theirs} of ${map.ffn_width} neurons`
      : `${layer.kept} of ${map.ffn_width} neurons kept`;
    const canvas = element("canvas", { role: "img", "aria-label": `Layer ${number + 1}: ${told}` });
    const room = this._width || byId("neurons-layers").clientWidth;
    canvas.width = Math.max(1, Math.min(Math.floor(room / CELL), Math.ceil(map.ffn_width / ROWS_AT_LEAST)));
    canvas.height = Math.ceil(map.ffn_width / canvas.width);
    canvas.style.inlineSize = `${canvas.width * CELL}px`;
    canvas.style.blockSize = `${canvas.height * CELL}px`;
    canvas.addEventListener("pointermove", (event) => this._tell(event, canvas, number, states));
    canvas.addEventListener("pointerleave", () => setText(byId("neurons-readout"), "\u00a0"));
    return element(
      "div", { class: "layer" },
      element("p", {}, element("b", {}, `layer ${number + 1}`), ` ${percent(layer.kept / map.ffn_width)} of the neurons, `,
        `${layer.heads.length} of ${map.heads} heads `, headsOf(layer, map.heads)),
      canvas,
    );
  }

  _tell(event, canvas, layer, states) {
    const { map, beside } = this._shown;
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
    const neuron = column * canvas.height + row;
    if (!(neuron >= 0 && neuron < states.length)) return;
    const names = beside
      ? { [BOTH]: "kept by both", [ONLY_THIS]: `kept by ${map.task} alone`, [ONLY_THAT]: `kept by ${beside.task} alone`, [NEITHER]: "kept by neither" }
      : { [ONLY_THIS]: "kept", [NEITHER]: "left out" };
    setText(byId("neurons-readout"), `Layer ${layer + 1}, neuron ${neuron}: ${names[states[neuron]]}`);
  }

  /** The colours of the four states, as the style sheet has them for this light. */
  _colours() {
    const style = getComputedStyle(document.documentElement);
    const colours = [];
    for (const [state, name] of [[NEITHER, "neither"], [ONLY_THIS, "this"], [ONLY_THAT, "that"], [BOTH, "both"]]) {
      const digits = style.getPropertyValue(`--${name}`).trim().slice(1);
      colours[state] = [0, 2, 4].map((place) => parseInt(digits.slice(place, place + 2), 16));
    }
    return colours;
  }

  _showOverlaps(map) {
    const rows = [...map.overlaps].sort((a, b) => b.jaccard - a.jaccard || (a.task < b.task ? -1 : 1));
    byId("overlaps-title").hidden = byId("overlaps-title").nextElementSibling.hidden = rows.length === 0;
    if (rows.length === 0) {
      byId("overlaps").replaceChildren();
      return;
    }
    const heads = [["task", ""], ["overlap", ""], ["shared neurons", "number"], ["against chance", "number"]];
    byId("overlaps").replaceChildren(element(
      "table", {}, element("caption", { class: "covert" }, `What ${map.task} shares with other tasks`),
      element("thead", {}, element("tr", {}, ...heads.map(([name, kind]) => element("th", { scope: "col", class: kind }, name)))),
      element("tbody", {}, ...rows.map((row) => element(
        "tr", {},
        element("th", { scope: "row" }, element("button", { type: "button", class: "link", title: "Compare with this task", click: () => this._compareWith(row.task) }, row.task)),
        element("td", {}, element("span", { class: "share" }, percent(row.jaccard)), bar(row.jaccard)),
        element("td", { class: "number" }, count(row.shared)),
        element("td", { class: "number" }, row.by_chance > 0 ? `${(row.shared / row.by_chance).toFixed(2)} times` : "\u2013"),
      ))),
    ));
  }

  _compareWith(task) {
    byId("neurons-other").value = task;
    this._load();
    byId("neurons-title").scrollIntoView({ block: "start" });
  }
}

/** One square for each neuron, from top to bottom and then to the right. */
function paint(canvas, states, colours) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  states.forEach((state, neuron) => {
    const place = 4 * ((neuron % canvas.height) * canvas.width + Math.floor(neuron / canvas.height));
    image.data.set([...colours[state], 255], place);
  });
  context.putImageData(image, 0, 0);
}

function headsOf(layer, heads) {
  const kept = new Set(layer.heads);
  const dots = Array.from({ length: heads }, (_, head) =>
    drawn("circle", { cx: 5 + 10 * head, cy: 6, r: 3.5, class: kept.has(head) ? "kept" : "left" }));
  return drawn("svg", { class: "heads", width: 10 * heads, height: 12, "aria-hidden": "true" }, ...dots);
}
