// Who must still be told of what.
//
// A change that was committed while a screen showed its event obliges that screen: an invalidation
// with the change's endpoint has to arrive there after the commit was sent. A message that arrives
// between the sending of COMMIT and its answer counts, because Postgres notifies before it answers.
// A COMMIT whose answer was lost obliges nobody, unless Postgres says later that it was done.

/** A page that has just been loaded must learn of changes that are so old: its fetch may have been cached. */
const LOOKBACK = 20_000;

/** The applications' hook waits so long after a message, and forgets it when another comes meanwhile. */
const HOOK_WAIT = 2000;

export class Ledger {
  commits = [];
  screens = [];
  /** Obligations that are not met: `{ screen, commit, endpoint }`. */
  open = new Set();
  /** Screens that ended before they were told: their pages are gone. */
  dismissed = 0;
  #clock;
  #waiters = new Set();
  /** COMMITs without an answer yet. */
  #sent = new Set();
  /** When each endpoint was last changed, perhaps. */
  #changed = new Map();

  constructor(clock) {
    this.#clock = clock;
  }

  /** A screen that shows an event on a page, which is loaded now. */
  screen(owner, eid) {
    const screen = new Screen(this, owner, eid, this.#clock());
    this.screens.push(screen);
    return screen;
  }

  /** A COMMIT is about to be sent that changes these endpoints. */
  commit(what, eid, endpoints, xact) {
    const commit = { what, eid, endpoints, xact, at: this.#clock(), outcome: 'sent' };
    this.commits.push(commit);
    this.#sent.add(commit);
    for (const endpoint of endpoints) this.#changed.set(endpoint, commit.at);
    return commit;
  }

  /** What became of it: `done`, `failed`, or `unknown`. */
  settle(commit, outcome) {
    commit.outcome = outcome;
    this.#sent.delete(commit);
    if (outcome === 'done') for (const screen of this.screens) screen.oblige(commit);
    this.look();
  }

  /** Everybody has been told of everything. */
  get isSettled() {
    return this.open.size === 0 && this.#sent.size === 0;
  }

  /** Waits until something here has become so; false if it is not within `ms`. */
  async until(isSo, ms) {
    let look;
    let timer;
    const become = new Promise((resolve) => {
      look = () => isSo() && resolve(true);
      timer = setTimeout(() => resolve(false), ms);
      this.#waiters.add(look);
      look();
    });
    try {
      return await become;
    } finally {
      clearTimeout(timer);
      this.#waiters.delete(look);
    }
  }

  /** Has those who wait look again. */
  look() {
    for (const look of this.#waiters) look();
  }

  now() {
    return this.#clock();
  }

  lastChange(endpoint) {
    return this.#changed.get(endpoint) ?? -Infinity;
  }
}

export class Screen {
  owner;
  eid;
  /** What arrived: `{ at, endpoints }`. */
  arrivals = [];
  /** The obligations that were met, for what the hook would have made of them. */
  met = [];
  /** The longest time between a commit and its arrival. */
  slowest = { ms: 0 };
  /** Endpoints that arrived although nothing had changed. */
  extra = 0;
  repeated = 0;
  isOver = false;
  #ledger;
  #loaded;
  /** Since when it is obliged; null before its first join was answered. */
  #since = null;
  /** When each endpoint arrived last. */
  #last = new Map();
  #open = new Map();
  #stamps = new Set();

  constructor(ledger, owner, eid, loaded) {
    this.#ledger = ledger;
    this.owner = owner;
    this.eid = eid;
    this.#loaded = loaded;
  }

  /** Whether its first join was answered. */
  get isLive() {
    return this.#since !== null;
  }

  /** Its join was answered. From the first time on it is owed what changes, and what may be stale. */
  joined() {
    if (this.#since !== null || this.isOver) return;
    this.#since = Math.max(this.#loaded, this.#ledger.now() - LOOKBACK);
    for (const commit of this.#ledger.commits) if (commit.outcome === 'done') this.oblige(commit);
    this.#ledger.look();
  }

  /** A committed change obliges it, if it concerns it and has not arrived. */
  oblige(commit) {
    if (this.isOver || this.#since === null) return;
    if (commit.eid !== this.eid || commit.at < this.#since) return;
    for (const endpoint of commit.endpoints) {
      const obligation = { screen: this, commit, endpoint };
      const told = this.arrivals.find((it) => it.at >= commit.at && it.endpoints.includes(endpoint));
      if (told) {
        this.#meet(obligation, told.at);
      } else {
        if (!this.#open.has(endpoint)) this.#open.set(endpoint, []);
        this.#open.get(endpoint).push(obligation);
        this.#ledger.open.add(obligation);
      }
    }
  }

  /** An invalidation arrived. As the applications do, it ignores one whose timestamp it has seen. */
  receive({ endpoints, timestamp }) {
    if (this.isOver) return;
    if (this.#stamps.has(timestamp)) {
      this.repeated += 1;
      this.owner.log?.(`ignores it: timestamp ${timestamp} came before`);
      return;
    }
    this.#stamps.add(timestamp);
    const at = this.#ledger.now();
    this.arrivals.push({ at, endpoints });
    for (const endpoint of endpoints) {
      if (this.#ledger.lastChange(endpoint) <= (this.#last.get(endpoint) ?? this.#loaded)) this.extra += 1;
      this.#last.set(endpoint, at);
      for (const obligation of this.#open.get(endpoint) ?? []) {
        this.#ledger.open.delete(obligation);
        this.#meet(obligation, at);
      }
      this.#open.delete(endpoint);
    }
    this.#ledger.look();
  }

  /** Its page is gone, or has left for good: nobody looks at it. */
  end() {
    this.isOver = true;
    for (const obligation of [...this.#open.values()].flat()) {
      this.#ledger.open.delete(obligation);
      this.#ledger.dismissed += 1;
    }
    this.#open.clear();
    this.#ledger.look();
  }

  /** Its met obligations that the applications' hook would have forgotten. */
  forgotten() {
    const refreshes = this.arrivals
      .filter(({ at }, index) => (this.arrivals[index + 1]?.at ?? Infinity) - at >= HOOK_WAIT)
      .map(({ at, endpoints }) => ({ at: at + HOOK_WAIT, endpoints }));
    const isRefreshed = ({ commit, endpoint }) =>
      refreshes.some((it) => it.at >= commit.at && it.endpoints.includes(endpoint));
    return this.met.filter((obligation) => !isRefreshed(obligation));
  }

  #meet(obligation, at) {
    this.met.push(obligation);
    const ms = at - obligation.commit.at;
    if (ms > this.slowest.ms) this.slowest = { ms, ...obligation };
  }
}
