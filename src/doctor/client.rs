//! From the gateway to a page: joins as a client does, through the proxy in front if there is one,
//! and waits for the invalidation of the doctor's own event.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use form_urlencoded::Serializer;
use serde_json::Value;
use sqlx::PgConnection;
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    context::{CANARY_EID, Context, topic},
    database::Database,
    gateway::Gateway,
    report::{Check, Report, Seen, Status, said},
    session::{STATEMENT_TIMEOUT, Session, StatementError},
    socket::{Socket, UNLISTED, VSN},
    target::{ReachError, Target},
};
use crate::{
    db,
    http::user_agent,
    wire_client::{
        failure::Failure,
        upgrade::{Answer, upgrade},
    },
};

/// Longest wait for the answer to an upgrade; a refusal is delayed by up to 1.5 s.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(5);
/// A join that takes longer is late; production clients then give it up.
const JOIN_LATE: Duration = Duration::from_secs(2);
/// An invalidation that took longer has waited in its event's window.
const WAITED: Duration = Duration::from_secs(1);
/// Longest wait for an invalidation, beyond the window in which it may wait.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(3);

const PROXY_FIX: &str = "have what is in front pass the upgrade on; nginx: proxy_http_version 1.1; \
                         proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection \"upgrade\"";

/// Examines the way to a page.
pub(super) async fn examine(
    context: &Context,
    report: &mut Report<'_>,
    database: &mut Database,
    gateway: &Gateway,
) -> io::Result<()> {
    const AFTER: [Check; 5] = [
        Check::ClientAddress,
        Check::ClientJoin,
        Check::EndToEnd,
        Check::UnlistedChannel,
        Check::IdleTimeout,
    ];
    let (target, token) = match (&context.target, &context.token) {
        (Some(target), Some(token)) => (target, token.expose()),
        (target, _) => {
            let why = if target.is_none() {
                "listen has port 0: pass --url"
            } else {
                "no --token, and no jwt_secret to make one with"
            };
            report.skip(&[Check::WebsocketUpgrade], why)?;
            return report.skip(&AFTER, why);
        }
    };
    let nonce = Uuid::new_v4();
    let mut opened = match open(context, target, token, nonce).await {
        Ok(opened) => opened,
        Err(seen) => {
            report.note(Check::WebsocketUpgrade, seen)?;
            return report.skip(&AFTER, "there is no WebSocket: see websocket-upgrade");
        }
    };
    let saw = format!("101 at {}{}", target.place(), by(&opened.server));
    report.note(Check::WebsocketUpgrade, Seen::ok(saw))?;
    let seen = address(context, gateway, nonce, opened.own).await;
    report.note(Check::ClientAddress, seen)?;
    let socket = &mut opened.socket;
    let joined = socket.join(&topic(), token).await;
    let (seen, is_joined) = join(joined);
    report.note(Check::ClientJoin, seen)?;
    if !is_joined {
        let why = "the join was not answered with ok: see client-join";
        return report.skip(&AFTER[2..], why);
    }
    let unlisted = socket.join(UNLISTED, token).await;
    let is_linked = report.status(Check::GatewayLink) != Status::Failed;
    let window = context.config.topic.iter().filter_map(|rule| Some(rule.merge.as_ref()?.window));
    // A gateway without a link sends nothing after the window, either.
    let window = window.max().filter(|_| is_linked).unwrap_or_default();
    let patience = window + ARRIVAL_TIMEOUT;
    let (end_to_end, unlisted) =
        end_to_end(context, database, gateway, socket, unlisted, patience).await;
    report.note(Check::EndToEnd, end_to_end)?;
    report.note(Check::UnlistedChannel, unlisted)?;
    let seen = idle(context, socket, &opened.server).await;
    report.note(Check::IdleTimeout, seen)
}

/// Names the proxy in front if its `Server` header does: ` by nginx/1.22.1`.
fn by(server: &str) -> String {
    if server.is_empty() { String::new() } else { format!(" by {}", said(server)) }
}

struct Opened {
    socket: Socket,
    /// The `Server` header of the proxy in front; the gateway sends none.
    server: String,
    /// The local address of the connection.
    own: Option<SocketAddr>,
}

