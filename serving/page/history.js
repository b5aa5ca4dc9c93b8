// What the server counted since this page was opened: samples of `GET /v1/stats`, kept for ten minutes.
//
// The server's counters start anew with each of its processes. Here they are summed up from the differences of
// consecutive samples, so that a replica that ends takes nothing away; an interval in which a counter fell is left out.

import { difference, quantile } from "./quantiles.js";

export const SPAN_S = 600;

/** In place of a task's name: all of them. */
export const ALL = null;

/** Every figure called "now" is about so many seconds before the newest sample. */
export const WINDOW_S = 20;

/** Samples further apart than this have a gap between them in charts: the page was hidden, or nobody answered. */
const GAP_S = 15;

const PARTS = ["latency", "tokenize", "queue", "forward"];

export class History {
  constructor() {
    this.clear();
  }

  /** Forget everything. */
  clear() {
    this._latest = null;
    this._opened = NaN;
    this._samples = [];
    // The newest counters seen of each task, also of one that is not there for a while.
    this._seen = new Map();
  }

  /** The newest answer of the server, or null. */
  get latest() {
    return this._latest;
  }

  /** When the oldest of the samples was taken, and the newest, in seconds since 1970. */
  get began() {
    return this._samples[0]?.at ?? NaN;
  }

  get ended() {
    return this._samples.at(-1)?.at ?? NaN;
  }

  /** Take in one answer of `GET /v1/stats`. */
  add(stats) {
    if (this._latest !== null && String(stats.bounds_s) !== String(this._latest.bounds_s)) this.clear();
    // A load balancer brings the answers of several machines. One of them is watched, as long as it answers.
    if (this._latest !== null && stats.node !== this._latest.node) {
      if (stats.at - this._latest.at < GAP_S) return;
      this.clear();
    }
    // Another replica may tell what it found a second ago. A clock that was set back is another thing: then times before
    // and after cannot be compared.
    if (this._latest !== null && stats.at < this._latest.at - GAP_S) this.clear();
    if (this._latest !== null && stats.at <= this._latest.at) return;
    const isFirst = this._latest === null;
    if (isFirst) this._opened = stats.at;
    const tasks = new Map(this._samples.at(-1)?.tasks);
    tasks.delete(ALL);
    for (const [name, counters] of Object.entries(stats.tasks)) {
      // A task that comes later began to count while we were looking.
      tasks.set(name, isFirst ? nothing(counters) : grown(tasks.get(name), counters, this._seen.get(name)));
      this._seen.set(name, counters);
    }
    tasks.set(ALL, together([...tasks.values()], stats.bounds_s.length + 1));
    this._samples.push({ at: stats.at, tasks });
    this._latest = stats;
    while (this._samples[0].at < stats.at - SPAN_S) this._samples.shift();
  }

  /** What was counted of a task in the last seconds; null without two samples. */
  recent(task) {
    const end = this._samples.length - 1;
    return this._between(task, this._start(end), end);
  }

  /** What was counted of a task since this page was opened; null without two samples. */
  total(task) {
    const last = this._samples.at(-1);
    if (!last?.tasks.has(task) || last.at === this._opened) return null;
    return counted(last.tasks.get(task), null, last.at - this._opened, this._latest.bounds_s);
  }

  /** For each sample `[at, what was counted in the seconds before it, or null for a gap]`. */
  series(task) {
    return this._points((start, end) => this._between(task, start, end));
  }

  /** For each sample `[at, requests a second before it, or null for a gap]`. */
  rates(task) {
    return this._points((start, end) => {
      const [first, last] = [this._samples[start], this._samples[end]];
      return ((last.tasks.get(task)?.requests ?? 0) - (first.tasks.get(task)?.requests ?? 0)) / (last.at - first.at);
    });
  }

  _points(value) {
    return this._samples.slice(1).map((sample, index) => {
      const isGap = sample.at - this._samples[index].at > GAP_S;
      return [sample.at, isGap ? null : value(this._start(index + 1), index + 1)];
    });
  }

