//! The admin routes of events: which of them live, what they were sent, and what an operator makes
//! of one: everything is fetched again, or nothing is sent for a while.
//!
//! Invariants: an answer has a bound in entries, a request one in bytes and in time; what an
//! operator asks for loses no invalidation. A time is RFC 3339 in UTC with milliseconds, a duration
//! a number of seconds.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper::StatusCode;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    task::yield_now,
    time::{Instant, timeout},
};

use super::{body::body, shared::Shared};
use crate::{
    db::history,
    http::{Refused, Request, Response, content, fields, object},
    invalidation::{
        CatchUpCause, Coverage, Delivery, ENDPOINT_BYTES_MAX, Endpoints, Feed, Heard, MINUTE,
        Notice, NoticeCount, Summary,
    },
};

/// Events of one answer, at most and unless asked otherwise.
const EVENTS_MAX: usize = 10_000;
const EVENTS: usize = 1_000;
/// Entries of one history, at most and unless asked otherwise; the memory has fewer.
const ENTRIES_MAX: usize = 1_000;
const ENTRIES: usize = 100;
/// How far back a history goes, at most and unless asked otherwise.
const MINUTES_MAX: usize = 24 * 60;
const MINUTES: usize = 60;
/// Longest mute: as long as an event is remembered.
const MUTE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Events, or entries of a history, between two yields.
const ROWS_PER_YIELD: usize = 128;

/// Answers `GET /events?limit=`: the live events, those with the most viewers first.
///
/// `{"live":1,"events":[{"eid":"AB3028","rule":"cache","viewers":12,"last_notification":"…","last_delivery":"…",
/// "merged":4,"pending":0,"endpoints":9,"catch_ups":31,"heals":0,"coverage":{"since":"…","seconds":61.5},
/// "history":"trusted","never_published":false,"muted_for":null}]}`
///
/// # Errors
/// [`Refused`] for a bad parameter.
pub(super) async fn list(shared: &Shared, request: &Request) -> Result<Response, Refused> {
    let mut parameters = parameters(request, &["limit"])?;
    let limit = number(&mut parameters, "limit", EVENTS, 1..=EVENTS_MAX)?;
    let mut live = look(shared).await;
    live.retain(|event| event.is_live);
    live.sort_by(|a, b| b.viewers.cmp(&a.viewers).then_with(|| a.feed.eid().cmp(b.feed.eid())));
    let count = live.len();
    let rows = rows(live.iter().take(limit), |event| event.row(shared)).await;
    Ok(json_text(format!("{{\"live\":{count},\"events\":{rows}}}")))
}

/// Answers `GET /events/{eid}/history?minutes=&limit=`: what this gateway has sent, the newest first.
///
/// `{"eid":"AB3028","messages":[{"rule":"cache","at":"…","why":"window","cause":null,"endpoints":["…"],
/// "endpoint_count":1,"merged":2,"from":[{"id":7,"type":"vote_cast"}],"deliveries":12,"repeats":0}],
/// "single_clients":[{"rule":"cache","minute":"…","why":"catch_up","cause":"fresh","method":"exact","clients":3}]}`
///
/// # Errors
/// [`Refused`] for a bad parameter, or an event that is not known here.
pub(super) async fn history(
    shared: &Shared,
    request: &Request,
    eid: &str,
) -> Result<Response, Refused> {
    let mut parameters = parameters(request, &["minutes", "limit"])?;
    let minutes = number(&mut parameters, "minutes", MINUTES, 1..=MINUTES_MAX)?;
    let limit = number(&mut parameters, "limit", ENTRIES, 1..=ENTRIES_MAX)?;
    let eid = event_id(shared, eid)?;
    let events = shared.feeds.named(&eid);
    if events.is_empty() {
        let text = "this gateway does not know the event: nobody has joined it for a day";
        return Err(Refused(StatusCode::NOT_FOUND, text.into()));
    }
    let since = SystemTime::now() - Duration::from_secs(minutes as u64 * 60);
    let (mut messages, mut single_clients) = (Vec::new(), Vec::new());
    for event in &events {
        let log = event.log().into_iter().filter(|sent| sent.at >= since);
        messages.extend(log.map(|sent| (event, sent)));
        // A minute counts as long as it reaches into the time asked for.
        let told = event.notices().into_iter().filter(|count| count.minute + MINUTE > since);
        single_clients.extend(told.map(|count| (event, count)));
    }
    messages.sort_by_key(|(_, sent)| std::cmp::Reverse(sent.at));
    single_clients.sort_by_key(|(_, count)| std::cmp::Reverse(count.minute));
    let messages = rows(messages.iter().take(limit), |(event, sent)| message(event, sent)).await;
    let single_clients = single_clients.iter().take(limit);
    let single_clients = rows(single_clients, |(event, count)| told(event, count)).await;
    Ok(json_text(format!(
        "{{\"eid\":{},\"messages\":{messages},\"single_clients\":{single_clients}}}",
        Value::from(eid),
    )))
}

