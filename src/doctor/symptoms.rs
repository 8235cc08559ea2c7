//! Complaints of users, explained from everything that was seen: no notifications, too many, data
//! that does not refresh, news of another event.

use std::{io, time::Duration};

use serde_json::Value;
use uuid::Uuid;

use super::{
    context::Context,
    database::{Database, ago},
    gateway::Gateway,
    report::{Check, Report, Seen, Status, said},
};
use crate::db::{self, deployed::TRIGGERS};

/// The steps that every notification passes: the first that has failed is the reason.
const PATH: [Check; 14] = [
    Check::DatabaseReachable,
    Check::DatabasePrimary,
    Check::NotifyQueue,
    Check::TriggerCoverage,
    Check::DryRunVotes,
    Check::DryRunBids,
    Check::DryRunMedia,
    Check::DryRunArt,
    Check::ListenReachable,
    Check::ListenArrives,
    Check::GatewayLink,
    Check::WebsocketUpgrade,
    Check::ClientJoin,
    Check::EndToEnd,
];
/// A message that the gateway has not received for longer is lost: a canary would have shown it.
/// Seconds.
const LATE: f64 = 30.0;
/// Most written rows of a table of which no notification tells without a warning: some are rolled
/// back, those of the doctor's own dry run among them.
const UNTOLD_MAX: f64 = 5.0;
/// Debounce time of production pages: each message restarts the wait.
const CLIENT_WAIT: Duration = Duration::from_millis(2500);
/// Largest part of all sockets that may be suspected of being deaf without a warning.
const DEAF_PART: f64 = 0.1;

/// Explains the complaints.
pub(super) async fn examine(
    context: &Context,
    report: &mut Report<'_>,
    database: &mut Database,
    gateway: &Gateway,
) -> io::Result<()> {
    let seen = none(report, database, gateway);
    report.note(Check::NoNotifications, seen)?;
    let doubles = database
        .query(async |session| db::doctor::doubles(session).await)
        .await
        .unwrap_or_default();
    let seen = too_many(context, database, gateway, &doubles);
    report.note(Check::TooManyNotifications, seen)?;
    report.note(Check::NotRefreshing, not_refreshing(context, gateway))?;
    report.note(Check::WrongEvent, wrong_event(report, database, gateway))
}

fn none(report: &Report<'_>, database: &Database, gateway: &Gateway) -> Seen {
    if let Some(cause) = PATH.iter().find(|check| report.status(**check) == Status::Failed) {
        return Seen::failed(
            format!("nothing gets past {}: {}", cause.name(), report.saw(*cause)),
            format!("mend {} first", cause.name()),
        );
    }
    let count = |name, table: &str| gateway.sum(name, &[("table", table)]).unwrap_or(0.0);
    let silent: Vec<_> = TRIGGERS
        .iter()
        // A payment notifies at its end alone.
        .filter(|trigger| trigger.table != "payment_processing")
        .map(|trigger| {
            let written = count("tidegate_database_writes_total", trigger.table);
            (trigger.table, written, count("tidegate_database_history_rows_total", trigger.table))
        })
        .filter(|(_, written, told)| *written > UNTOLD_MAX && *told <= 0.0)
        .map(|(table, written, _)| format!("{table} ({written} rows written)"))
        .collect();
    if !silent.is_empty() {
        return Seen::warning(
            format!("since the gateway started, no notification tells of {}", silent.join(", ")),
            "see trigger-failures; writes that were rolled back, and rows without an event, tell nobody; Postgres counts late, so if the gateway has just started, look again in a minute",
        );
    }
    let heard =
        gateway.sum("tidegate_relay_last_notification_timestamp_seconds", &[]).unwrap_or(0.0);
    let newest = database.kept.as_ref().and_then(|kept| kept.newest);
    let started = gateway.sum("process_start_time_seconds", &[]);
    let now = crate::clock::unix_seconds();
    let heard_ago = (heard > 0.0).then_some(now - heard);
    match (newest, gateway.is_open) {
        (Some(newest), true)
            if newest > LATE
                && heard_ago.is_none_or(|ago| ago > newest + LATE)
                && started.is_some_and(|started| now - started > newest + LATE) =>
        {
            Seen::failed(
                format!(
                    "the last message was written {} ago, and the gateway has not heard of it",
                    ago(newest)
                ),
                "see gateway-link; TIDEGATE_NOTIFY_DATABASE_URL and TIDEGATE_DATABASE_URL must be one database",
            )
        }
        (Some(newest), true) => Seen::ok(format!(
            "the last message was written {} ago; the gateway last heard one {}",
            ago(newest),
            heard_ago.map_or("never".to_owned(), |seconds| format!("{} ago", ago(seconds)))
        )),
        (None, true) if database.kept.is_some() => {
            Seen::ok("nothing stands in the way, and nothing has been written yet")
        }
        (_, _) => Seen::skipped("the history or the gateway cannot be looked at"),
    }
}

