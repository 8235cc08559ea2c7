// deploy/nginx.conf, run by nginx, between published clients and a gateway.

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';

import { withRealtime } from './support/client.js';
import { ANON, SERVICE } from './support/gateway.js';
import { Process } from './support/process.js';
import { Stage } from './support/stage.js';
import { lasting } from './support/wait.js';

const CONFIGURATION = new URL('../../deploy/nginx.conf', import.meta.url);
const NGINX = process.env.NGINX ?? '/usr/sbin/nginx';

/** Of this process alone: nginx cannot be given port 0. */
const HOST = `127.88.${(process.pid >> 8) & 255}.${process.pid & 255}`;
const PORT = 8080;

/** How long the clients wait between an invalidation and their fetch, at least. */
const CLIENTS_WAIT = 1_000;

/** What answers `/live/`: the version that it is at, and how often it has been asked. */
class Live {
  version = 1;
  asked = [];
  #server = createServer((question, answer) => {
    this.asked.push(question.url);
    answer.writeHead(200, { 'cache-control': 'no-store' }).end(String(this.version));
  });

  static async start() {
    const it = new Live();
    it.#server.listen(0, '127.0.0.1');
    await once(it.#server, 'listening');
    it.address = `127.0.0.1:${it.#server.address().port}`;
    return it;
  }

  stop() {
    this.#server.close();
    this.#server.closeAllConnections();
  }
}

/** The configuration as it is deployed, but for its addresses and folders. */
class Nginx {
  #process;
  #folder;
  url = `http://${HOST}:${PORT}`;

