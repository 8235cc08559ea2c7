// Random numbers that a seed gives again.

export class Random {
  #state;

  constructor(seed) {
    this.#state = seed >>> 0;
  }

  /**
   * At least 0, below 1.
   * Source: Tommy Ettinger's mulberry32, public domain.
   */
  number() {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let it = this.#state;
    it = Math.imul(it ^ (it >>> 15), it | 1);
    it ^= it + Math.imul(it ^ (it >>> 7), it | 61);
    return ((it ^ (it >>> 14)) >>> 0) / 2 ** 32;
  }

  /** A whole number, both ends included. */
  whole(from, to) {
    return from + Math.floor(this.number() * (to - from + 1));
  }

  /** Milliseconds between two numbers of seconds. */
  seconds(from, to) {
    return Math.round((from + this.number() * (to - from)) * 1000);
  }

  /** Whether something of this probability happens. */
  happens(probability) {
    return this.number() < probability;
  }

  pick(list) {
    return list[this.whole(0, list.length - 1)];
  }

  /** One of the names of `{ name: weight }`. */
  weighted(weights) {
    const entries = Object.entries(weights);
    let left = this.number() * entries.reduce((sum, [, weight]) => sum + weight, 0);
    return entries.find(([, weight]) => (left -= weight) < 0)?.[0] ?? entries.at(-1)[0];
  }

  /** A copy in another order. */
  shuffled(list) {
    const copy = [...list];
    for (let last = copy.length - 1; last > 0; last--) {
      const other = this.whole(0, last);
      [copy[last], copy[other]] = [copy[other], copy[last]];
    }
    return copy;
  }

  /** So many of them. */
  some(list, count) {
    return this.shuffled(list).slice(0, count);
  }

  /** How long nothing happens, if it happens every `mean` milliseconds and nobody arranges it. */
  pause(mean) {
    return Math.round(-Math.log(1 - this.number()) * mean);
  }
}