async fn open(
    context: &Context,
    target: &Target,
    token: &str,
    nonce: Uuid,
) -> Result<Opened, Seen> {
    let (mut stream, own) = target
        .connect(context.ca_file.as_deref())
        .await
        .map_err(|error| unreached(&error, context.is_public))?;
    let query = Serializer::new(String::new())
        .append_pair("apikey", token)
        .append_pair("vsn", VSN.as_str())
        .finish();
    let path = format!("{}/websocket?{query}", target.path);
    let host = format!("{}:{}", target.host, target.port);
    let user_agent = user_agent(nonce);
    let asked = timeout(UPGRADE_TIMEOUT, upgrade(&mut stream, &host, &path, &user_agent)).await;
    let answer = match asked {
        Ok(Ok(answer)) => answer,
        Ok(Err(failure)) => {
            return Err(Seen::failed(
                format!("{} ends without an answer to the upgrade: {failure}", target.place()),
                PROXY_FIX,
            ));
        }
        Err(_elapsed) => {
            return Err(Seen::failed(
                format!("{} does not answer the upgrade within 5 s", target.place()),
                PROXY_FIX,
            ));
        }
    };
    answer.check().map_err(|failure| refused(&answer, &failure, target))?;
    let server = header(&answer.head, "server").unwrap_or_default();
    let mut socket = Socket::new(stream);
    match socket.take(&answer.rest) {
        Ok(_) => Ok(Opened { socket, server, own }),
        Err(failure) => Err(Seen::failed(
            format!("the WebSocket ends at once: {failure}"),
            "look at the gateway's log",
        )),
    }
}

fn unreached(error: &ReachError, is_public: bool) -> Seen {
    let fix = match error {
        ReachError::Tls(..) => {
            "renew the certificate, name its host in --url, or pass its authority by --ca-file"
        }
        _ if is_public => "correct --url, or start what is in front",
        _ => "start the gateway, or set TIDEGATE_LISTEN to where it listens",
    };
    Seen::failed(said(&error.to_string()), fix)
}

/// Explains an answer that opens no WebSocket.
fn refused(answer: &Answer, failure: &Failure, target: &Target) -> Seen {
    let server = header(&answer.head, "server").unwrap_or_default();
    let words: Option<Value> = serde_json::from_slice(&answer.rest).ok();
    let words = words.as_ref().and_then(|words| words["error"].as_str()).map(said);
    let saw = format!(
        "{}{} answers {}{}",
        target.place(),
        by(&server),
        failure.to_string().replace("handshake: answered ", ""),
        words.as_deref().map(|words| format!(": {words}")).unwrap_or_default(),
    );
    let fix = match failure {
        Failure::Refused(401 | 403) => {
            "correct the token, see `token`; the gateway's keys must be those of the settings here"
        }
        Failure::Refused(404) => {
            "have what is in front pass /realtime/v1/ on to the gateway's address"
        }
        Failure::Refused(429) => {
            "raise limits.connections_max and the limits of an address, see client-address"
        }
        Failure::Refused(502..=504) => {
            "start the gateway, or correct its address in what is in front"
        }
        Failure::Refused(300..=399) => "name in --url where it points to: https instead of http",
        _ => PROXY_FIX,
    };
    Seen::failed(saw, fix)
}

/// Returns the value of a header in the head of an answer.
fn header(head: &[u8], wanted: &str) -> Option<String> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(name, _)| name.eq_ignore_ascii_case(wanted))?;
    Some(value.trim().to_owned())
}

/// Checks which address the gateway has seen.
async fn address(
    context: &Context,
    gateway: &Gateway,
    nonce: Uuid,
    own: Option<SocketAddr>,
) -> Seen {
    if !gateway.is_open {
        return Seen::skipped("the operators' address does not answer: see gateway-admin");
    }
    let target = format!("/visits/{nonce}");
    let visit = match context.admin.get(&target, 4096).await {
        Ok(answer) => serde_json::from_slice::<Value>(answer.body()).unwrap_or_default(),
        Err(error) => return Seen::skipped(said(&error.to_string())),
    };
    let [address, peer, forwarded] =
        ["address", "peer", "forwarded"].map(|name| visit[name].as_str().unwrap_or_default());
    let Ok(peer) = peer.parse::<SocketAddr>() else {
        return Seen::failed(
            "the gateway at admin_listen has not seen this client: it came to another one",
            "set TIDEGATE_ADMIN_LISTEN to the gateway behind --url, or correct --url",
        );
    };
    if own == Some(peer) {
        return Seen::ok(format!("the client comes from {address}, with nothing in front"));
    }
    match forwarded {
        "believed" => Seen::ok(format!("the client comes from {address}, by {}", peer.ip())),
        "ignored" => Seen::warning(
            format!(
                "{} is in front and names the client, and is not believed: all clients share its \
                 address and the limits of one",
                peer.ip()
            ),
            format!("set TIDEGATE_NETWORK__TRUSTED_PROXIES={}", peer.ip()),
        ),
        _ => Seen::warning(
            format!(
                "{} is in front (or translates addresses) and does not name the client: all \
                 clients share its address and the limits of one",
                peer.ip()
            ),
            format!(
                "have it send X-Forwarded-For (nginx: proxy_set_header X-Forwarded-For \
                 $proxy_add_x_forwarded_for), and set TIDEGATE_NETWORK__TRUSTED_PROXIES={}",
                peer.ip()
            ),
        ),
    }
}

