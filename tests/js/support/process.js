// Child processes that end when the test does, however it does.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

import { Inbox, within } from './wait.js';

/** Reads until its parent is gone, then ends $1 by signal $2 and removes the folder $3. */
const WATCHDOG = `trap '' HUP INT TERM
cat >/dev/null
kill -"$2" "$1" 2>/dev/null
while kill -0 "$1" 2>/dev/null; do sleep 0.1; done
[ -z "$3" ] || rm -rf "$3"`;

/** One running program, its output line by line. */
export class Process {
  #child;
  #watchdog;
  lines;
  errors;

  /** Starts it. Should this process die, `ending` is sent to it and `folder` removed. */
  static async start(command, args, { ending = 'KILL', folder = '', ...options }) {
    const it = new Process();
    it.#child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] });
    it.lines = read(it.#child.stdout, `output of ${command}`);
    it.errors = read(it.#child.stderr, `errors of ${command}`);
    it.exited = once(it.#child, 'exit');
    await once(it.#child, 'spawn');
    it.#watchdog = spawn(
      '/bin/sh',
      ['-c', WATCHDOG, 'watchdog', String(it.#child.pid), ending, folder],
      { stdio: ['pipe', 'ignore', 'ignore'], detached: true },
    );
    return it;
  }

  /** The line of `inbox` that begins so; an error with all the output if the process ends first. */
  async line(inbox, wanted) {
    const ended = this.exited.then(() => {
      const output = [...this.lines.items, ...this.errors.items].join('\n');
      throw new Error(`${inbox.name} ended before ${wanted}:\n${output}`);
    });
    ended.catch(() => {});
    return await Promise.race([inbox.find(String(wanted), (line) => wanted.test(line)), ended]);
  }

  signal(name) {
    this.#child.kill(name);
  }

  /** Ends it, if it has not ended, and waits until it has. */
  async stop(signal) {
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      this.#child.kill(signal);
      await within(this.exited, `end of process ${this.#child.pid} after ${signal}`);
    }
    this.#watchdog.kill('SIGKILL');
  }
}

function read(stream, name) {
  const inbox = new Inbox(name);
  createInterface({ input: stream }).on('line', (line) => inbox.push(line));
  return inbox;
}
