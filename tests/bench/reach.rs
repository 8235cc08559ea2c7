//! The numbers of `docs/contribute/performance.md`, measured in one run on this machine:
//! `make bench`.
//!
//! With `--short` each measurement is small and takes a second, so that none of them rots.

#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure ends")]

mod flood;
mod support;
mod writes;

use std::process::Stdio;

use serde_json::Value;
use tidegate::demo::cluster::Cluster;
use tokio::process::Command;

use self::support::{Gateway, TIDEGATE, token};

/// All viewers of a measurement have one address, come at once, and join topics without a rule.
const UNLIMITED: [(&str, &str); 6] = [
    ("TIDEGATE_LIMITS__CONNECTIONS_PER_ADDRESS_MAX", "100000"),
    ("TIDEGATE_LIMITS__HANDSHAKES_PER_ADDRESS_MAX", "0"),
    ("TIDEGATE_LIMITS__JOINS_PER_SECOND_MAX", "0"),
    ("TIDEGATE_LIMITS__BROADCASTS_PER_SECOND_MAX", "0"),
    ("TIDEGATE_LIMITS__BROADCAST_BYTES_PER_SECOND_MAX", "0"),
    ("TIDEGATE_LIMITS__SERVER_BROADCASTS_PER_SECOND_MAX", "0"),
];

impl Gateway {
    /// One run of `tidegate bench` against it.
    async fn measure(&self, arguments: &str) -> Value {
        let (report, is_complete) = self.try_measure(arguments).await;
        assert!(is_complete, "tidegate bench {arguments} failed");
        report
    }

    /// One run of `tidegate bench` against it, and whether nothing was lost.
    async fn try_measure(&self, arguments: &str) -> (Value, bool) {
        let url = format!("ws://{}/realtime/v1", self.addresses[0]);
        let output = Command::new(TIDEGATE)
            .args(["bench", "--json", "--url", &url, "--apikey", &token("anon")])
            .args(["--publisher-apikey", &token("service_role")])
            .args(["--pid", &self.pid().to_string()])
            .args(arguments.split_whitespace())
            .stderr(Stdio::inherit())
            .output()
            .await
            .unwrap();
        (serde_json::from_slice(&output.stdout).unwrap(), output.status.success())
    }
}

fn row(what: &str, measured: &str, aim: &str) {
    support::row(&[what, measured, aim]);
}

fn number(report: &Value, path: &str) -> f64 {
    let value = report.pointer(path).unwrap_or_else(|| panic!("no {path} in {report}"));
    value.as_f64().unwrap()
}

#[tokio::main]
async fn main() {
    let short = std::env::args().any(|argument| argument == "--short");
    let (idle, fan_out, viewers, seconds) =
        if short { (50, 50, 50, 1) } else { (10_000, 5_000, 1_000, 10) };

    println!("| what | measured | aim |\n|---|---|---|");
    let report = Gateway::start("", &UNLIMITED)
        .await
        .measure(&format!("--sockets {idle} --in-flight 100 --seconds 0"))
        .await;
    let (kib, joins, cpu) = (
        number(&report, "/server/rss_kib_per_socket"),
        number(&report, "/opening/joins_per_second"),
        number(&report, "/server/cpu_us_per_join"),
    );
    row(
        &format!("resident memory per idle joined socket, {idle} sockets"),
        &format!("{kib:.1} KiB"),
        "≤ 8 KiB",
    );
    row(
        &format!("joins, each with its handshake, {idle} sockets"),
        &format!("{joins:.0}/s, {cpu:.0} µs of server CPU each"),
        "",
    );

    for (what, rate, aim) in
        [("single messages", "--rate 4", "≤ 1.5"), ("bursts of 20", "--rate 1 --burst 20", "≤ 0.3")]
    {
        let arguments = format!("--sockets {fan_out} {rate} --seconds {seconds} --baseline");
        let report = Gateway::start("", &UNLIMITED).await.measure(&arguments).await;
        row(
            &format!("server CPU per delivery ÷ a bare write, {what} to {fan_out} sockets"),
            &format!(
                "{:.2} ({:.1} µs ÷ {:.1} µs)",
                number(&report, "/bare/server_to_bare_ratio"),
                number(&report, "/server/cpu_us_per_delivery"),
                number(&report, "/bare/cpu_us_per_write"),
            ),
            aim,
        );
    }

    let cluster = Cluster::start().await.unwrap();
    let database = cluster.url("postgres");
    let gateway = Gateway::start(&database, &UNLIMITED).await;
    // A topic whose messages are never merged, so that each of them is measured.
    let report = gateway
        .measure(&format!(
            "--sockets {viewers} --rate 10 --seconds {seconds} --publish sql \
             --database-url {database} --topic auction_winner_{{n}}"
        ))
        .await;
    row(
        &format!("commit → client, {viewers} viewers, 10 notifications/s"),
        &format!(
            "p50 {:.1} ms, p99 {:.1} ms",
            number(&report, "/publishing/latency_us/p50") / 1000.0,
            number(&report, "/publishing/latency_us/p99") / 1000.0,
        ),
        "p50 < 10 ms, p99 < 20 ms",
    );
    drop(gateway);
    flood::measure(&Gateway::start("", &[]).await, short).await;
    write_costs(&cluster, short).await;
    drop(cluster);
    let (turns, votes) = if short { (2, 3) } else { (20, 100) };
    let synced = Cluster::start_synced().await.unwrap();
    let rates = writes::at_once(&synced, turns, votes).await;
    row(
        &format!("votes of {} sessions at once, disk waited for", writes::SESSIONS),
        &format!("{:.0}/s (without triggers {:.0}/s)", rates.with, rates.without),
        "",
    );
}

/// A row for each table and for each statement of many rows.
async fn write_costs(cluster: &Cluster, short: bool) {
    let (turns, inserts) = if short { (4, 10) } else { (80, 100) };
    for cost in writes::measure(cluster, turns, inserts).await {
        row(
            &format!(
                "what the triggers add to an insert into {}, medians of {}",
                cost.table,
                turns / 2 * inserts
            ),
            &format!(
                "{:.0} µs ({:.0} → {:.0} µs)",
                (cost.with.as_secs_f64() - cost.without.as_secs_f64()) * 1e6,
                cost.without.as_secs_f64() * 1e6,
                cost.with.as_secs_f64() * 1e6,
            ),
            "",
        );
    }
    let (rows, turns) = if short { (1_000, 1) } else { (20_008, 5) };
    for mass in writes::mass(cluster, rows, turns).await {
        let per_row = |time: f64| time * 1e6 / rows as f64;
        let (with, without) = (mass.with.as_secs_f64(), mass.without.as_secs_f64());
        row(
            &format!("what the triggers add to each of {rows} rows in one UPDATE, {}", mass.what),
            &format!("{:.1} µs ({without:.2} → {with:.2} s in all)", per_row(with - without)),
            "≤ 20 µs",
        );
    }
}
