//! From a commit to a session that listens: a LISTEN on the gateway's own URL, a NOTIFY from
//! another session.

use std::{
    io,
    time::{Duration, Instant},
};

use sqlx::postgres::PgListener;
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    context::Context,
    database::Database,
    report::{Check, Report, Seen, said},
    session::Session,
};
use crate::{
    access::Rule,
    db,
    relay::{STATS_CHANNEL, canary_channel},
};

/// Longest wait for a notification; the gateway's canary is given no less.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for a session that listens.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// The port on which Supabase's poolers share sessions by transaction.
const TRANSACTION_PORT: u16 = 6543;
/// The setting that holds the URL of the listening session.
const SETTING: &str = "TIDEGATE_NOTIFY_DATABASE_URL";

/// Examines the way of notifications.
pub(super) async fn examine(
    context: &Context,
    report: &mut Report<'_>,
    database: &mut Database,
) -> io::Result<()> {
    let url = context.config.notify_url();
    if url.is_empty() {
        let checks = [Check::ListenReachable, Check::ListenArrives];
        report.skip(&checks, "no database is set")?;
    } else {
        match Session::connect(url, SETTING).await {
            Ok((_, saw)) => {
                report.note(Check::ListenReachable, Seen::ok(saw))?;
                let seen = arrives(context, database).await;
                report.note(Check::ListenArrives, seen)?;
            }
            Err(seen) => {
                report.note(Check::ListenReachable, seen)?;
                let why = "there is no session to listen on: see listen-reachable";
                report.skip(&[Check::ListenArrives], why)?;
            }
        }
    }
    report.note(Check::ListenAllowList, allow_list(context))
}

/// Listens by the URL for LISTEN, notifies by the other, and waits for the notification.
async fn arrives(context: &Context, database: &mut Database) -> Seen {
    let Ok(options) = db::options(context.config.notify_url()) else {
        return Seen::skipped("the URL cannot be read");
    };
    let port = options.get_port();
    let pool = db::single(options, LISTEN_TIMEOUT);
    // A channel that nobody else uses, of the form of the gateways' canaries.
    let channel = canary_channel(Uuid::new_v4());
    let listen = async {
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(&channel).await?;
        Ok::<_, sqlx::Error>(listener)
    };
    let mut listener = match timeout(LISTEN_TIMEOUT, listen).await {
        Ok(Ok(listener)) => listener,
        Ok(Err(error)) => {
            let words = error
                .as_database_error()
                .map_or(error.to_string(), |refused| refused.message().to_owned());
            return Seen::failed(
                format!("LISTEN is refused: {}", said(&words)),
                format!("set {SETTING} to a session of the primary (port 5432)"),
            );
        }
        Err(_elapsed) => {
            return Seen::failed(
                "LISTEN is not answered",
                format!("set {SETTING} to a session of the primary (port 5432)"),
            );
        }
    };
    let begun = Instant::now();
    if let Err(error) =
        database.query(async |session| db::doctor::notify(session, &channel, "").await).await
    {
        let why = error.seen("mend the database first").saw;
        return Seen::skipped(format!("NOTIFY could not be sent: {why}"));
    }
    let seen = match timeout(ARRIVAL_TIMEOUT, listener.try_recv()).await {
        Ok(Ok(Some(_))) => {
            let took = begun.elapsed().as_secs_f64() * 1000.0;
            Seen::ok(format!("a NOTIFY of another session arrives after {took:.1} ms"))
        }
        Ok(Ok(None) | Err(_)) => Seen::failed(
            "the session that listens ends before the NOTIFY arrives",
            format!("set {SETTING} to a session that lasts, and look at the server's log"),
        ),
        Err(_elapsed) => deaf(port),
    };
    // Dropped before the listener, which else spawns a last UNLISTEN that nobody needs.
    drop(pool);
    seen
}

fn deaf(port: u16) -> Seen {
    let cause = if port == TRANSACTION_PORT {
        "port 6543 is that of a pooler in transaction mode, which loses LISTEN"
    } else {
        "a pooler in transaction mode loses LISTEN; so does another database than database_url's"
    };
    Seen::failed(
        format!("LISTEN is taken and nothing arrives within 2 s: {cause}"),
        format!(
            "set {SETTING} to a session of its own in the same database: port 5432, directly or \
             by a pooler in session mode"
        ),
    )
}

/// Checks the channels that the settings let the gateway listen to. Whether the gateway relays more
/// than these is checked by `unlisted-channel`.
fn allow_list(context: &Context) -> Seen {
    let listened = || context.config.topic.iter().filter(|rule| rule.listen.is_some());
    let is_open =
        |rule: &&Rule| rule.pattern.iter().any(|pattern| pattern.to_string().contains(":any}"));
    let open: Vec<_> = listened().filter(is_open).map(|rule| &*rule.name).collect();
    if !open.is_empty() {
        return Seen::warning(
            format!("clients choose what is listened to, by topic rule {}", open.join(", ")),
            "have `pattern` of the topic rule capture {eid} or {x:uuid} in place of {x:any}",
        );
    }
    let rules = listened().filter_map(|rule| rule.listen.as_ref()).map(ToString::to_string);
    let own = [STATS_CHANNEL, db::revocations::REVOCATIONS_CHANNEL].map(str::to_owned);
    let channels: Vec<_> = rules.chain(own).collect();
    Seen::ok(format!("by the settings: {}, and its own canary", channels.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_a_transaction_pooler_is_named() {
        assert!(deaf(6543).saw.contains("port 6543"));
        let other = deaf(5432);
        assert!(other.saw.contains("pooler") && other.fix.unwrap().contains(SETTING));
    }
}