/// Answers `POST /events/{eid}/invalidate`, with `{"endpoint":"/live/…"}` or without a body: through the
/// database, which reaches every gateway and the history, else to the viewers of this one.
///
/// # Errors
/// [`Refused`] for what is not an event's id or not an endpoint, or if there is no room for the
/// event.
pub(super) async fn invalidate(
    shared: &Shared,
    request: Request,
    eid: &str,
) -> Result<Response, Refused> {
    parameters(&request, &[])?;
    let eid = event_id(shared, eid)?;
    let endpoint = endpoint(shared, request).await?;
    let failure = match through_database(shared, &eid, endpoint.as_deref()).await {
        Some(Ok(())) => {
            tracing::info!(eid, endpoint, "an operator has invalidated through the database");
            let what = endpoint.as_deref().unwrap_or("the event and its media");
            let muted_for = muted_for(&shared.feeds.named(&eid));
            return Ok(accepted(&json!({
                "eid": eid, "endpoint": endpoint, "via": "database", "error": null,
                "muted_for": muted_for,
                "message": format!("every gateway tells its viewers: {what}"),
            })));
        }
        Some(Err(failure)) => Some(failure),
        None => None,
    };
    let events = known_or_new(shared, &eid)?;
    let missed = endpoint.as_deref().map(|text| Endpoints::from([text.into()]));
    let mut viewers = 0;
    for event in &events {
        viewers += viewer_count(shared, event);
        shared.feeds.offer_gap(event, CatchUpCause::Operator, missed.as_ref(), Instant::now());
    }
    tracing::info!(eid, endpoint, viewers, "an operator has invalidated for this gateway");
    let what = endpoint.as_deref().unwrap_or("everything of the event");
    let why = match &failure {
        Some(failure) => format!("the database failed ({failure})"),
        None => "there is no database".to_owned(),
    };
    Ok(accepted(&json!({
        "eid": eid, "endpoint": endpoint, "via": "gateway", "error": failure,
        "viewers": viewers, "muted_for": muted_for(&events),
        "message": format!("{why}: this gateway alone tells its viewers: {what}"),
    })))
}

/// Answers `POST /events/{eid}/mute?for=10m`: holds back and unites what the event is sent; `0s`
/// ends it.
///
/// # Errors
/// [`Refused`] for what is not an event's id or not a duration, or if there is no room for the
/// event.
pub(super) fn mute(shared: &Shared, request: &Request, eid: &str) -> Result<Response, Refused> {
    let mut parameters = parameters(request, &["for"])?;
    let eid = event_id(shared, eid)?;
    let length = parameters
        .remove("for")
        .and_then(|text| humantime::parse_duration(&text).ok())
        .filter(|length| *length <= MUTE_MAX)
        .ok_or(Refused::bad("for: expected a duration from 0s to 24h, such as 10m"))?;
    let until = (!length.is_zero()).then(|| Instant::now() + length);
    let events = known_or_new(shared, &eid)?;
    for event in &events {
        shared.feeds.mute(event, until);
    }
    tracing::info!(eid, seconds = length.as_secs(), "an operator has muted the event");
    let message = match until {
        Some(_) => format!(
            "invalidations are held back for {}, then leave in one message",
            humantime::format_duration(length)
        ),
        None => "invalidations are sent".to_owned(),
    };
    let answer = json!({ "eid": eid, "muted_for": muted_for(&events), "message": message });
    Ok(object(StatusCode::OK, &answer))
}

/// An event as operators see it.
pub(super) struct Overview {
    pub(super) feed: Arc<Feed>,
    pub(super) summary: Summary,
    pub(super) viewers: usize,
    /// Whether it has viewers, a LISTEN, something to send or a mute.
    pub(super) is_live: bool,
    /// Whether its viewers have joined a topic that nobody writes to, as far as is known: nothing was
    /// ever published for it and the database, if there is one and it was asked, does not know it.
    pub(super) is_in_vain: bool,
}

