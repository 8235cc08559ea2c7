// The React hook of the applications, as far as it decides what is fetched again. After a message it
// waits; each further message starts the wait anew and puts its own list of endpoints in the place
// of the former. At the end of the wait the page fetches what is on the list, and nothing else.

import { Inbox } from './wait.js';

/** How long the event page waits. */
const WAIT = 2000;

export class RefreshHook {
  /** `{ at, endpoints }` of each refresh. */
  refreshes = new Inbox('refreshes');
  #eid;
  #seen = new Set();
  #timer;

  /** Binds it to a channel that is not joined yet; it ends with the test. */
  constructor(t, eid, channel) {
    this.#eid = eid;
    channel.raw.on('broadcast', { event: 'cache_invalidation' }, (message) => this.#receive(message));
    t.after(() => clearTimeout(this.#timer));
  }

  #receive({ payload: { timestamp, endpoints } }) {
    const key = `${this.#eid}-${timestamp}`;
    if (this.#seen.has(key)) return;
    this.#seen.add(key);
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.refreshes.push({ at: performance.now(), endpoints }), WAIT);
  }

  /** Waits until all these endpoints have been refreshed since `at`. */
  async refreshed(endpoints, at, options) {
    await Promise.all(
      endpoints.map((endpoint) =>
        this.refreshes.find(
          `a refresh of ${endpoint} since ${at}`,
          (refresh) => refresh.at >= at && refresh.endpoints.includes(endpoint),
          options,
        ),
      ),
    );
  }
}
