// A throw-away Prometheus with the rules of grafana/prometheus, in a hurry where a test is.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { Process } from './process.js';
import { DEADLINE, lasting } from './wait.js';

const RULES = new URL('../../../grafana/prometheus/', import.meta.url);
const SECONDS = { s: 1, m: 60, h: 3600 };

/** How often a condition is looked at; every answer costs Prometheus a few milliseconds. */
const LOOK = 200;

export class Prometheus {
  #folder;
  #process;
  url;

  /**
   * Starts it, scraping these admin addresses as job `tidegate`.
   *
   * @param {number} options.hurry by how much every `for` and every window of the rules is shorter
   */
  static async start(admins, { hurry = 1, interval = '500ms' } = {}) {
    const it = new Prometheus();
    it.#folder = mkdtempSync(join(tmpdir(), 'tidegate-prometheus-'));
    for (const file of ['recording.yml', 'alerts.yml']) {
      const rules = readFileSync(new URL(file, RULES), 'utf8');
      writeFileSync(join(it.#folder, file), shortened(rules, hurry));
    }
    const targets = admins.map((url) => new URL(url).host);
    const config = {
      global: { scrape_interval: interval, scrape_timeout: interval, evaluation_interval: interval },
      rule_files: ['recording.yml', 'alerts.yml'],
      scrape_configs: [{ job_name: 'tidegate', static_configs: [{ targets }] }],
    };
    // JSON is YAML.
    writeFileSync(join(it.#folder, 'prometheus.json'), JSON.stringify(config));
    const args = ['--config.file=prometheus.json', '--storage.tsdb.path=data', '--web.listen-address=127.0.0.1:0'];
    it.#process = await Process.start('prometheus', args, { cwd: it.#folder, folder: it.#folder });
    const line = await it.#process.line(it.#process.errors, /msg="Listening on" address=/);
    it.url = `http://${/address=(\S+)/.exec(line)[1]}`;
    await it.#process.line(it.#process.errors, /ready to receive web requests/);
    return it;
  }

  /** What the API says to a path with these parameters; its own error where it refuses. */
  async api(path, parameters = {}) {
    const answer = await fetch(`${this.url}/api/v1/${path}?${new URLSearchParams(parameters)}`);
    const { status, error, data } = await answer.json();
    if (status !== 'success') throw new Error(`${error}: ${JSON.stringify(parameters)}`);
    return data;
  }

  /** The series of an expression: `{ metric, value: [time, text] }`. */
  async query(query, time = Date.now() / 1000) {
    return (await this.api('query', { query, time })).result;
  }

  /** The series of an expression over a time: `{ metric, values: [[time, text], …] }`. */
  async range(query, start, end, step = 1) {
    return (await this.api('query_range', { query, start, end, step })).result;
  }

  /** The names of the alerts that fire, in order. */
  async firing() {
    const { alerts } = await this.api('alerts');
    const names = alerts.filter(({ state }) => state === 'firing').map(({ labels }) => labels.alertname);
    return [...new Set(names)].sort();
  }

  /** Waits until exactly these alerts fire. */
  async fires(...names) {
    let firing = [];
    await this.until(
      async () => String((firing = await this.firing())) === String(names.sort()),
      () => `alerts ${names.join(', ') || 'none'}, but ${firing.join(', ') || 'none'}`,
      4 * DEADLINE,
    );
  }

  /** Waits until something holds. */
  async until(holds, what, ms = DEADLINE) {
    const deadline = Date.now() + ms;
    while (!(await holds())) {
      if (Date.now() > deadline) throw new Error(`${what()}: not within ${ms} ms`);
      await lasting(LOOK);
    }
  }

  async stop() {
    await this.#process?.stop('SIGTERM');
    if (this.#folder) rmSync(this.#folder, { recursive: true, force: true });
  }
}

/** The same rules, each time in them divided. */
function shortened(rules, hurry) {
  const time = /(\bfor: |\[|\boffset )(\d+)([smh])\b/g;
  return rules.replace(time, (_, before, count, unit) => {
    const milliseconds = Math.ceil((count * SECONDS[unit] * 1000) / hurry);
    return `${before}${milliseconds}ms`;
  });
}