/// Returns every event that is remembered.
pub(super) async fn look(shared: &Shared) -> Vec<Overview> {
    let feeds = shared.feeds.all();
    let mut events = Vec::with_capacity(feeds.len());
    for (number, feed) in feeds.into_iter().enumerate() {
        events.push(Overview::of(shared, feed));
        if number % ROWS_PER_YIELD == ROWS_PER_YIELD - 1 {
            yield_now().await;
        }
    }
    events
}

impl Overview {
    fn of(shared: &Shared, feed: Arc<Feed>) -> Self {
        let (summary, viewers) = (feed.summary(), viewer_count(shared, &feed));
        let listens = shared.listens.as_ref();
        let is_listened = listens.is_some_and(|listens| listens.is_active(feed.channel()));
        let is_live =
            viewers > 0 || summary.pending > 0 || summary.muted_for.is_some() || is_listened;
        // The database is asked what it knows before the LISTEN counts as active.
        let is_asked = is_listened || listens.is_none();
        let is_published = summary.last_notification.is_some() || summary.is_known;
        let is_in_vain = viewers > 0 && is_asked && !is_published;
        Self { feed, summary, viewers, is_live, is_in_vain }
    }

    fn row(&self, shared: &Shared) -> Value {
        let Self { feed, summary, viewers, is_in_vain, .. } = self;
        let covered_since = match &shared.listens {
            Some(listens) => listens.covered_since(feed.channel()),
            // Without a database nothing else is to be heard.
            None => Some(shared.feeds.started()),
        };
        let coverage = covered_since.map(|since| {
            let lasts = since.elapsed();
            json!({ "since": time(SystemTime::now() - lasts), "seconds": seconds(lasts) })
        });
        let history = match summary.heard {
            Heard::OnlyWithId => "trusted",
            Heard::SomeWithoutId => "untrusted",
            Heard::Nothing => "unknown",
        };
        json!({
            "eid": feed.eid(), "rule": feed.rule_name(), "viewers": viewers,
            "last_notification": summary.last_notification.map(time),
            "last_delivery": summary.last_delivery.map(time),
            "merged": summary.merged, "pending": summary.pending, "endpoints": summary.endpoints,
            "catch_ups": summary.catch_ups, "heals": summary.heals,
            "coverage": coverage, "history": history, "never_published": is_in_vain,
            "muted_for": summary.muted_for.map(seconds),
        })
    }
}

fn message(event: &Feed, sent: &Delivery) -> Value {
    json!({
        "rule": event.rule_name(), "at": time(sent.at), "why": sent.reason.label(),
        "cause": sent.cause.map(CatchUpCause::label),
        "endpoints": sent.endpoints.iter().collect::<Vec<_>>(), "endpoint_count": sent.endpoint_count,
        "merged": sent.merged, "from": sent.sources,
        "deliveries": sent.deliveries, "repeats": sent.repeats,
    })
}

fn told(event: &Feed, count: &NoticeCount) -> Value {
    let (why, cause, method) = match count.notice {
        Notice::CatchUp(cause, method) => ("catch_up", Some(cause), Some(method)),
        Notice::Heal => ("heal", None, None),
    };
    json!({
        "rule": event.rule_name(), "minute": time(count.minute), "why": why,
        "cause": cause.map(CatchUpCause::label), "method": method.map(Coverage::label),
        "clients": count.clients,
    })
}

/// A JSON array of one row for each of these, written in pieces, so that others get their turn.
async fn rows<T>(all: impl Iterator<Item = T>, row: impl Fn(T) -> Value) -> String {
    let mut text = "[".to_owned();
    for (number, it) in all.enumerate() {
        if number > 0 {
            text.push(',');
        }
        text.push_str(&row(it).to_string());
        if number % ROWS_PER_YIELD == ROWS_PER_YIELD - 1 {
            yield_now().await;
        }
    }
    text.push(']');
    text
}

/// Subscribers under all spellings.
fn viewer_count(shared: &Shared, event: &Feed) -> usize {
    event.topics().iter().map(|topic| shared.hub.subscriber_count(topic)).sum()
}

/// The longest, in seconds.
fn muted_for(events: &[Arc<Feed>]) -> Option<f64> {
    events.iter().filter_map(|event| event.summary().muted_for).max().map(seconds)
}

