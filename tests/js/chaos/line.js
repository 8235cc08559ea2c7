// A TCP line that can be cut, refused and frozen: between a client and the gateway, and between the
// gateway and its database.

import { once } from 'node:events';
import { connect, createServer } from 'node:net';

export class Line {
  /** New connections are refused: they are closed at once. */
  refuses = false;
  #onward;
  #server;
  #pairs = new Set();
  #isFrozen = false;

  /** A line to where `onward` says, in the words of `net.connect`; asked for each connection. */
  static async open(onward) {
    const it = new Line();
    it.#onward = onward;
    it.#server = createServer({ allowHalfOpen: true }, (near) => it.#accept(near));
    it.#server.listen(0, '127.0.0.1');
    await once(it.#server, 'listening');
    it.port = it.#server.address().port;
    return it;
  }

  /** Ends all connections without a word. */
  cut() {
    for (const pair of this.#pairs) pair.destroy();
  }

  /** Nothing passes from here on, in either direction, and nothing is closed. */
  freeze() {
    this.#isFrozen = true;
    for (const pair of this.#pairs) pair.freeze();
  }

  /**
   * Ends the freezing. What was held back is `delivered`; or it is gone, and the connections are
   * `reset`; or `lost`: the near end is reset and the far end is left open and unread; or `silent`:
   * both ends stay open and nothing ever passes again.
   */
  thaw(then) {
    this.#isFrozen = false;
    for (const pair of this.#pairs) pair.thaw(then);
  }

  close() {
    this.refuses = true;
    this.#server.close();
    this.cut();
  }

  #accept(near) {
    near.on('error', () => {});
    if (this.refuses) return reset(near);
    const far = connect({ allowHalfOpen: true, ...this.#onward() });
    const pair = new Pair(near, far, () => this.#pairs.delete(pair));
    this.#pairs.add(pair);
    if (this.#isFrozen) pair.freeze();
  }
}

/** As a network does that has lost the connection, where the socket can say so. */
function reset(socket) {
  if (socket.remotePort === undefined) socket.destroy();
  else socket.resetAndDestroy();
}

/** One connection and its continuation. */
class Pair {
  #near;
  #far;
  #isFrozen = false;
  /** Ends that came while nothing passed; null once nothing ever will. */
  #held = [];

  constructor(near, far, forget) {
    this.#near = near;
    this.#far = far;
    far.on('error', () => {});
    this.#pass(near, far);
    this.#pass(far, near);
    let open = 2;
    for (const end of [near, far]) {
      end.on('close', () => {
        open -= 1;
        if (open === 0) forget();
      });
    }
  }

  freeze() {
    if (this.#held === null) return;
    this.#isFrozen = true;
    this.#near.pause();
    this.#far.pause();
  }

  thaw(then) {
    if (!this.#isFrozen || this.#held === null) return;
    if (then === 'delivered') {
      this.#isFrozen = false;
      this.#held.splice(0).forEach((pass) => pass());
      this.#near.resume();
      this.#far.resume();
      return;
    }
    if (then === 'reset') return this.destroy();
    this.#held = null;
    if (then === 'lost') reset(this.#near);
    // So that the end of a connection is noticed: a socket that is not read has none.
    if (then === 'silent') for (const end of [this.#near, this.#far]) end.removeAllListeners('data').resume();
  }

  destroy() {
    reset(this.#near);
    reset(this.#far);
  }

  #pass(from, to) {
    from.on('data', (data) => {
      if (to.destroyed || to.write(data)) return;
      from.pause();
      to.once('drain', () => this.#isFrozen || from.resume());
    });
    const whenPassing = (pass) => () => {
      if (this.#held === null) return;
      if (this.#isFrozen) this.#held.push(pass);
      else pass();
    };
    from.on('end', whenPassing(() => to.end()));
    from.on('close', whenPassing(() => to.destroy()));
  }
}
