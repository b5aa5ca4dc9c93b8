// Lines over the last minutes, drawn as SVG. Knows times, numbers and names; nothing of tasks.

import { drawn, element, setText } from "./elements.js";
import { clock } from "./numbers.js";

const HEIGHT = 150;
const LEFT = 52, RIGHT = 10, TOP = 10, BOTTOM = 22;

/**
 * A chart that is drawn again with each `show`.
 *
 * `series` are the lines' names; each is told apart by its colour and by how it is dashed. `format` makes a text of a
 * value. Under the pointer, and with the arrow keys, the legend tells the values of one moment.
 */
export class Chart {
  constructor(title, note, series, format) {
    this._format = format;
    this._series = series;
    this._points = [];
    this._marked = null;
    this._values = series.map(() => element("b", {}));
    this._moment = element("span", { class: "moment" });
    this._place = element("div", {
      class: "plot", tabindex: "0", role: "img",
      pointermove: (event) => this._pointAt(event),
      pointerleave: () => this._mark(null),
      blur: () => this._mark(null),
      keydown: (event) => this._step(event),
    });
    this._title = title;
    this.element = element(
      "figure", { class: "chart" },
      element("figcaption", {}, element("strong", {}, title), " ", this._moment, element("p", { class: "note" }, note)),
      element(
        "p", { class: "legend" },
        ...series.map((name, number) => element(
          "span", {}, drawn("svg", { width: 20, height: 10, "aria-hidden": "true" },
            drawn("line", { x1: 1, y1: 5, x2: 19, y2: 5, class: `line s${number}` })),
          `${name} `, this._values[number])),
      ),
      this._place,
    );
    new ResizeObserver(() => this._draw()).observe(this._place);
  }

  /** Draw points `[at, [value of each series or NaN] or null for a gap]` between two points in time. */
  show(points, from, to) {
    this._points = points;
    this._from = from;
    this._to = Math.max(to, from + 1);
    this._draw();
  }

  get _across() {
    const width = this._place.clientWidth;
    return (at) => LEFT + ((at - this._from) / (this._to - this._from)) * (width - LEFT - RIGHT);
  }

  _draw() {
    const width = this._place.clientWidth;
    if (!width || this._from === undefined) return;
    const values = this._points.flatMap(([, found]) => found ?? []).filter(Number.isFinite);
    const ticks = ticksUpTo(Math.max(0, ...values));
    const up = (value) => HEIGHT - BOTTOM - (value / ticks.at(-1)) * (HEIGHT - TOP - BOTTOM);
    this._up = up;
    const across = this._across;
    const grid = ticks.flatMap((tick) => [
      drawn("line", { x1: LEFT, x2: width - RIGHT, y1: up(tick), y2: up(tick), class: "grid" }),
      drawn("text", { x: LEFT - 8, y: up(tick) + 4, "text-anchor": "end" }, shortened(this._format(tick))),
    ]);
    const minutes = moments(this._from, this._to, width).flatMap(([at, text, anchor]) => [
      drawn("text", { x: across(at), y: HEIGHT - 5, "text-anchor": anchor }, text),
    ]);
    const lines = this._series.map((_, number) =>
      drawn("path", { d: pathOf(this._points, number, across, up), class: `line s${number}` }));
    this._cursor = drawn("g", { class: "cursor" });
    this._place.replaceChildren(
      drawn("svg", { width, height: HEIGHT, "aria-hidden": "true" }, ...grid, ...minutes, ...lines, this._cursor));
    this._tell();
  }

  _pointAt(event) {
    const x = event.clientX - this._place.getBoundingClientRect().left;
    const across = this._across;
    let best = null;
    for (const [at] of this._points) {
      if (best === null || Math.abs(across(at) - x) < Math.abs(across(best) - x)) best = at;
    }
    this._mark(best);
  }

  _step(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in steps) || this._points.length === 0) return;
    event.preventDefault();
    const here = this._points.findIndex(([at]) => at === this._marked);
    const next = here < 0 ? this._points.length - 1 : here + steps[event.key];
    this._mark(this._points[Math.min(this._points.length - 1, Math.max(0, next))][0]);
  }

  _mark(at) {
    this._marked = at;
    this._tell();
  }

  _tell() {
    const marked = this._points.find(([at]) => at === this._marked);
    const [at, values] = marked ?? this._points.at(-1) ?? [NaN, null];
    this._values.forEach((place, number) => setText(place, this._format(values ? values[number] : NaN)));
    setText(this._moment, marked ? `at ${clock(at)}` : "now");
    const told = this._series.map((name, number) => `${name} ${this._format(values ? values[number] : NaN)}`);
    this._place.setAttribute("aria-label", `${this._title}, ${marked ? clock(at) : "now"}: ${told.join(", ")}`);
    if (!this._cursor) return;
    this._cursor.replaceChildren();
    if (!marked) return;
    const x = this._across(at);
    this._cursor.append(
      drawn("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      ...(values ?? []).flatMap((value, number) =>
        Number.isFinite(value) ? [drawn("circle", { cx: x, cy: this._up(value), r: 4, class: `dot s${number}` })] : []),
    );
  }
}

/** A line without axes, for a row of a table. */
export function sparkline(points, from, to) {
  const width = 92, height = 22;
  const highest = Math.max(...points.map(([, values]) => values?.[0] ?? 0), 1e-9);
  const across = (at) => 1 + ((at - from) / Math.max(1, to - from)) * (width - 2);
  const up = (value) => height - 2 - (value / highest) * (height - 4);
  return drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "spark", "aria-hidden": "true" },
    drawn("path", { d: pathOf(points, 0, across, up), class: "line s0" }));
}

function pathOf(points, number, across, up) {
  let path = "";
  let isDown = false;
  for (const [at, values] of points) {
    const value = values ? values[number] : NaN;
    if (Number.isFinite(value)) {
      path += `${isDown ? "L" : "M"}${across(at).toFixed(1)} ${up(value).toFixed(1)}`;
      // A single point is seen, too.
      if (!isDown) path += "h0.01";
    }
    isDown = Number.isFinite(value);
  }
  return path;
}

/** Three to five round numbers from 0 to at least the value. */
export function ticksUpTo(highest) {
  if (!(highest > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(highest / 3));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => highest / size <= 4);
  const ticks = [];
  for (let n = 0; n <= Math.ceil(highest / step - 1e-9); n += 1) ticks.push(n * step);
  return ticks;
}

/** Without the places that say nothing: ticks are round. */
function shortened(text) {
  return text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");
}

function moments(from, to, width) {
  const span = to - from;
  const step = [15, 30, 60, 120, 300].find((size) => span / size <= width / 110) ?? 600;
  const found = [[to, "now", "end"]];
  for (let ago = step; ago <= span - step / 4; ago += step) {
    found.push([to - ago, ago % 60 ? `${ago}\u202fs ago` : `${ago / 60}\u202fmin ago`, "middle"]);
  }
  return found;
}
