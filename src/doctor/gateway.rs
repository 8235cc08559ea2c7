//! The gateway: its operators' port, its link, its clock, its keys, and the token to join with.

use std::{error::Error, io, time::Duration};

use hyper::{Response, StatusCode, body::Bytes, header};
use serde_json::Value;
use strum::VariantArray;

use super::{
    context::{Context, topic},
    database::{Database, ago, skew},
    report::{Check, Report, Seen, said},
};
use crate::{
    access::{AccessRequest, Action, Rules},
    admin::{CANARIES_MISSED, client::CommandError},
    auth::{Authenticator, KeySource, SECRET_BYTES_MIN, Token, TokenError, Unusable},
    clock::{unix_now, unix_seconds},
    protocol::{payload::OPAQUE_KEY_PREFIX, topic::Privacy},
};

/// Most bytes of one answer: the metrics of twenty events, or a thousand live events.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Uncertainty of the `Date` header, which has whole seconds. Seconds.
const DATE_UNCERTAINTY: f64 = 1.0;
/// A token that was made later than this after now was made by another clock. Seconds.
const FUTURE_MAX: i64 = 5;

/// What the operators' port has shown.
#[derive(Default)]
pub(super) struct Gateway {
    /// Whether the operators' port answers.
    pub(super) is_open: bool,
    metrics: String,
    /// The live events, as `/events` lists them.
    pub(super) events: Vec<Value>,
}

impl Gateway {
    /// Returns the sum of a metric's series with these labels; `None` if there is none.
    pub(super) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let series = self.series(name);
        let has = |found: &str, (name, value): &(&str, &str)| {
            found.contains(&format!("{name}=\"{value}\""))
        };
        let values = series.filter(|(found, _)| labels.iter().all(|label| has(found, label)));
        values.map(|(_, value)| value).reduce(|a, b| a + b)
    }

    /// Returns the labels of each series of a metric, as they are written, and its value.
    pub(super) fn series<'a>(&'a self, name: &str) -> impl Iterator<Item = (&'a str, f64)> {
        let name = name.to_owned();
        self.metrics.lines().filter_map(move |line| {
            let (series, value) = line.strip_prefix(&*name)?.rsplit_once(' ')?;
            let is_it = series.is_empty() || series.starts_with('{');
            is_it.then_some((series, value.parse().ok()?))
        })
    }

    /// Returns the value of a label in the labels of a series.
    pub(super) fn label<'a>(labels: &'a str, name: &str) -> &'a str {
        let value = labels.split_once(&format!("{name}=\"")).map(|(_, rest)| rest);
        value.and_then(|rest| rest.split('"').next()).unwrap_or_default()
    }
}

/// Examines the gateway.
pub(super) async fn examine(
    context: &Context,
    report: &mut Report<'_>,
    database: &Database,
) -> io::Result<Gateway> {
    let mut gateway = Gateway::default();
    let asked = unix_seconds();
    match context.admin.get("/readyz", ANSWER_BYTES_MAX).await {
        Ok(answer) => {
            let answered = unix_seconds();
            gateway.is_open = true;
            gateway.metrics = text(context, "/metrics").await;
            let events = text(context, "/events").await;
            let mut events: Value = serde_json::from_str(&events).unwrap_or_default();
            gateway.events = serde_json::from_value(events["events"].take()).unwrap_or_default();
            let ready: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
            report.note(Check::GatewayAdmin, admin(context, answer.status(), &ready))?;
            report.note(Check::GatewayLink, link(context, &gateway, &ready))?;
            report.note(
                Check::GatewayClock,
                clock(&answer, f64::midpoint(asked, answered), database),
            )?;
        }
        Err(error) => {
            report.note(Check::GatewayAdmin, closed(&error))?;
            let why = "the operators' address does not answer: see gateway-admin";
            report.skip(&[Check::GatewayLink, Check::GatewayClock], why)?;
        }
    }
    let (seen, authenticator) = keys(context).await;
    report.note(Check::JwtKeys, seen)?;
    let seen = match (&authenticator, &context.token) {
        (_, None) => Seen::skipped("no --token, and no jwt_secret to make one with"),
        (None, Some(_)) => Seen::skipped("the keys cannot be used: see jwt-keys"),
        (Some(authenticator), Some(text)) => token(context, authenticator, text.expose()),
    };
    report.note(Check::Token, seen)?;
    Ok(gateway)
}