/// Returns the result of the join, and whether the channel is joined.
fn join(joined: Result<Result<Duration, String>, Failure>) -> (Seen, bool) {
    let topic = topic();
    match joined {
        Ok(Ok(took)) if took > JOIN_LATE => {
            let saw = format!(
                "{topic} is joined after {:.1} s: production clients give up after 2 s",
                took.as_secs_f64()
            );
            (
                Seen::warning(
                    saw,
                    "see tidegate_join_seconds, relay.listen_wait, protocol.error_delay",
                ),
                true,
            )
        }
        Ok(Ok(took)) => {
            (Seen::ok(format!("{topic} is joined after {:.0} ms", took.as_secs_f64() * 1e3)), true)
        }
        Ok(Err(reason)) => (
            Seen::failed(
                format!("{topic} is refused: {}", said(&reason)),
                "correct the token (see `token`), or the topic rules: `tidegate config --explain`",
            ),
            false,
        ),
        Err(failure) => (
            Seen::failed(
                format!("{topic} is not joined: {failure}"),
                "look at the gateway's log, and at what is in front: frames do not pass",
            ),
            false,
        ),
    }
}

/// Deletes the doctor's event from the history, which only its owner may.
async fn forget(context: &Context, database: &mut Database) -> bool {
    let forget =
        async |session: &mut PgConnection| db::doctor::forget_event(session, CANARY_EID).await;
    if database.query(forget).await.is_ok() {
        return true;
    }
    let url = context.config.migrate_url();
    match Session::connect(url, "TIDEGATE_MIGRATE_DATABASE_URL").await {
        Ok((mut owner, _place)) => owner.query(STATEMENT_TIMEOUT, forget).await.is_ok(),
        Err(_seen) => false,
    }
}

