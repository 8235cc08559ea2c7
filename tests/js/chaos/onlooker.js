// One person before a screen: a page, and another one after each reload.

/** How long somebody looks at a page that has lost a topic for good before reloading it. */
const PATIENCE = 2000;

export class Onlooker {
  reloads = 0;
  messages = 0;
  merged = 0;
  /** How often it was told `phx_error`. */
  heals = 0;
  page = null;
  #makePage;
  #patience;
  #log;
  #timers = new Set();
  #isOver = false;

  /**
   * @param {(onlooker: Onlooker) => object} makePage loads a page
   * @param {number} patience how long it looks at a page that is not live for the first time
   */
  constructor(name, makePage, patience, log) {
    this.name = name;
    this.#makePage = makePage;
    this.#patience = patience;
    this.#log = log;
  }

  /** Loads the page. */
  open() {
    if (this.#isOver) return;
    this.log('loads its page');
    const page = this.#makePage(this);
    this.page = page;
    this.later(this.#patience, page, () => page.isLive || this.#reload('it is not live in time'));
  }

  /** Whether all that it shows has been joined once. */
  get isLive() {
    return this.page?.isLive ?? false;
  }

  /** Topics that are not joined at this moment. */
  get absent() {
    return this.page?.absent ?? [];
  }

  /** Its page has lost a topic for good; in a while it notices. */
  lost(page, why) {
    this.log(`is dead: ${why}`);
    this.later(PATIENCE, page, () => this.#reload(why));
  }

  /** Does something after so long, if the page is still the same. */
  later(ms, page, action) {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      if (this.page === page) action();
    }, ms);
    this.#timers.add(timer);
  }

  log(text) {
    this.#log(this.name, text);
  }

  close() {
    this.#isOver = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.page?.close();
  }

  /** What the page was owed, nobody waits for any more. */
  #reload(why) {
    this.log(`reloads: ${why}`);
    this.reloads += 1;
    this.page.close();
    this.open();
  }
}