fn too_many(context: &Context, database: &Database, gateway: &Gateway, doubles: &[String]) -> Seen {
    let plain: Vec<_> = context
        .config
        .topic
        .iter()
        .filter(|rule| rule.event.as_deref() == Some("cache_invalidation"))
        .filter(|rule| rule.merge.as_ref().is_none_or(|merge| merge.window.is_zero()))
        .map(|rule| &*rule.name)
        .collect();
    if !plain.is_empty() {
        return Seen::warning(
            format!("topic rule {} sends every notification as it comes", plain.join(", ")),
            "give it merge = { window = \"3s\", carry = \"5s\", union = \"endpoints\" }",
        );
    }
    if !doubles.is_empty() {
        return Seen::warning(
            format!("other triggers notify the same channels, too: {}", said(&doubles.join(", "))),
            "drop those triggers: each change is told twice, and what has no id is not in the history",
        );
    }
    let sockets = gateway.sum("tidegate_connections", &[]).unwrap_or(0.0);
    let viewers = |event: &Value| event["viewers"].as_f64().unwrap_or(0.0);
    let crowded = gateway.events.iter().find(|event| viewers(event) > sockets && sockets > 0.0);
    if let Some(event) = crowded {
        return Seen::warning(
            format!(
                "{} has {} channels on {sockets} sockets: pages subscribe to one event more than once",
                said(event["eid"].as_str().unwrap_or_default()),
                viewers(event)
            ),
            "in the page: one subscription for each event, and removeChannel when a component unmounts",
        );
    }
    if !gateway.is_open && database.kept.is_none() {
        return Seen::skipped("neither the history nor the gateway can be looked at");
    }
    let busiest = match database.kept.as_ref().map(|kept| kept.busiest.as_ref()) {
        Some(Some((eid, count))) => format!("at most {count} messages a minute, of {}", said(eid)),
        Some(None) => "no message within an hour".to_owned(),
        None => "the history cannot be looked at".to_owned(),
    };
    let merged = gateway.sum("tidegate_invalidations_merged_total", &[]);
    let merged =
        merged.map_or(String::new(), |count| format!(", and {count} have left as part of another"));
    Seen::ok(format!("{busiest}; each event's viewers get one message per window{merged}"))
}

fn not_refreshing(context: &Context, gateway: &Gateway) -> Seen {
    let quick = context.config.topic.iter().find(|rule| {
        let window = rule.merge.as_ref().map(|merge| merge.window);
        window.is_some_and(|window| !window.is_zero() && window < CLIENT_WAIT)
    });
    if let Some(rule) = quick {
        return Seen::warning(
            format!(
                "topic rule {}: its window is shorter than pages wait, so they forget messages",
                rule.name
            ),
            "give it a window of 3s",
        );
    }
    if !gateway.is_open {
        return Seen::skipped("the operators' address does not answer: see gateway-admin");
    }
    let muted: Vec<_> = gateway
        .events
        .iter()
        .filter(|event| !event["muted_for"].is_null())
        .filter_map(|event| event["eid"].as_str())
        .take(5)
        .collect();
    if let Some(first) = muted.first() {
        return Seen::warning(
            format!("muted: {}", said(&muted.join(", "))),
            format!("tidegate mute {} --for 0s", said(first)),
        );
    }
    let sockets = gateway.sum("tidegate_connections", &[]).unwrap_or(0.0);
    let deaf = gateway.sum("tidegate_deaf_suspects", &[]).unwrap_or(0.0);
    if deaf > 1.0 && deaf > sockets * DEAF_PART {
        return Seen::warning(
            format!(
                "{deaf} of {sockets} sockets may be deaf: pages that lost their connection and did not join again"
            ),
            "upgrade supabase-js to 2.54 or newer; meanwhile the gateway heals them",
        );
    }
    let dropped = gateway.sum("tidegate_endpoints_dropped_total", &[]).unwrap_or(0.0);
    if dropped > 0.0 {
        return Seen::warning(
            format!("{dropped} endpoints were dropped: null, empty or too long"),
            "mend what notifies: each endpoint is a text such as /live/event/AB3028",
        );
    }
    Seen::ok(
        "what is sent can be used: nothing muted, nobody deaf, endpoints as pages know them; what a page \
         makes of it (onInvalidation, a cache of /live/, errors in its console) only the page shows",
    )
}

fn wrong_event(report: &Report<'_>, database: &Database, gateway: &Gateway) -> Seen {
    let foreign = database.kept.as_ref().and_then(|kept| kept.foreign.as_ref());
    if let Some((eid, endpoint)) = foreign {
        return Seen::failed(
            format!("a message of {} names {}", said(eid), said(endpoint)),
            "mend what writes it, see function-drift; run `tidegate migrate`",
        );
    }
    let joined: Vec<_> = gateway
        .events
        .iter()
        .filter(|event| event["viewers"].as_u64().is_some_and(|viewers| viewers > 0))
        .filter_map(|event| Some((event["eid"].as_str()?, event["never_published"] == true)))
        .collect();
    let list = |events: Vec<&str>| said(&events.into_iter().take(3).collect::<Vec<_>>().join(", "));
    let by_uuid: Vec<_> = joined
        .iter()
        .filter(|(eid, _)| Uuid::try_parse(eid).is_ok())
        .map(|(eid, _)| *eid)
        .collect();
    if !by_uuid.is_empty() {
        return Seen::warning(
            format!(
                "pages have joined events by their UUID, which hear nothing: {}",
                list(by_uuid)
            ),
            "in the page: subscribe by the event's eid, such as AB3028",
        );
    }
    let in_vain: Vec<_> =
        joined.iter().filter(|(_, is_in_vain)| *is_in_vain).map(|(eid, _)| *eid).collect();
    if !in_vain.is_empty() {
        return Seen::warning(
            format!("pages have joined what the database knows no event of: {}", list(in_vain)),
            "in the page: subscribe by the event's eid, such as AB3028",
        );
    }
    let looked = match (&database.kept, gateway.is_open) {
        (Some(_), true) => {
            "no message of the last hour names another event's endpoint, and each event that is joined is one of the database's"
        }
        (Some(_), false) => "no message of the last hour names another event's endpoint",
        (None, true) => "no event is joined by its UUID",
        (None, false) => {
            return Seen::skipped("neither the history nor the gateway can be looked at");
        }
    };
    let tried = match report.status(Check::DryRunVotes) {
        Status::Ok => "; nor does the vote that was tried",
        Status::Warning | Status::Failed | Status::Skipped => "",
    };
    Seen::ok(format!("{looked}{tried}"))
}