/// Notifies a channel that no rule names, invalidates the doctor's event, and waits as long as
/// `patience` for the invalidation. Returns the results of `end-to-end` and `unlisted-channel`.
async fn end_to_end(
    context: &Context,
    database: &mut Database,
    gateway: &Gateway,
    socket: &mut Socket,
    unlisted: Result<Result<Duration, String>, Failure>,
    patience: Duration,
) -> (Seen, Seen) {
    let skip = |why: &str| (Seen::skipped(why), Seen::skipped(why));
    if database.session.is_none() {
        return skip("there is no session with the database");
    }
    let notify = async |session: &mut PgConnection| {
        db::doctor::notify(session, UNLISTED, r#"{"type":"tidegate-doctor"}"#).await
    };
    let notified = database.query(notify).await;
    let begun = Instant::now();
    let invalidate =
        async |session: &mut PgConnection| db::history::invalidate(session, CANARY_EID, None).await;
    let payload = match database.query(invalidate).await {
        Ok(payload) => serde_json::from_str::<Value>(&payload).unwrap_or_default(),
        Err(StatementError::Closed(why)) => {
            return skip(&format!("manual_cache_invalidation cannot be called: {why}"));
        }
        Err(error) => {
            let nothing = Seen::skipped("nothing was sent");
            return (error.seen("see the checks of the database"), nothing);
        }
    };
    let (arrived, is_leaked) = socket.invalidated(&payload, begun + patience).await;
    let took = begun.elapsed();
    let left = if forget(context, database).await {
        ""
    } else {
        "; its row stays in the history until history.keep"
    };
    let unlisted = match (unlisted, notified, &arrived) {
        (Ok(Err(reason)), _, _) => {
            Seen::ok(format!("topics without a rule are refused: {}", said(&reason)))
        }
        (_, _, _) if is_leaked => Seen::failed(
            format!("what is notified on {UNLISTED} reaches clients, and no rule names it"),
            "see listen-allow-list; run the gateway of this version",
        ),
        (Err(failure), _, _) => Seen::skipped(format!("its topic could not be joined: {failure}")),
        (_, Err(_), _) => Seen::skipped("the notification could not be sent"),
        (_, _, Ok(None) | Err(_)) => Seen::skipped("nothing arrives at all: see end-to-end"),
        (Ok(Ok(_)), Ok(()), Ok(Some(_))) => {
            Seen::ok("what is notified on a channel that no rule names reaches nobody")
        }
    };
    let seen = match arrived {
        Ok(Some(payload)) => {
            let merged = if payload["merged"].is_null() { "" } else { ", merged" };
            // An earlier run has opened the window.
            let waited = if took > WAITED { "; it waited for the event's window" } else { "" };
            let took = took.as_secs_f64() * 1e3;
            Seen::ok(format!(
                "an invalidation of {CANARY_EID} is with the client {took:.1} ms after it was called{merged}{waited}{left}"
            ))
        }
        Err(failure) => Seen::failed(
            format!("the WebSocket ended before the invalidation came: {failure}{left}"),
            "look at the gateway's log, and at what is in front",
        ),
        Ok(None) => lost(context, gateway, left).await,
    };
    (seen, unlisted)
}

/// Finds out on which side of the gateway the invalidation was lost.
async fn lost(context: &Context, gateway: &Gateway, left: &str) -> Seen {
    let what =
        format!("an invalidation of {CANARY_EID} was committed and did not reach the client");
    if !gateway.is_open {
        return Seen::failed(format!("{what}{left}"), "see gateway-admin, and then gateway-link");
    }
    let target = format!("/events/{CANARY_EID}/history?minutes=1");
    let answer = context.admin.get(&target, 1 << 20).await;
    let history: Value = answer
        .ok()
        .and_then(|answer| serde_json::from_slice(answer.body()).ok())
        .unwrap_or_default();
    let is_sent = history["messages"].as_array().is_some_and(|messages| !messages.is_empty());
    if is_sent {
        Seen::failed(
            format!("{what}, though the gateway has sent it{left}"),
            "have what is in front pass frames on at once (nginx: proxy_buffering off)",
        )
    } else {
        Seen::failed(
            format!("{what}: the gateway never heard it{left}"),
            "see gateway-link and listen-arrives; the gateway and the doctor must have one database",
        )
    }
}

/// Checks that an idle connection is not closed by the proxy in front.
async fn idle(context: &Context, socket: &mut Socket, server: &str) -> Seen {
    if !context.is_public {
        return Seen::skipped("no --url: there is nothing in front to look at");
    }
    let fix = "raise the idle time-out of what is in front above 90 s, as deploy/nginx.conf does: \
               proxy_read_timeout 1h; proxy_send_timeout 1h";
    let Some(length) = context.idle else {
        return Seen::skipped(format!(
            "takes 70 s: pass --slow{}; tabs in the background are silent for 65 s",
            if server.contains("nginx") {
                " (nginx ends a connection after 60 s unless told otherwise)"
            } else {
                ""
            }
        ));
    };
    let begun = Instant::now();
    loop {
        match socket.next(begun + length).await {
            Ok(None) => break,
            Ok(Some(_)) => {}
            Err(failure) => {
                let after = begun.elapsed().as_secs();
                return Seen::failed(
                    format!("the connection ended after {after} s of silence: {failure}"),
                    fix,
                );
            }
        }
    }
    let length = humantime::format_duration(length);
    match socket.beats().await {
        Ok(true) => Seen::ok(format!("the connection outlives {length} of silence")),
        Ok(false) => Seen::failed(format!("the connection is dead after {length} of silence"), fix),
        Err(failure) => Seen::failed(
            format!("the connection is gone after {length} of silence: {failure}"),
            fix,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_found_however_it_is_written() {
        let head = b"HTTP/1.1 101 x\r\nSERVER:  nginx/1 \r\nupgrade: websocket\r\n\r\n";
        assert_eq!(header(head, "server").as_deref(), Some("nginx/1"));
        assert_eq!(header(head, "date"), None);
    }
}
