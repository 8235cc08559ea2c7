// A throw-away Postgres: its own cluster, on a socket in its own folder.

import { execFile, execFileSync } from 'node:child_process';
import { chownSync, existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { promisify } from 'node:util';

import pg from 'pg';

import { Process } from './process.js';

const run = promisify(execFile);

export class Postgres {
  #folder;
  #identity;
  #bin;
  #process;

  static async start() {
    const it = new Postgres();
    it.#bin = programs();
    it.#identity = identity();
    it.#folder = mkdtempSync(join(tmpdir(), 'tidegate-js-'));
    if (it.#identity.uid !== undefined) {
      chownSync(it.#folder, it.#identity.uid, it.#identity.gid);
    }
    await run(
      join(it.#bin, 'initdb'),
      ['-D', it.#data, '-U', 'postgres', '--auth=trust', '--encoding=UTF8', '--locale=C', '-N'],
      { ...it.#identity, cwd: it.#folder },
    );
    await it.resume();
    return it;
  }

  get #data() {
    return join(this.#folder, 'data');
  }

  /** For the gateway. */
  get url() {
    return `postgres://postgres@localhost/postgres?host=${encodeURIComponent(this.#folder)}`;
  }

  /** A connected client; whoever asks for it ends it. */
  async connect() {
    const client = new pg.Client({ host: this.#folder, user: 'postgres', database: 'postgres' });
    await client.connect();
    // A server that is stopped ends it before its test does.
    client.on('error', () => {});
    return client;
  }

  /** Starts the server on its cluster, where it was before. */
  async resume() {
    const settings = {
      listen_addresses: '',
      unix_socket_directories: this.#folder,
      fsync: 'off',
      full_page_writes: 'off',
      log_destination: 'stderr',
      logging_collector: 'off',
    };
    const args = Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
    this.#process = await Process.start(join(this.#bin, 'postgres'), ['-D', this.#data, ...args], {
      ...this.#identity,
      cwd: this.#folder,
      ending: 'QUIT',
      folder: this.#folder,
    });
    await this.#process.line(this.#process.errors, /ready to accept connections/);
  }

  /** Stops the server as `pg_ctl stop -m immediate` does; its cluster stays. */
  async halt() {
    await this.#process.stop('SIGQUIT');
  }

  async stop() {
    await this.halt();
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

/** Root may not run Postgres: the user that its package makes does. */
function identity() {
  if (process.getuid() !== 0) return {};
  try {
    const id = (flag) => Number(execFileSync('id', [flag, 'postgres'], { stdio: 'pipe' }));
    return { uid: id('-u'), gid: id('-g') };
  } catch {
    throw new Error('Postgres does not run as root, and there is no user postgres to run it as');
  }
}

/** The folder of `initdb` and `postgres`. */
function programs() {
  const debian = '/usr/lib/postgresql';
  const versions = existsSync(debian) ? readdirSync(debian) : [];
  const folders = [
    ...process.env.PATH.split(delimiter),
    ...versions.sort((a, b) => b - a).map((version) => join(debian, version, 'bin')),
  ];
  const found = folders.find((folder) =>
    ['initdb', 'postgres'].every((program) => existsSync(join(folder, program))),
  );
  if (!found) throw new Error('no initdb and postgres, neither in PATH nor in /usr/lib/postgresql');
  return found;
}
