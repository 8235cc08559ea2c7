// The gateway's own binary.

import { execFile } from 'node:child_process';
import { createHmac, randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { Process } from './process.js';

const BIN =
  process.env.TIDEGATE_BIN ??
  fileURLToPath(new URL('../../../target/debug/tidegate', import.meta.url));

const SECRET = randomBytes(32).toString('hex');

/** The project's keys: no `sub`, no `aud`, ten years. */
export const ANON = sign({ iss: 'supabase', ref: 'tidegate', role: 'anon' }, 315_360_000);
export const SERVICE = sign({ iss: 'supabase', ref: 'tidegate', role: 'service_role' }, 315_360_000);

/** A signed-in user's token, that holds for so many seconds. */
export function userToken(claims = {}, seconds = 18_000) {
  const sub = '5d4ee0a5-3a0e-4b5a-9d0c-6cf3f2a8b7d1';
  const user = { aud: 'authenticated', role: 'authenticated', sub, session_id: sub };
  return sign({ ...user, ...claims }, seconds);
}

function sign(claims, seconds) {
  const iat = Math.floor(Date.now() / 1000);
  const text = [{ alg: 'HS256', typ: 'JWT' }, { ...claims, iat, exp: iat + seconds }]
    .map((part) => Buffer.from(JSON.stringify(part)).toString('base64url'))
    .join('.');
  return `${text}.${createHmac('sha256', SECRET).update(text).digest('base64url')}`;
}

/** Runs `tidegate migrate`. */
export async function migrate(databaseUrl) {
  await promisify(execFile)(BIN, ['migrate'], { env: environment({ DATABASE_URL: databaseUrl }) });
}

export class Gateway {
  #settings;
  #process;
  url;
  admin;

  /** Starts it with such settings, named without `TIDEGATE_`, and waits until it serves. */
  static async start(settings = {}) {
    const it = new Gateway();
    it.#settings = { LISTEN: '127.0.0.1:0', ADMIN_LISTEN: '127.0.0.1:0', ...settings };
    await it.resume();
    return it;
  }

  /** Starts it where it was before; `awaitsLink` is false while its database is away. */
  async resume({ awaitsLink = true } = {}) {
    this.#process = await Process.start(BIN, ['serve'], { env: environment(this.#settings) });
    const line = await this.#process.line(this.#process.lines, /^listening /);
    const [, listen, admin] = /public=(\S+) admin=(\S+)/.exec(line);
    this.#settings = { ...this.#settings, LISTEN: listen, ADMIN_LISTEN: admin };
    this.url = `http://${listen}`;
    this.admin = `http://${admin}`;
    if (this.#settings.DATABASE_URL && awaitsLink) await this.linked();
  }

  /** Waits until the database link is up, also when it has been up before. */
  async linked(count = 1) {
    await this.#process.errors.nth(count, 'database link', (line) => /link is up/.test(line));
  }

  /** Broadcasts as server code does: by REST, with only an `apikey`, and an empty `Authorization`. */
  async publish(topic, event, payload) {
    const answer = await fetch(`${this.url}/realtime/v1/api/broadcast`, {
      method: 'POST',
      headers: { apikey: SERVICE, authorization: '', 'content-type': 'application/json' },
      body: JSON.stringify({ messages: [{ topic, event, payload }] }),
    });
    if (answer.status !== 202) throw new Error(`publishing was answered with ${answer.status}`);
  }

  /** The sum of a metric over those of its series that have these labels. */
  async metric(name, labels = {}) {
    const text = await (await fetch(`${this.admin}/metrics`)).text();
    const wanted = Object.entries(labels).map(([label, value]) => `${label}="${value}"`);
    return text
      .split('\n')
      .filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`))
      .filter((line) => wanted.every((label) => line.includes(label)))
      .reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' ') + 1)), 0);
  }

  /** Ends it without a word to anybody. */
  async kill() {
    await this.#process.stop('SIGKILL');
  }

  /** Ends it as an operator does. */
  async drain() {
    await this.#process.stop('SIGTERM');
  }
}

function environment(settings) {
  const inherited = Object.entries(process.env).filter(
    ([name]) => !name.startsWith('TIDEGATE_') && name !== 'DATABASE_URL',
  );
  const all = { JWT_SECRET: SECRET, PROTOCOL__ERROR_DELAY: '10ms', ...settings };
  const named = Object.entries(all).map(([name, value]) => [`TIDEGATE_${name}`, value]);
  return Object.fromEntries([...inherited, ...named]);
}
