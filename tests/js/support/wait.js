// Waiting: for an event, until a deadline. For a time only where a test is about that time.

import { setTimeout as timer } from 'node:timers/promises';

/** Within so many milliseconds whatever a test waits for has happened. */
export const DEADLINE = 15_000;

/**
 * What `promise` gives, if it does so in time.
 * @param {() => unknown} [seen] what the failure shows besides
 */
export async function within(promise, what, { ms = DEADLINE, seen } = {}) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => {
      const shown = seen ? `\nseen so far: ${JSON.stringify(seen(), null, 1)}` : '';
      reject(new Error(`${what}: not within ${ms} ms${shown}`));
    }, ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** A time that is itself what a test is about: an outage, a pace, a memory that fades. */
export async function lasting(ms) {
  await timer(ms);
}

/** Everything that has arrived somewhere, in order; a test waits for what it expects of it. */
export class Inbox {
  items = [];
  #waiters = new Set();

  constructor(name) {
    this.name = name;
  }

  push(item) {
    this.items.push(item);
    for (const look of this.#waiters) look();
  }

  /** The first item, of those that came and those to come, that `wanted` accepts. */
  find(what, wanted, options) {
    return this.nth(1, what, wanted, options);
  }

  /** The `count`th such item. */
  async nth(count, what, wanted = () => true, { ms = DEADLINE, after = 0 } = {}) {
    let look;
    const found = new Promise((resolve) => {
      look = () => {
        const matching = this.items.slice(after).filter(wanted);
        if (matching.length >= count) resolve(matching[count - 1]);
      };
      this.#waiters.add(look);
      look();
    });
    try {
      return await within(found, `${this.name}: ${what}`, { ms, seen: () => this.items });
    } finally {
      this.#waiters.delete(look);
    }
  }
}
