// Draws every board into target/boards/*.png, without Grafana: from its JSON, with what Prometheus
// answers after a minute and a half of an event night in which Postgres restarts once.
//
//     make boards
//
// It draws what Grafana would show of the panels that the boards use, and throws at any other.

import { execFile } from 'node:child_process';
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { page } from './support/drawing.js';
import { boards, filled } from './support/boards.js';
import { Night } from './support/night.js';
import { Prometheus } from './support/prometheus.js';
import { lasting } from './support/wait.js';

const OUT = fileURLToPath(new URL('../../target/boards/', import.meta.url));
const CHROMIUM = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'];

/** What passes before and after Postgres is away, in milliseconds. */
const BEFORE = 45_000;
const AWAY = 4_000;
const AFTER = 30_000;
const RATE_INTERVAL = '5s';

const chromium = CHROMIUM.find((path) => existsSync(path));
if (!chromium) throw new Error(`none of ${CHROMIUM.join(', ')}: apt-get install chromium`);

const night = await Night.start({ METRICS__DATABASE_INTERVAL: '2s', RELAY__CANARY_INTERVAL: '1s' });
let prometheus;
try {
  prometheus = await Prometheus.start(night.gateways.map(({ admin }) => admin), { interval: '1s' });
  await live(night);
  await draw();
} finally {
  await prometheus?.stop();
  await night.stop();
}

async function live(night) {
  const [gateway] = night.gateways;
  await lasting(BEFORE / 3);
  await night.mischief();
  await lasting(BEFORE / 3);
  await night.crowd(gateway, 40);
  const deaf = await night.deafen(gateway, 7);
  await night.mischief();
  await lasting(BEFORE / 3);
  await night.pause();
  await night.stage.postgres.halt();
  await lasting(AWAY);
  await night.stage.postgres.resume();
  await night.stage.reconnect();
  night.resume();
  await lasting(AFTER / 2);
  for (const socket of deaf) socket.close();
  await night.mischief();
  await lasting(AFTER / 2);
}

async function draw() {
  mkdirSync(OUT, { recursive: true });
  const end = Date.now() / 1000;
  const start = end - (BEFORE + AWAY + AFTER) / 1000;
  for (const board of boards()) {
    const panels = [];
    for (const panel of board.panels) {
      const answers = [];
      for (const target of panel.targets) {
        const expr = filled(target.expr, RATE_INTERVAL);
        const series = target.instant ? await prometheus.query(expr, end) : await prometheus.range(expr, start, end);
        answers.push({ target, series });
      }
      panels.push({ panel, answers });
    }
    const marks = [];
    for (const { expr, iconColor } of board.annotations.list) {
      for (const { values } of await prometheus.range(filled(expr, RATE_INTERVAL), start, end, 5)) {
        marks.push({ color: iconColor, time: values[0][0] });
      }
    }
    const file = `${OUT}${board.name}.html`;
    const { html, height } = page(board, panels, marks, start, end);
    writeFileSync(file, html);
    const shot = [`--screenshot=${OUT}${board.name}.png`, `--window-size=1920,${height}`];
    const flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'];
    await promisify(execFile)(chromium, [...flags, ...shot, `file://${file}`]);
    rmSync(file);
    console.log(`${OUT}${board.name}.png`);
  }
}