/// Reads what the gateway shows under `target`; an empty text if it does not answer with 200.
async fn text(context: &Context, target: &str) -> String {
    let answer = context.admin.get(target, ANSWER_BYTES_MAX).await;
    let body =
        answer.ok().filter(|answer| answer.status() == StatusCode::OK).map(Response::into_body);
    String::from_utf8_lossy(&body.unwrap_or_default()).into_owned()
}

fn closed(error: &CommandError) -> Seen {
    let fix = match error {
        CommandError::NoPort | CommandError::Nobody { .. } => {
            "start the gateway, run the doctor where it runs, or set TIDEGATE_ADMIN_LISTEN to where it listens"
        }
        CommandError::Token => "set TIDEGATE_ADMIN_TOKEN to the gateway's own",
        CommandError::Silent { .. }
        | CommandError::Unreadable { .. }
        | CommandError::Argument { .. }
        | CommandError::Refused { .. }
        | CommandError::OnlyHere { .. } => "set TIDEGATE_ADMIN_LISTEN to the gateway's own address",
    };
    let why = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    Seen::failed(said(&format!("{error}{why}")), fix)
}

fn admin(context: &Context, status: StatusCode, ready: &Value) -> Seen {
    let place = context.config.admin_listen;
    if ready["draining"] == true {
        return Seen::warning(
            format!("the gateway at {place} is draining: it closes its sockets and ends"),
            "wait for the one that takes its place",
        );
    }
    if ready["ready"] != true {
        return Seen::failed(
            format!("what answers at {place} with {status} is no gateway"),
            "set TIDEGATE_ADMIN_LISTEN to the gateway's own address",
        );
    }
    Seen::ok(format!("the gateway at {place} is ready"))
}

fn link(context: &Context, gateway: &Gateway, ready: &Value) -> Seen {
    let patience = (context.config.relay.canary_interval * CANARIES_MISSED).as_secs_f64();
    let has_database = !context.config.notify_url().is_empty();
    match (ready["link"].as_str(), ready["canary"].as_f64()) {
        (Some("up"), Some(age)) if age <= patience => {
            Seen::ok(format!("the link is up, and the gateway heard itself {age:.1} s ago"))
        }
        // The gateway may have started just now.
        (Some("up"), None) => Seen::warning(
            "the link is up, and the gateway has not heard itself yet",
            "ask again in 5 s; if it stays so, see listen-arrives",
        ),
        (Some("up"), Some(age)) => Seen::failed(
            format!("the link is up, and the gateway last heard itself {} ago", ago(age)),
            "see listen-arrives: TIDEGATE_NOTIFY_DATABASE_URL needs a session of its own",
        ),
        (Some("none"), _) if has_database => Seen::failed(
            "the gateway runs without a database",
            "start it with TIDEGATE_DATABASE_URL, as the doctor was",
        ),
        (Some("none"), _) => Seen::ok("the gateway runs without a database, as the settings say"),
        (link, _) => {
            let causes: Vec<_> = gateway
                .series("tidegate_relay_reconnects_total")
                .filter(|(_, count)| *count > 0.0)
                .map(|(labels, count)| format!("{} ({count})", Gateway::label(labels, "cause")))
                .collect();
            Seen::failed(
                format!(
                    "the link is {}; sessions ended by: {}",
                    said(link.unwrap_or("unknown")),
                    causes.join(", ")
                ),
                "see listen-reachable and listen-arrives, then the gateway's log",
            )
        }
    }
}