  /** Where the window begins that ends with a sample. */
  _start(end) {
    const earliest = (this._samples[end]?.at ?? 0) - WINDOW_S - 0.5;
    let start = end - 1;
    while (start > 0 && this._samples[start - 1].at >= earliest) start -= 1;
    return start;
  }

  _between(task, start, end) {
    if (start < 0 || !this._samples[end].tasks.has(task)) return null;
    const [first, last] = [this._samples[start], this._samples[end]];
    return counted(last.tasks.get(task), first.tasks.get(task) ?? null, last.at - first.at, this._latest.bounds_s);
  }
}

// Sums since this page was opened: requests by code, all requests, and of each part counts by bucket and seconds.

function nothing(counters) {
  return { codes: new Map(), requests: 0, parts: PARTS.map((part) => [counters[part].counts.map(() => 0), 0]) };
}

/** A task's sums, one sample later; the same object where nothing was counted. */
function grown(sums, now, old) {
  const base = sums ?? nothing(now);
  const codes = codesGrown(base.codes, now.requests, old?.requests ?? {});
  const steps = PARTS.map((part) => step(now[part], old?.[part]));
  if (codes === base.codes && steps.every((one) => one === null)) return base;
  const parts = base.parts.map(([counts, sum], index) => {
    const one = steps[index];
    return one === null ? [counts, sum] : [counts.map((n, bucket) => n + one.counts[bucket]), sum + one.sum];
  });
  return { codes, requests: sumOf(codes.values()), parts };
}

function codesGrown(codes, now, old) {
  const steps = Object.entries(now).map(([code, n]) => [code, n - (old[code] ?? 0)]);
  if (steps.every(([, n]) => n <= 0)) return codes;
  const result = new Map(codes);
  for (const [code, n] of steps) result.set(code, (result.get(code) ?? 0) + Math.max(0, n));
  return result;
}

function step(now, old) {
  const counts = old ? difference(now.counts, old.counts) : now.counts;
  if (counts.every((n) => n === 0) || counts.some((n) => n < 0)) return null;
  return { counts, sum: Math.max(0, now.sum_s - (old?.sum_s ?? 0)) };
}

/** The sums of several tasks. */
function together(tasks, buckets) {
  const codes = new Map();
  const parts = PARTS.map(() => [new Array(buckets).fill(0), 0]);
  for (const task of tasks) {
    for (const [code, n] of task.codes) codes.set(code, (codes.get(code) ?? 0) + n);
    task.parts.forEach(([counts, sum], part) => {
      counts.forEach((n, bucket) => { parts[part][0][bucket] += n; });
      parts[part][1] += sum;
    });
  }
  return { codes, requests: sumOf(codes.values()), parts };
}

/** What lies between two states of the same sums, in requests, requests a second, and seconds. */
function counted(now, then, seconds, bounds) {
  const codes = new Map([...now.codes].map(([code, n]) => [code, n - (then?.codes.get(code) ?? 0)]));
  const errors = sumOf([...codes].map(([code, n]) => (Number(code) >= 400 ? n : 0)));
  const requests = now.requests - (then?.requests ?? 0);
  const parts = now.parts.map(([counts, sum], part) => ({
    counts: then ? difference(counts, then.parts[part][0]) : counts,
    sum: sum - (then?.parts[part][1] ?? 0),
  }));
  const [mean, tokenize, queue, forward] = parts.map(({ counts, sum }) => {
    const n = sumOf(counts);
    return n > 0 ? sum / n : NaN;
  });
  const [p50, p95, p99] = [0.5, 0.95, 0.99].map((q) => quantile(q, parts[0].counts, bounds));
  return { seconds, requests, errors, codes, rate: requests / seconds, mean, tokenize, queue, forward, p50, p95, p99 };
}

function sumOf(numbers) {
  let sum = 0;
  for (const n of numbers) sum += n;
  return sum;
}
