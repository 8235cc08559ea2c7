// The gateway under test: its own binary, which is killed, stopped and started again on its ports.

import { execFile } from 'node:child_process';
import { createHmac, randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';

import { Process } from '../support/process.js';

const BIN =
  process.env.TIDEGATE_BIN ??
  fileURLToPath(new URL('../../../target/debug/tidegate', import.meta.url));

/**
 * Of this process alone: while the gateway is down, its ports of 127.0.0.1 could be given to any
 * connection that somebody opens.
 */
const HOST = `127.77.${(process.pid >> 8) & 255}.${process.pid & 255}`;

/** `migrate` waits for locks, but not for ever. */
const MIGRATE_TIMEOUT = 30_000;

export class Gateway {
  /** Calls this if it ends by itself. */
  onEnd = () => {};
  #secret = randomBytes(32).toString('hex');
  #settings;
  #process;
  #lives = [];
  #isEnded = false;
  /** What the metrics of the lives before this one came to. */
  #before = new Map();

  /** With such settings, named without `TIDEGATE_`. */
  constructor(settings) {
    this.#settings = {
      JWT_SECRET: this.#secret,
      LISTEN: `${HOST}:0`,
      ADMIN_LISTEN: `${HOST}:0`,
      ...settings,
    };
  }

  /** The project's public key. */
  get key() {
    const iat = Math.floor(Date.now() / 1000);
    const claims = { iss: 'supabase', ref: 'tidegate', role: 'anon', iat, exp: iat + 315_360_000 };
    const text = [{ alg: 'HS256', typ: 'JWT' }, claims]
      .map((part) => Buffer.from(JSON.stringify(part)).toString('base64url'))
      .join('.');
    return `${text}.${createHmac('sha256', this.#secret).update(text).digest('base64url')}`;
  }

  /** Starts it, where it was before, and waits until it accepts connections. */
  async resume() {
    const started = await Process.start(BIN, ['serve'], { env: environment(this.#settings) });
    this.#process = started;
    this.#isEnded = false;
    this.#lives.push(started);
    const line = await started.line(started.lines, /^listening /);
    const [, listen, admin] = /public=(\S+) admin=(\S+)/.exec(line);
    this.#settings = { ...this.#settings, LISTEN: listen, ADMIN_LISTEN: admin };
    const [host, port] = listen.split(':');
    this.address = { host, port: Number(port) };
    this.admin = `http://${admin}`;
    started.exited.then(([code, signal]) => this.#isEnded || this.onEnd(code ?? signal));
  }

  /** Every line that it has logged, in all its lives. */
  get log() {
    return this.#lives.flatMap(({ errors }) => errors.items);
  }

  /** Waits until the database link is up. */
  async linked() {
    await this.#process.errors.find('database link', (line) => /link is up/.test(line));
  }

  /** Ends it without a word to anybody. */
  async kill() {
    await this.#end('SIGKILL');
  }

  /** Ends it as an operator does. */
  async drain() {
    await this.#end('SIGTERM');
  }

  freeze() {
    this.#process.signal('SIGSTOP');
  }

  thaw() {
    this.#process.signal('SIGCONT');
  }

  /** The metrics of all its lives: `name{labels}` and value. */
  async metrics() {
    return sum(this.#before, await this.#scrape());
  }

  /** Runs `tidegate migrate`; gives what it said if it failed. */
  async migrate(databaseUrl) {
    const env = environment({ DATABASE_URL: databaseUrl });
    return await new Promise((resolve) =>
      execFile(BIN, ['migrate'], { env, timeout: MIGRATE_TIMEOUT }, (error, _, errors) =>
        resolve(error ? errors || error.message : null),
      ),
    );
  }

  async #end(signal) {
    const metrics = await this.#scrape();
    this.#isEnded = true;
    await this.#process?.stop(signal);
    this.#before = sum(this.#before, metrics);
  }

  async #scrape() {
    try {
      const answer = await fetch(`${this.admin}/metrics`, { signal: AbortSignal.timeout(1000) });
      const series = [...(await answer.text()).matchAll(/^([^#].*) (\S+)$/gm)];
      return new Map(series.map(([, name, value]) => [name, Number(value)]));
    } catch {
      return new Map();
    }
  }
}

function sum(one, other) {
  const all = new Map(one);
  for (const [name, value] of other) all.set(name, (all.get(name) ?? 0) + value);
  return all;
}

function environment(settings) {
  const inherited = Object.entries(process.env).filter(
    ([name]) => !name.startsWith('TIDEGATE_') && name !== 'DATABASE_URL',
  );
  const named = Object.entries(settings).map(([name, value]) => [`TIDEGATE_${name}`, value]);
  return Object.fromEntries([...inherited, ...named]);
}