fn clock(answer: &Response<Bytes>, now: f64, database: &Database) -> Seen {
    let date = answer.headers().get(header::DATE).and_then(|date| seconds_of(date.to_str().ok()?));
    let Some(date) = date else { return Seen::skipped("its answers have no Date header") };
    // The second of the header has begun: its middle is the best guess.
    let offset = date + 0.5 - now;
    let seen = skew("the gateway's clock", offset, DATE_UNCERTAINTY);
    match database.clock {
        // Without a fix the offset is within the header's uncertainty.
        Some(theirs) if seen.fix.is_some() => Seen {
            saw: format!("{}, and {:.1} s off the database's", seen.saw, (offset - theirs).abs()),
            ..seen
        },
        Some(_) | None => seen,
    }
}

/// Parses `Sun, 06 Nov 1994 08:49:37 GMT` into seconds since 1970.
fn seconds_of(date: &str) -> Option<f64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut parts = date.split(' ').skip(1);
    let (day, month, year, time) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let time = humantime::parse_rfc3339(&format!("{year}-{month:02}-{day}T{time}Z")).ok()?;
    time.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs_f64())
}

/// Checks that there are keys to verify tokens with.
async fn keys(context: &Context) -> (Seen, Option<Authenticator>) {
    let config = &context.config;
    let authenticator = match Authenticator::standalone(&config.trust()) {
        Ok(authenticator) => authenticator,
        Err(error) => {
            let why = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            let fix = "correct TIDEGATE_JWKS__FILE, or the file";
            return (Seen::failed(format!("{error}{why}"), fix), None);
        }
    };
    let read = authenticator.read_url().await;
    let secrets = [&config.jwt_secret, &config.jwt_secret_previous];
    let mut sources = Vec::new();
    for (name, key) in [
        ("jwt_secret", &config.jwt_secret),
        ("jwt_secret_previous", &config.jwt_secret_previous),
        ("publishable_key", &config.publishable_key),
        ("secret_key", &config.secret_key),
    ] {
        if !key.is_empty() {
            sources.push(name.to_owned());
        }
    }
    for (name, place, origin) in [
        ("jwks.file", &config.jwks.file, KeySource::File),
        ("jwks.url", &config.jwks.url, KeySource::Url),
    ] {
        if !place.is_empty() {
            sources.push(format!("{} keys of {name}", authenticator.key_count(origin)));
        }
    }
    let saw = sources.join(", ");
    let left_out = authenticator.unusable_keys();
    let unusable = Unusable::VARIANTS
        .iter()
        .map(|reason| (reason.label(), left_out.iter().filter(|other| *other == reason).count()))
        .find(|(_, count)| *count > 0);
    let is_short =
        |secret: &&crate::secret::Secret| (1..SECRET_BYTES_MIN).contains(&secret.expose().len());
    let can_verify = secrets.iter().any(|secret| !secret.is_empty())
        || KeySource::VARIANTS.iter().any(|from| authenticator.key_count(*from) > 0);
    let seen = if let Err(error) = read {
        let why = error.source().map(|source| format!(": {source}")).unwrap_or_default();
        Seen::failed(
            format!("jwks.url cannot be read from here: {error}{why}"),
            "correct TIDEGATE_JWKS__URL, or open the way there",
        )
    } else if !can_verify {
        Seen::failed(
            "the settings have no key that a token could be verified with",
            "set TIDEGATE_JWT_SECRET to the project's JWT secret, or TIDEGATE_JWKS__URL",
        )
    } else if let Some((reason, count)) = unusable {
        Seen::warning(
            format!("{saw}; {count} keys are left out: {reason}"),
            "mend the key set: what is left out verifies nothing",
        )
    } else if secrets.iter().any(is_short) {
        Seen::warning(
            format!(
                "{saw}; a secret is shorter than {SECRET_BYTES_MIN} bytes: it can be guessed from a token"
            ),
            "give the project a longer JWT secret, and set TIDEGATE_JWT_SECRET to it",
        )
    } else {
        Seen::ok(saw)
    };
    (seen, Some(authenticator))
}