  static async start(gateway, live) {
    const it = new Nginx();
    it.#folder = mkdtempSync(join(tmpdir(), 'tidegate-nginx-'));
    for (const name of ['log', 'cache']) mkdirSync(join(it.#folder, name));
    let text = readFileSync(CONFIGURATION, 'utf8');
    for (const [from, to] of [
      ['server 127.0.0.1:4000;', `server ${gateway};`],
      ['server 127.0.0.1:3000;', `server ${live};`],
      ['listen 80;', `listen ${HOST}:${PORT};`],
      ['/var/cache/nginx/live', `${it.#folder}/cache`],
      ['/var/log/nginx/tidegate.access.log', `${it.#folder}/log/access`],
      ['/var/log/nginx/tidegate.error.log', `${it.#folder}/log/error`],
    ]) {
      assert.equal(text.split(from).length, 2, `${from} stands in deploy/nginx.conf once`);
      text = text.replace(from, to);
    }
    writeFileSync(join(it.#folder, 'tidegate.conf'), text);
    writeFileSync(
      join(it.#folder, 'nginx.conf'),
      // As root it would become somebody who cannot write into the folder.
      `${process.getuid() === 0 ? 'user root;' : ''} daemon off; worker_processes 1; pid ${it.#folder}/pid; error_log stderr notice;
      events { worker_connections 256; }
      http {
        ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
          .map((name) => `${name}_temp_path ${it.#folder}/${name};`)
          .join(' ')}
        include ${it.#folder}/tidegate.conf;
      }`,
    );
    it.#process = await Process.start(NGINX, ['-c', join(it.#folder, 'nginx.conf')], {
      ending: 'TERM',
      folder: it.#folder,
    });
    await it.#process.line(it.#process.errors, /start worker process /);
    return it;
  }

  /** The keys of what it has kept. */
  keys() {
    return readdirSync(join(this.#folder, 'cache'), { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => readFileSync(join(entry.path, entry.name), 'latin1'))
      .map((text) => /^KEY: (.*)$/m.exec(text)?.[1]);
  }

  /** Everything that it has logged. */
  get logs() {
    const files = ['access', 'error'].map((name) => readFileSync(join(this.#folder, 'log', name), 'utf8'));
    return [...files, ...this.#process.errors.items].join('\n');
  }

  async stop() {
    await this.#process?.stop('SIGTERM');
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

describe('nginx in front', { timeout: 120_000 }, () => {
  let stage, live, nginx, auditLog;
  before(async () => {
    auditLog = join(mkdtempSync(join(tmpdir(), 'tidegate-audit-')), 'audit');
    stage = await Stage.start({ NETWORK__TRUSTED_PROXIES: '127.0.0.1', AUDIT_LOG: auditLog });
    live = await Live.start();
    nginx = await Nginx.start(new URL(stage.gateway.url).host, live.address);
  });
  after(async () => {
    await nginx?.stop();
    live?.stop();
    await stage?.stop();
    rmSync(join(auditLog, '..'), { recursive: true, force: true });
  });

  const audited = () => readFileSync(auditLog, 'utf8').trim().split('\n').map((line) => JSON.parse(line));

  for (const flavour of [withRealtime('2.11.15'), withRealtime('2.119.1')]) {
    it(`passes the WebSocket of ${flavour.name} and what the database notifies`, async (t) => {
      const event = await stage.event();
      const client = stage.client(t, flavour, ANON, nginx.url);
      const channel = await client.join(`cache_invalidate_${event.eid}`);
      await event.vote();
      await channel.received('vote_cast');
    });
  }

  it('passes broadcasts over REST', async (t) => {
    const client = stage.client(t, withRealtime('2.11.15'), ANON, nginx.url);
    const channel = await client.join('auction_winner_AB1', { event: 'auction_winner' });
    const answer = await fetch(`${nginx.url}/realtime/v1/api/broadcast`, {
      method: 'POST',
      headers: { apikey: SERVICE, 'content-type': 'application/json' },
      body: JSON.stringify({
        messages: [{ topic: 'auction_winner_AB1', event: 'auction_winner', payload: { type: 'sold' } }],
      }),
    });
    assert.equal(answer.status, 202);
    await channel.received('sold');
  });

  it('tells the gateway where a client is, whatever that client says', async () => {
    const answer = await ask('/realtime/v1/websocket?apikey=wrong&vsn=1.0.0', {
      localAddress: '127.0.0.9',
      headers: {
        'x-forwarded-for': '203.0.113.7',
        connection: 'upgrade',
        upgrade: 'websocket',
        'sec-websocket-version': '13',
        'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==',
      },
    });
    assert.equal(answer.status, 401);
    assert.deepEqual(
      audited().filter(({ event }) => event === 'refuse_upgrade').map(({ address }) => address),
      ['127.0.0.9'],
    );
  });

  it('hangs up later than the gateway does', () => {
    const text = readFileSync(CONFIGURATION, 'utf8');
    for (const deadline of ['proxy_read_timeout', 'proxy_send_timeout']) {
      const [, hours] = new RegExp(`${deadline} (\\d+)h;`).exec(text);
      assert.ok(Number(hours) >= 1, deadline);
    }
  });

  it('writes no key and no token down', () => {
    const { logs } = nginx;
    assert.match(logs, /"GET \/realtime\/v1\/websocket" 101/);
    assert.doesNotMatch(logs, /apikey|eyJ/);
  });

  it('asks for an endpoint once a second, however many viewers there are and whatever their v is', async () => {
    const [before, began] = [live.asked.length, Date.now()];
    const viewers = Array.from({ length: 200 }, (_, it) => ask(`/live/event/AB1?v=${it}&lang=en`));
    const answers = await Promise.all(viewers);
    assert.ok(answers.every(({ status, body }) => status === 200 && body === String(live.version)));
    const seconds = Math.floor((Date.now() - began) / 1000) + 2;
    assert.ok(live.asked.length - before <= seconds, `${live.asked.length - before} questions`);
  });

  it('knows endpoints by all their arguments but v', async () => {
    for (const [asked, wanted] of [
      ['?v=1', '?'],
      ['?v=1&a=2', '?a=2'],
      ['?a=2&v=1', '?a=2'],
      ['?a=2&v=1&b=3', '?a=2&b=3'],
      ['?av=1', '?av=1'],
      ['?a=2&bv=1', '?a=2&bv=1'],
      ['', '?'],
    ]) {
      await ask(`/live/event/AB2${asked}`);
      assert.ok(nginx.keys().some((key) => key.includes(`/live/event/AB2${wanted}@`)), `${asked}: ${nginx.keys()}`);
    }
  });

  it('never gives who waits as clients do an answer from before the change', async () => {
    for (let change = 0; change < 4; change += 1) {
      await ask('/live/event/AB3');
      live.version += 1;
      // The answer that has just been kept is out of date from here on.
      await lasting(CLIENTS_WAIT);
      const { body } = await ask('/live/event/AB3?v=1');
      assert.equal(body, String(live.version));
    }
  });

  /** A GET of the path, over a connection of its own. */
  async function ask(path, options = {}) {
    const asking = request(`${nginx.url}${path}`, { agent: false, ...options });
    asking.end();
    const [answer] = await once(asking, 'response');
    const parts = [];
    for await (const part of answer) parts.push(part);
    return { status: answer.statusCode, body: Buffer.concat(parts).toString() };
  }
});
