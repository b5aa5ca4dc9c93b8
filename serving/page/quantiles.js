// Quantiles from counts in buckets, as Prometheus' `histogram_quantile` estimates them. Arithmetic alone.

/**
 * The value below which the share `q` (above 0, at most 1) of all observations lies.
 *
 * `bounds` are the buckets' upper ends, ascending; `counts` how many observations fell into each bucket, not summed up,
 * with one more entry at the end for those above all bounds. Within a bucket observations count as spread evenly. What lies
 * above all bounds is told as the last of them: more is not known. NaN where there is no observation.
 */
export function quantile(q, counts, bounds) {
  let total = 0;
  for (const n of counts) total += n;
  if (total <= 0) return NaN;
  const rank = q * total;
  let below = 0;
  for (let bucket = 0; bucket < bounds.length; bucket += 1) {
    const inside = counts[bucket];
    if (below + inside >= rank && inside > 0) {
      const start = bucket === 0 ? 0 : bounds[bucket - 1];
      return start + (bounds[bucket] - start) * ((rank - below) / inside);
    }
    below += inside;
  }
  return bounds[bounds.length - 1];
}

/** What was counted between two samples of the same counters. */
export function difference(later, earlier) {
  return later.map((n, bucket) => n - (earlier[bucket] ?? 0));
}
