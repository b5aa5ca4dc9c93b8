// Neurons as bits: neuron n of a layer is bit n % 8, the lowest first, of byte n // 8. Arithmetic alone.

/** The states of a neuron beside another task, as the page draws them. */
export const NEITHER = 0, ONLY_THIS = 1, ONLY_THAT = 2, BOTH = 3;

/** A layer's bitmap from Base64, as one 0 or 1 for each of the `width` neurons. */
export function unpack(base64, width) {
  const bytes = atob(base64);
  const bits = new Uint8Array(width);
  for (let n = 0; n < width; n += 1) bits[n] = (bytes.charCodeAt(n >> 3) >> (n & 7)) & 1;
  return bits;
}

/** For each neuron whether neither, this, that or both keep it; without `that`, whether this one does. */
export function compare(mine, theirs = null) {
  const states = new Uint8Array(mine.length);
  for (let n = 0; n < mine.length; n += 1) states[n] = mine[n] + 2 * (theirs === null ? 0 : theirs[n]);
  return states;
}

/** How many neurons are in each of the four states. */
export function tally(states) {
  const found = [0, 0, 0, 0];
  for (const state of states) found[state] += 1;
  return found;
}
