// The boards of grafana/dashboards, as Grafana would ask Prometheus for what is on them.

import { readFileSync, readdirSync } from 'node:fs';

const FOLDER = new URL('../../../grafana/dashboards/', import.meta.url);

/** Every board, by its file's name: `{ name, ...json }`. */
export function boards() {
  return readdirSync(FOLDER)
    .filter((file) => file.endsWith('.json'))
    .sort()
    .map((file) => {
      const json = JSON.parse(readFileSync(new URL(file, FOLDER), 'utf8'));
      return { ...json, name: file.slice(0, -'.json'.length) };
    });
}

/** An expression with its variables in place: everything chosen, and this window for rates. */
export function filled(expr, rateInterval) {
  return expr
    .replaceAll('$__rate_interval', rateInterval)
    .replaceAll(/\$(job|instance|eid)\b/g, '.+');
}
