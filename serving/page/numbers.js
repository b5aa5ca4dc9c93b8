// Numbers as texts for people.

const NONE = "\u2013";
const SPACE = "\u202f";

/** A whole number with its thousands apart. */
export function count(value) {
  if (!Number.isFinite(value)) return NONE;
  return Math.round(value).toLocaleString("en-US");
}

/** A rate or another small number, with as many places as say something. */
export function amount(value) {
  if (!Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  if (value < 0.01) return "< 0.01";
  if (value < 10) return value.toFixed(value < 1 ? 2 : 1);
  return count(value);
}

/** A share of 0 to 1. */
export function percent(share, places = 0) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(places)}${SPACE}%` : NONE;
}

/** A duration given in seconds. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  const ms = 1000 * seconds;
  if (ms >= 10_000) return `${seconds.toFixed(0)}${SPACE}s`;
  if (ms >= 1000) return `${seconds.toFixed(1)}${SPACE}s`;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2)}${SPACE}ms`;
}

/** A size in bytes. */
export function size(bytes) {
  if (!Number.isFinite(bytes)) return NONE;
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  let value = bytes;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)}${SPACE}${units[unit]}`;
}

/** The time of day of a point in time (seconds since 1970). */
export function clock(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString("en-GB");
}