/// Checks the token, and whether the topic rules let it read.
fn token(context: &Context, authenticator: &Authenticator, text: &str) -> Seen {
    let now = unix_now();
    let token = match authenticator.verify_at(text, now) {
        Ok(token) => token,
        Err(error) => return Seen::failed(format!("the token: {error}"), mend(&error)),
    };
    let rules = Rules::new(context.config.topic.clone(), context.config.topics);
    let sub_topic = topic();
    let decide = |action| {
        rules.decide(&AccessRequest {
            action,
            sub_topic: &sub_topic,
            privacy: Privacy::Public,
            token: Ok(&token.claims),
            fallback: Some(&authenticator.anonymous().claims),
        })
    };
    let (read, write) = (decide(Action::Read), decide(Action::Write));
    let made = if context.is_token_made { "made with jwt_secret for this run: " } else { "" };
    let described = described(&token, text, now);
    let saw = format!("{made}{described}; {sub_topic}: read {read}, write {write}");
    if !read.is_allowed() {
        return Seen::failed(
            saw,
            "give a token of role anon or authenticated, or correct the topic rules",
        );
    }
    match token.claims.iat() {
        Some(iat) if iat > now + FUTURE_MAX => Seen::warning(
            format!("{saw}; it was made {} s in the future", iat - now),
            "run NTP where tokens are made, and here",
        ),
        Some(_) | None => Seen::ok(saw),
    }
}

fn described(token: &Token, text: &str, now: i64) -> String {
    let role = said(&token.claims.role);
    if text.starts_with(OPAQUE_KEY_PREFIX) {
        return format!("an opaque key, role {role}");
    }
    let left = u64::try_from(token.claims.exp.saturating_sub(now)).unwrap_or(0);
    let left = humantime::format_duration(Duration::from_secs(left / 60 * 60)).to_string();
    let whose =
        if token.claims.sub().is_some() { "of a person" } else { "of nobody in particular" };
    format!("verified, role {role}, {whose}, {left} left")
}

fn mend(error: &TokenError) -> &'static str {
    match error {
        TokenError::Expired { .. } => "give a newer token, or run NTP where it was made",
        TokenError::NotYetValid => "run NTP where the token was made, and here",
        TokenError::Signature | TokenError::KeyGone => {
            "set TIDEGATE_JWT_SECRET to the secret of the project that made the token"
        }
        TokenError::NoSigner { .. } => {
            "set TIDEGATE_JWT_SECRET or TIDEGATE_JWKS__URL to that of the project that made the token"
        }
        TokenError::Issuer => "add the token's `iss` to auth.issuers",
        TokenError::Audience => "add the token's `aud` to auth.audiences",
        TokenError::Missing
        | TokenError::Malformed
        | TokenError::MissingClaims
        | TokenError::Revoked => "give a JWT of the project, with role and exp",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_header_is_read_to_the_second() {
        assert_eq!(seconds_of("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777.0));
        for date in ["", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 anF 1994 08:49:37 GMT", "soon"] {
            assert_eq!(seconds_of(date), None, "{date}");
        }
    }

    #[test]
    fn series_are_found_by_name_and_labels() {
        let metrics = "# HELP tidegate_a x\ntidegate_a{b=\"c\",d=\"e\"} 2\ntidegate_a{b=\"x\",d=\"e\"} 3\ntidegate_ab 7\n";
        let gateway = Gateway { metrics: metrics.to_owned(), ..Gateway::default() };
        assert_eq!(gateway.sum("tidegate_a", &[]), Some(5.0));
        assert_eq!(gateway.sum("tidegate_a", &[("b", "x")]), Some(3.0));
        assert_eq!(gateway.sum("tidegate_ab", &[]), Some(7.0));
        assert_eq!(gateway.sum("tidegate_none", &[]), None);
        let (labels, _) = gateway.series("tidegate_a").next().unwrap();
        assert_eq!(Gateway::label(labels, "d"), "e");
    }
}