/// The events of this id; where nobody has joined yet, one for each rule that has it.
fn known_or_new(shared: &Shared, eid: &str) -> Result<Vec<Arc<Feed>>, Refused> {
    for (rule, captures) in shared.access.rules().merged(eid) {
        if shared.feeds.of(rule, &captures).is_none() {
            let text = "no room for another event: see relay.listens_max";
            return Err(Refused(StatusCode::SERVICE_UNAVAILABLE, text.into()));
        }
    }
    Ok(shared.feeds.named(eid))
}

/// What became of it, if there is a database.
async fn through_database(
    shared: &Shared,
    eid: &str,
    endpoint: Option<&str>,
) -> Option<Result<(), String>> {
    let invalidate = history::invalidate(shared.pool.as_ref()?, eid, endpoint);
    let failure = match timeout(shared.database_timeout, invalidate).await {
        Ok(Ok(_payload)) => return Some(Ok(())),
        // The database's own words, without the place in its source.
        Ok(Err(error)) => match error.as_database_error() {
            Some(refused) => refused.message().to_owned(),
            None => error.to_string(),
        },
        Err(_elapsed) => "it does not answer".to_owned(),
    };
    tracing::warn!(eid, error = failure, "nothing invalidated through the database");
    Some(Err(failure))
}

/// The endpoint that the body names, if it does.
async fn endpoint(shared: &Shared, request: Request) -> Result<Option<Box<str>>, Refused> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        endpoint: Option<Box<str>>,
    }
    let body = body(shared, request).await?;
    if body.is_empty() {
        return Ok(None);
    }
    let Some(Body { endpoint }) = fields(&body) else {
        return Err(Refused::bad("the body: expected nothing or {\"endpoint\":\"/live/…\"}"));
    };
    let is_endpoint = |text: &str| {
        (1..=ENDPOINT_BYTES_MAX).contains(&text.len()) && !text.contains(char::is_control)
    };
    if endpoint.as_deref().is_some_and(|text| !is_endpoint(text)) {
        return Err(Refused::bad(format!(
            "endpoint: expected 1 to {ENDPOINT_BYTES_MAX} bytes without control characters"
        )));
    }
    Ok(endpoint)
}

/// The path's part as the id of an event that some rule merges. A rule that captures more than the
/// id has no event by the id alone, but those that are known.
fn event_id(shared: &Shared, part: &str) -> Result<String, Refused> {
    let is_taken = |eid: &String| {
        shared.access.rules().merged(eid).next().is_some() || !shared.feeds.named(eid).is_empty()
    };
    percent_decode_str(part)
        .decode_utf8()
        .ok()
        .map(Cow::into_owned)
        .filter(is_taken)
        .ok_or(Refused::bad(
            "no rule with merge takes this event id; the built-in one takes 1 to 50 of A-Z a-z 0-9 -",
        ))
}

/// The query's values, by name; each of these names may be there once, and no other.
fn parameters(
    request: &Request,
    names: &[&'static str],
) -> Result<BTreeMap<&'static str, String>, Refused> {
    let mut values = BTreeMap::new();
    for (name, value) in
        form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
    {
        let Some(known) = names.iter().find(|known| **known == name) else {
            let text = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(Refused::bad(format!("unknown parameter: expected {text}")));
        };
        if values.insert(*known, value.into_owned()).is_some() {
            return Err(Refused::bad(format!("{known}: given twice")));
        }
    }
    Ok(values)
}

fn number(
    parameters: &mut BTreeMap<&'static str, String>,
    name: &'static str,
    default: usize,
    range: RangeInclusive<usize>,
) -> Result<usize, Refused> {
    let Some(text) = parameters.remove(name) else { return Ok(default) };
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| is_plain && range.contains(number));
    number.ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        Refused::bad(format!("{name}: expected a number from {least} to {most}"))
    })
}

fn accepted(body: &Value) -> Response {
    object(StatusCode::ACCEPTED, body)
}

fn json_text(text: String) -> Response {
    content(StatusCode::OK, "application/json; charset=utf-8", text)
}

/// `2026-11-22T15:50:00.123Z`
fn time(at: SystemTime) -> String {
    // The library knows no time before 1970.
    humantime::format_rfc3339_millis(at.max(UNIX_EPOCH)).to_string()
}

/// To the millisecond.
pub(super) fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
